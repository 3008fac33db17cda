#include "attend.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "level.h"

namespace onnx_tricks::cpu {
namespace {

// A thread gives the memory for a large prompt back at the next small step.
constexpr std::int64_t kKeptFloats = 8 << 20;
constexpr std::size_t kAlignment = 64;

struct Buffer {
  float* data = nullptr;
  std::int64_t size = 0;

  ~Buffer() { std::free(data); }

  float* reserve(std::int64_t count) {
    if (count > size || (size > kKeptFloats && count <= kKeptFloats)) {
      std::free(data);
      size = 0;
      const auto bytes =
          (static_cast<std::size_t>(count) * sizeof(float) / kAlignment + 1) * kAlignment;
      data = static_cast<float*>(std::aligned_alloc(kAlignment, bytes));
      if (!data) throw std::bad_alloc();
      size = count;
    }
    return data;
  }
};

}  // namespace

float* scratch(Purpose purpose, std::int64_t count) {
  thread_local Buffer buffers[3];
  return buffers[static_cast<int>(purpose)].reserve(count);
}

Attend* choose(Type type) {
  if (type == Type::kDouble) return attend_plain;
#ifdef ONNX_TRICKS_X86
  const char* wanted = std::getenv("ONNX_TRICKS_LEVEL");
  const auto may = [&](const char* level) { return !wanted || !std::strcmp(wanted, level); };
  if (may("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return attend_avx512;
  if (may("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return attend_avx2;
#endif
  return attend_portable;
}

}  // namespace onnx_tricks::cpu

// The library's CPU operators, computed by the CUDA kernels in the emulator: every tensor in memory
// of exactly its size.

#include "cpu/attend.h"

#include <cstdint>
#include <deque>
#include <stdexcept>

#include "cuda/attend.h"
#include "guarded.h"

namespace onnx_tricks::cpu {
namespace {

// Copies of tensors for the emulated device.
class Tensors {
 public:
  template <class Pointer>
  void move(Pointer& host, std::int64_t count, Type type) {
    if (!host) return;
    const auto size = static_cast<std::size_t>(count * size_of(type));
    const Guarded& copy = all_.emplace_back(size);
    std::memcpy(copy.data(), host, size);
    host = copy.data();
  }

  // For what is written: takes it back in the end.
  void move_back(void*& host, std::int64_t count, Type type, bool keep) {
    void* const target = host;
    if (!host) return;
    move(host, count, type);
    const Guarded& copy = all_.back();
    if (!keep) std::memset(copy.data(), 0xff, copy.size());
    written_.push_back({target, &copy});
  }

  void take_back() {
    for (const auto& [target, copy] : written_) std::memcpy(target, copy->data(), copy->size());
  }

 private:
  using Guarded = emulated::Guarded;
  std::deque<Guarded> all_;
  std::deque<std::pair<void*, const Guarded*>> written_;
};

void attend(const Problem& original, const Parallel&) {
  Problem p = original;
  Tensors tensors;
  for (State* state : {&p.latent, &p.residual}) {
    const std::int64_t rows = p.B * state->groups * state->width;
    const bool in_place = state->in_place(), cross = p.kind == Operator::kCross;
    tensors.move(state->past, rows * state->past_length, p.cache);
    tensors.move(state->fresh, rows * p.T, p.type);
    tensors.move_back(state->present, rows * state->present_length, p.cache, in_place || cross);
    if (in_place) state->past = state->present;
  }
  tensors.move(p.query, p.B * p.H * p.T * p.K, p.type);
  tensors.move(p.key_weight, p.G * p.K * p.D, p.type);
  tensors.move(p.value_weight, p.G * p.D * p.V, p.type);
  for (const void** term : {&p.key_bias, &p.key_gain, &p.key_shift})
    tensors.move(*term, p.G * p.K, p.type);
  tensors.move(p.value_bias, p.H * p.V, p.type);
  tensors.move(p.cos, (p.angle_stride ? p.B : 1) * p.S * p.R / 2, p.type);
  tensors.move(p.sin, (p.angle_stride ? p.B : 1) * p.S * p.R / 2, p.type);
  const std::int64_t dims[] = {p.B, p.H, p.T, p.S};
  std::int64_t last = 0;
  for (int i = 0; i < 4; ++i) last += (dims[i] - 1) * p.bias_strides[i];
  tensors.move(p.bias, p.empty() || !p.S ? 0 : last + 1, p.type);
  tensors.move_back(p.output, p.B * p.T * p.H * p.V, p.type, false);

  const emulated::Guarded scratch(cuda::scratch_size(p));
  if (const char* error = cuda::attend(p, nullptr, scratch.data())) throw std::runtime_error(error);
  tensors.take_back();
}

}  // namespace

Attend* choose(Type) { return attend; }

}  // namespace onnx_tricks::cpu

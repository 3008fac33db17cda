// Kernels that are wrong in one way each, and one that is right, to see whether the emulator tells.

#include <string>

#include "cuda/device.cuh"

namespace onnx_tricks::cuda {
namespace {

constexpr int kThreads = 64;

// Threads pass a number on to others of the other warp.
template <bool kBarrier>
void pass_on(float* result) {
  auto* numbers = reinterpret_cast<float*>(shared_memory());
  const unsigned thread = threadIdx.x;
  numbers[thread] = 1;
  if (kBarrier) __syncthreads();
  result[blockIdx.x * kThreads + thread] = numbers[(thread + 32) % kThreads];
}

template <bool kWait>
void copy(float* result) {
  auto* numbers = reinterpret_cast<float*>(shared_memory()) + 4 * threadIdx.x;
  copy_async(numbers, nullptr, false);
  commit_copies();
  if (kWait) wait_for_copies<0>();
  result[blockIdx.x * kThreads + threadIdx.x] = 1 + numbers[0];
}

void copy_to_odd_place(float*) { copy_async(shared_memory() + 4, nullptr, false); }

void write_beyond(float*) { shared_memory()[4 * sizeof(float) * kThreads] = 1; }

void wait_alone(float*) {
  if (threadIdx.x < 32) __syncthreads();
}

void write_to_block_that_is_none(float*) { *of_block(shared_memory(), 2) = 1; }

}  // namespace

const char* run_fault(const std::string& name) {
  static std::string text;
  float results[2 * kThreads], *const first = results;
  const auto run = [&](void (*kernel)(float*)) {
    for (float& one : results) one = 1;
    const char* error = launch(kernel, 2, kThreads, 4 * sizeof(float) * kThreads, 2, nullptr, first);
    text = error ? error : "";
    for (const float one : results)
      if (one != 1) text = "wrong numbers";
    return text.c_str();
  };
  if (name == "nothing") return run(pass_on<true>);
  if (name == "barrier") return run(pass_on<false>);
  if (name == "copy") return run(copy<true>);
  if (name == "wait") return run(copy<false>);
  if (name == "alignment") return run(copy_to_odd_place);
  if (name == "bounds") return run(write_beyond);
  if (name == "alone") return run(wait_alone);
  return run(write_to_block_that_is_none);
}

}  // namespace onnx_tricks::cuda

extern "C" __attribute__((visibility("default"))) const char* run_fault(const char* name) {
  return onnx_tricks::cuda::run_fault(name);
}

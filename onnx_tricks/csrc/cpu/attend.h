// The kernels for the CPU.
#pragma once

#include <cstddef>

#include "../attention.h"

namespace onnx_tricks::cpu {

// Runs task(0) to task(count - 1), on several threads if it can.
struct Parallel {
  int threads = 1;  // how finely to divide the work

  virtual void run(std::size_t count, void (*task)(void*, std::size_t), void* data) const = 0;

  template <class Task>
  void operator()(std::size_t count, Task& task) const {
    run(count, [](void* data, std::size_t i) { (*static_cast<Task*>(data))(i); }, &task);
  }

 protected:
  ~Parallel() = default;
};

// Appends the new rows to the states and computes the output.
using Attend = void(const Problem& problem, const Parallel& parallel);

// The best kernel that the processor has for a type of queries, or of the level that the variable
// ONNX_TRICKS_LEVEL of the environment names: avx512, avx2 or portable.
Attend* choose(Type type);

}  // namespace onnx_tricks::cpu

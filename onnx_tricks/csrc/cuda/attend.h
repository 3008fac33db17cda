// The kernels for NVIDIA GPUs.
#pragma once

#include <cstddef>

#include "../attention.h"

namespace onnx_tricks::cuda {

// Bytes of device memory that `attend` needs beside the tensors.
std::size_t scratch_size(const Problem& problem);

// Appends the new rows to the states and computes the output, on `stream` (a cudaStream_t), without
// waiting. All pointers are the device's. Null if all was launched, else what went wrong.
const char* attend(const Problem& problem, void* stream, void* scratch);

}  // namespace onnx_tricks::cuda

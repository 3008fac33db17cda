// Tensors whose element type is known only at run time.
#pragma once

#include "../attention.h"
#include "device.cuh"

namespace onnx_tricks::cuda {

struct Numbers {
  const void* data = nullptr;
  Type type = Type::kFloat;

  __device__ float operator[](std::int64_t i) const {
    if (type == Type::kFloat) return static_cast<const float*>(data)[i];
    if (type == Type::kHalf) return widen(static_cast<const Half*>(data)[i]);
    return widen(static_cast<const Brief*>(data)[i]);
  }

  __device__ void set(std::int64_t i, float value) const {
    void* to = const_cast<void*>(data);
    if (type == Type::kFloat) static_cast<float*>(to)[i] = value;
    else if (type == Type::kHalf) static_cast<Half*>(to)[i] = narrow<Half>(value);
    else static_cast<Brief*>(to)[i] = narrow<Brief>(value);
  }
};

}  // namespace onnx_tricks::cuda

// From a node's inputs to a Problem, or to a Status that says what is wrong with them.
#pragma once

#include <array>
#include <cstddef>

#include "attention.h"
#include "ort_api.h"

namespace onnx_tricks {

// A tensor of an operator. Each dimension is a letter, for which one number stands throughout:
// those of attention.h, C for the length of a past (P, or a capacity), A for R / 2, L for the
// length of a present, 1, and in a leading place b for B or 1. "*" broadcasts to [B, H, T, S].
struct Tensor {
  const char* name;
  const char* dims;
  bool cached = false;  // of type `Problem::cache`
  bool optional = false;
};

constexpr std::size_t kMostInputs = 13;

// Inputs and outputs in order, as onnx_tricks/operators/signature.py has them.
struct Signature {
  Operator kind;
  const char* name;
  std::size_t input_count;
  std::array<Tensor, kMostInputs> inputs;
  std::size_t output_count;
  std::array<Tensor, 3> outputs;
};

extern const std::array<Signature, 3> kSignatures;

// Fills in all but types and attributes, which are there, and has the outputs allocated. Null if all is well.
ort::Status* read_arguments(const ort::Api* api, ort::KernelContext* context,
                            const Signature& signature, Problem& problem);

// Tells the runtime what is known of the outputs' shapes before the model runs.
ort::Status* infer_shapes(const ort::Api* api, ort::ShapeContext* context,
                          const Signature& signature);

}  // namespace onnx_tricks

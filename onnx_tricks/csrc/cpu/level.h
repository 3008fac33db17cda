// One set of kernels for each level of instruction sets, and what they ask of the outside.
#pragma once

#include "attend.h"

namespace onnx_tricks::cpu {

// Memory for `count` floats, aligned to 64 bytes and not initialised, which lasts until the same
// thread asks for the same purpose again: weights, what all tasks share, and what is a task's own.
enum class Purpose { kWeights, kShared, kTask };
float* scratch(Purpose purpose, std::int64_t count);

Attend attend_plain;  // for doubles; the others are for every other type
Attend attend_portable;
#ifdef ONNX_TRICKS_X86
Attend attend_avx2;
Attend attend_avx512;
#endif

}  // namespace onnx_tricks::cpu

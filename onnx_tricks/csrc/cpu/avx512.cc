#include "kernels.h"

void onnx_tricks::cpu::attend_avx512(const Problem& problem, const Parallel& parallel) {
  attend_at_level(problem, parallel);
}

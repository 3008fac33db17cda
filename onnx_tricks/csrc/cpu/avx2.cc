#include "kernels.h"

void onnx_tricks::cpu::attend_avx2(const Problem& problem, const Parallel& parallel) {
  attend_at_level(problem, parallel);
}

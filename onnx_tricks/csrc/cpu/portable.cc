#include "kernels.h"

void onnx_tricks::cpu::attend_portable(const Problem& problem, const Parallel& parallel) {
  attend_at_level(problem, parallel);
}

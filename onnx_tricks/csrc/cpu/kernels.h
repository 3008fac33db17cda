// Attention over cached rows, in two ways. A file for each level of instructions includes this.
//
// For few new tokens the weights are absorbed into the queries and applied to the sums: the cache
// is read once, tile by tile, and all heads work on a tile while it is near. For many, keys and
// values of all tokens are made once. Which one takes fewer operations is counted.
#pragma once

#include "absorbed.h"
#include "expanded.h"

namespace onnx_tricks::cpu {
namespace {

inline bool expansion_pays(const Problem& p) {
  const auto S = static_cast<double>(p.S), rows = static_cast<double>(p.H * p.T);
  const auto K = static_cast<double>(p.K), V = static_cast<double>(p.V);
  const auto D = static_cast<double>(p.D), G = static_cast<double>(p.G);
  const bool slim = p.kind == Operator::kSlim;
  const double absorbed = S * rows * (D + (slim ? K : D)) + rows * D * (V + (slim ? 0 : K));
  const double expanded = S * rows * (K + V) + S * G * D * (V + (slim ? 0 : K));
  return expanded < absorbed;
}

inline void attend_at_level(const Problem& p, const Parallel& parallel) {
  const Call call(p, parallel);
  if (p.empty() || p.S == 0 || expansion_pays(p))
    Expanded::run(call);
  else
    Absorbed::run(call);
}

}  // namespace
}  // namespace onnx_tricks::cpu

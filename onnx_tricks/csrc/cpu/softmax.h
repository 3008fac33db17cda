// Softmax over scores that come tile by tile.
#pragma once

#include "vector.h"

namespace onnx_tricks::cpu {
namespace {

// What a row of scores knows of those it has seen.
struct Running {
  float most;   // the greatest score
  float total;  // the sum of exp(score - most)
};

constexpr Running kNothingSeen = {-kInfinity, 0};

// Below the first, a bias hides a score whatever it is, once another is above the second.
constexpr float kHidden = -1e30f, kVisible = -1e29f;

// The bias of rows of scores of one row of the batch.
class Bias {
 public:
  Bias(const Problem& p, std::int64_t b) : p_(p), offset_(b * p.bias_strides[0]) {}

  // A tile of a row as floats; null if there is no bias. `room` is for `count` floats, padded.
  const float* row(std::int64_t h, std::int64_t t, std::int64_t s, std::int64_t count,
                   float* room) const {
    if (!p_.bias) return nullptr;
    const std::int64_t* strides = p_.bias_strides;
    const std::int64_t offset = offset_ + h * strides[1] + t * strides[2] + s * strides[3];
    const void* from = static_cast<const char*>(p_.bias) + offset * size_of(p_.type);
    if (strides[3]) {
      widen(from, p_.type, room, count);
    } else {
      widen(from, p_.type, room, 1);
      for (std::int64_t i = 1; i < count; ++i) room[i] = room[0];
    }
    return room;
  }

  bool broadcast(int axis) const { return p_.bias_strides[axis] == 0; }

 private:
  const Problem& p_;
  std::int64_t offset_;
};

// Whether a tile of scores adds nothing to a row.
inline bool hidden(const float* bias, std::int64_t count, const Running& running) {
  float most = -kInfinity;
  for (std::int64_t i = 0; i < count; ++i) most = bias[i] > most ? bias[i] : most;
  return most == -kInfinity || (most < kHidden && running.most > kVisible);
}

// Turns `count` scores into weights, exp(score - most), with zeros up to the next whole vector, and
// returns what the sums of earlier weights and all that was made with them are to be scaled by.
inline float weigh(float* scores, std::int64_t count, const float* bias, float softcap,
                   Running& running) {
  const std::int64_t end = padded(count);
  for (std::int64_t i = count; i < end; ++i) scores[i] = -kInfinity;
  if (softcap != 0)
    for (std::int64_t i = 0; i < count; i += kLanes)
      store(scores + i, all(softcap) * tangent(load(scores + i) / all(softcap)));
  if (bias)
    for (std::int64_t i = 0; i < count; ++i) scores[i] += bias[i];
  for (std::int64_t i = count; i < end; ++i) scores[i] = -kInfinity;
  Vector highest = load(scores);
  for (std::int64_t i = kLanes; i < end; i += kLanes) highest = greater(load(scores + i), highest);
  const float most = greatest(highest);
  const float before = running.most;
  float scale = 1;
  if (most > before) {
    running.most = most;
    scale = exponential(all(before - most))[0];
  }
  // Where everything so far is hidden, the difference would be none.
  const Vector level = all(running.most == -kInfinity ? 0 : running.most);
  Vector total = {};
  for (std::int64_t i = 0; i < end; i += kLanes) {
    const Vector weight = exponential(load(scores + i) - level);
    store(scores + i, weight);
    total += weight;
  }
  running.total = running.total * scale + sum(total);
  return scale;
}

inline void scale_row(float* row, std::int64_t width, float scale) {
  for (std::int64_t i = 0; i < width; i += kLanes) store(row + i, load(row + i) * all(scale));
}

}  // namespace
}  // namespace onnx_tricks::cpu

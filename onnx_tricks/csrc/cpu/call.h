// What both ways to compute attention need of a call.
#pragma once

#include "softmax.h"
#include "tiles.h"

namespace onnx_tricks::cpu {
namespace {

constexpr std::int64_t kSharedFloats = std::int64_t{16} << 20;  // more only where one row needs it
constexpr std::int64_t kTileFloats = 1 << 15;                   // of latent that stay in a cache
constexpr double kSmall = 1 << 18;  // multiplications that are no work for several threads

class Call {
 public:
  Call(const Problem& p, const Parallel& parallel)
      : p(p), layout(p), threads(parallel.threads), parallel_(parallel) {
    if (!p.empty()) read_weights();
  }

  bool slim() const { return p.kind == Operator::kSlim; }

  template <class Task>
  void divide(std::int64_t count, double work, Task&& task) const {
    if (work < kSmall)
      for (std::int64_t i = 0; i < count; ++i) task(static_cast<std::size_t>(i));
    else
      parallel_(static_cast<std::size_t>(count), task);
  }

  Rows key_weight(std::int64_t g) const {
    return {key_weight_.data + g * p.K * key_weight_.stride, key_weight_.stride};
  }

  // Rows of the value weight that belong to a part of the latent.
  Rows value_weight(std::int64_t g, std::int64_t first) const {
    return {value_weight_[g * p.D + first], value_weight_.stride};
  }

  const KeyTerms& key_terms() const { return key_terms_; }

  // Queries [T, K] of one head, scaled, [T, layout.K].
  void read_queries(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t count,
                    float* to) const {
    const std::int64_t row = (b * p.H + h) * p.T + t;
    for (std::int64_t i = 0; i < count; ++i, to += layout.K) {
      widen(at(p.query, p.type, (row + i) * p.K), p.type, to, p.K);
      for (std::int64_t k = 0; k < p.K; ++k) to[k] *= p.scale;
      for (std::int64_t k = p.K; k < layout.K; ++k) to[k] = 0;
    }
  }

  // One row of the output, from the row without bias and what its scores were.
  void write_output(std::int64_t b, std::int64_t h, std::int64_t t, float* row,
                    const Running& seen) const {
    const bool nothing = p.S == 0 || (p.safe && !(seen.total > 0));
    if (nothing)
      for (std::int64_t v = 0; v < p.V; ++v) row[v] = 0;
    if (p.value_bias && !(nothing && p.safe))
      for (std::int64_t v = 0; v < p.V; ++v) {
        float bias;
        widen(at(p.value_bias, p.type, h * p.V + v), p.type, &bias, 1);
        row[v] += bias;
      }
    narrow(row, p.type, at(p.output, p.type, ((b * p.T + t) * p.H + h) * p.V), p.V);
  }

  // Writes present states, where that is not done tile by tile.
  void append_all(std::int64_t first, std::int64_t batch) const {
    const State* const states[] = {&p.latent, &p.residual};
    for (const State* state : states) {
      const std::int64_t groups = state->groups;
      const double work =
          static_cast<double>(batch * groups) * static_cast<double>(p.S * state->width);
      divide(batch * groups, work,
             [&](std::size_t i) { append(p, *state, first * groups + index(i), 0, p.S); });
    }
  }

  static std::int64_t index(std::size_t i) { return static_cast<std::int64_t>(i); }

  // How many rows of the batch to work on at once.
  std::int64_t portion(std::int64_t floats) const {
    const std::int64_t fitting = kSharedFloats / (floats > 0 ? floats : 1);
    return least(p.B, fitting > 0 ? fitting : 1);
  }

  const Problem& p;
  const Layout layout;
  const int threads;

 private:
  // Weights that are not floats in whole vectors are made so once.
  void read_weights() {
    FloatRows key{p.key_weight, p.type, p.D, nullptr};
    FloatRows value{p.value_weight, p.type, p.V, nullptr};
    const std::int64_t keys = key.data && !key.in_place() ? p.G * p.K * layout.D : 0;
    const std::int64_t values = value.in_place() ? 0 : p.G * p.D * layout.V;
    key.room = scratch(Purpose::kWeights, keys + values + 3 * p.G * layout.K);
    value.room = key.room + keys;
    if (key.data) key.read(p.G * p.K);
    value.read(p.G * p.D);
    float* room = value.room + values;
    const auto read = [&](const void* data, Rows& rows) {
      const FloatRows term{data, p.type, p.K, room};
      room += p.G * layout.K;
      if (!data) return;
      term.read(p.G);
      rows = term.rows();
    };
    read(p.key_bias, key_terms_.bias);
    read(p.key_gain, key_terms_.gain);
    read(p.key_shift, key_terms_.shift);
    key_weight_ = key.rows();
    value_weight_ = value.rows();
  }

  const Parallel& parallel_;
  Rows key_weight_ = {}, value_weight_ = {};
  KeyTerms key_terms_ = {};
};

}  // namespace
}  // namespace onnx_tricks::cpu

// Keys and values of all tokens made once, for prompts.
#pragma once

#include "call.h"

namespace onnx_tricks::cpu {
namespace {

// Some rows of the batch. Keys are transposed, tile by tile: [b, g, tile, K, tokens]; values are
// [b, g, S, V].
class Expanded {
 public:
  static void run(const Call& call) {
    call.append_all(0, call.p.B);
    if (call.p.empty()) return;
    const std::int64_t step = call.portion(Expanded(call, 0, 1).floats());
    for (std::int64_t b = 0; b < call.p.B; b += step)
      Expanded(call, b, least(step, call.p.B - b)).run();
  }

 private:
  static constexpr std::int64_t kTokens = 128;       // of a tile
  static constexpr std::int64_t kBlock = 8 * kRows;  // queries of a task

  Expanded(const Call& call, std::int64_t first, std::int64_t batch)
      : call_(call), p_(call.p), layout_(call.layout), first_(first), batch_(batch) {
    tiles_ = (p_.S + kTokens - 1) / kTokens;
  }

  std::int64_t floats() const { return batch_ * p_.G * tiles_ * kTokens * (p_.K + layout_.V); }

  void run() {
    keys_ = scratch(Purpose::kShared, floats());
    values_ = keys_ + batch_ * p_.G * tiles_ * kTokens * p_.K;
    const auto tokens = static_cast<double>(batch_ * p_.S), D = static_cast<double>(p_.D);
    const auto width = static_cast<double>(p_.K + p_.V);
    call_.divide(
        batch_ * p_.G * tiles_, tokens * static_cast<double>(p_.G) * D * width, [&](std::size_t i) {
          const std::int64_t tile = Call::index(i) % tiles_, rest = Call::index(i) / tiles_;
          expand(rest / p_.G, rest % p_.G, tile);
        });
    const std::int64_t blocks = (p_.T + kBlock - 1) / kBlock;
    call_.divide(batch_ * p_.H * blocks, tokens * static_cast<double>(p_.H * p_.T) * width,
                 [&](std::size_t i) {
                   const std::int64_t block = Call::index(i) % blocks,
                                      rest = Call::index(i) / blocks;
                   attend(rest / p_.H, rest % p_.H, block * kBlock);
                 });
  }

  float* keys(std::int64_t b, std::int64_t g, std::int64_t tile) const {
    return keys_ + ((b * p_.G + g) * tiles_ + tile) * kTokens * p_.K;
  }

  float* values(std::int64_t b, std::int64_t g, std::int64_t tile) const {
    return values_ + ((b * p_.G + g) * tiles_ + tile) * kTokens * layout_.V;
  }

  // Keys and values of one group for one tile of tokens.
  void expand(std::int64_t b, std::int64_t g, std::int64_t index) const {
    const std::int64_t start = index * kTokens, n = least(kTokens, p_.S - start);
    Tile tile(p_, layout_, call_.key_terms(), first_ + b, kTokens, true,
              scratch(Purpose::kTask, Tile::room(p_, layout_, kTokens)));
    tile.move(start, n);
    const Target columns{keys(b, g, index), kTokens};
    if (call_.slim()) {
      const Rows rows = tile.positioned(g);
      for (std::int64_t s = 0; s < n; ++s)
        for (std::int64_t k = 0; k < p_.K; ++k) columns[k][s] = rows[s][k];
    } else {
      multiply_transposed(call_.key_weight(g), tile.latent(0), p_.K, n, layout_.D, columns);
    }
    const Target target{values(b, g, index), layout_.V};
    for (std::int64_t part = 0; part < p_.latent.groups; ++part)
      multiply(tile.latent(part), call_.value_weight(g, part * p_.latent.width), n, p_.latent.width,
               layout_.V, target, part > 0);
    if (p_.residual.width)
      multiply(tile.residual(), call_.value_weight(g, p_.latent.groups * p_.latent.width), n,
               p_.residual.width, layout_.V, target, true);
  }

  // One block of queries of one head.
  void attend(std::int64_t b, std::int64_t h, std::int64_t start) const {
    const std::int64_t g = h / p_.share(), count = least(kBlock, p_.T - start);
    float* room = scratch(Purpose::kTask, count * (layout_.K + layout_.V + kTokens) + kTokens);
    const Target queries{room, layout_.K};
    const Target sums{queries[count], layout_.V};
    const Target weights{sums[count], kTokens};
    float* bias_room = weights[count];
    call_.read_queries(first_ + b, h, start, count, queries.data);
    Running running[kBlock];
    for (Running& one : running) one = kNothingSeen;
    const Bias bias(p_, first_ + b);
    bool add = false;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      const std::int64_t s = tile * kTokens, n = least(kTokens, p_.S - s);
      if (all_hidden(bias, h, start, count, s, n, running, bias_room)) continue;
      multiply({queries.data, queries.stride}, {keys(b, g, tile), kTokens}, count, p_.K, padded(n),
               weights, false);
      for (std::int64_t i = 0; i < count; ++i) {
        const float* terms = bias.row(h, start + i, s, n, bias_room);
        const float scale = weigh(weights[i], n, terms, p_.softcap, running[i]);
        if (add && scale != 1) scale_row(sums[i], layout_.V, scale);
      }
      multiply({weights.data, weights.stride}, {values(b, g, tile), layout_.V}, count, n, layout_.V,
               sums, add);
      add = true;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      if (!add) std::memset(sums[i], 0, static_cast<std::size_t>(layout_.V) * sizeof(float));
      scale_row(sums[i], layout_.V, 1 / running[i].total);
      call_.write_output(first_ + b, h, start + i, sums[i], running[i]);
    }
  }

  bool all_hidden(const Bias& bias, std::int64_t h, std::int64_t start, std::int64_t count,
                  std::int64_t s, std::int64_t n, const Running* running, float* room) const {
    if (!p_.bias) return false;
    for (std::int64_t i = 0; i < count; ++i)
      if (!hidden(bias.row(h, start + i, s, n, room), n, running[i])) return false;
    return true;
  }

  const Call& call_;
  const Problem& p_;
  const Layout& layout_;
  std::int64_t first_, batch_, tiles_;
  float *keys_ = nullptr, *values_ = nullptr;
};

}  // namespace
}  // namespace onnx_tricks::cpu

// Weights absorbed: scores and sums of the latent itself, for few new tokens.
#pragma once

#include "call.h"

namespace onnx_tricks::cpu {
namespace {

// Some rows of the batch. Queries and sums of all heads are in the order [b, h, t].
//
// The tokens are divided into splits where the batch alone does not keep all threads busy, and the
// queries of a row of the batch into blocks where they and their sums are too many to stay near.
class Absorbed {
 public:
  static void run(const Call& call) {
    const Absorbed one(call, 0, 1);
    const std::int64_t step = call.portion(one.floats());
    for (std::int64_t b = 0; b < call.p.B; b += step)
      Absorbed(call, b, least(step, call.p.B - b)).run();
  }

 private:
  Absorbed(const Call& call, std::int64_t first, std::int64_t batch)
      : call_(call), p_(call.p), layout_(call.layout), first_(first), batch_(batch) {
    rows_ = p_.H * p_.T;
    width_ = call.slim() ? layout_.K : layout_.D;
    block_ = kTileFloats * 8 / (width_ + layout_.D) / kRows * kRows;
    block_ = least(rows_, block_ > kRows ? block_ : kRows);
    blocks_ = (rows_ + block_ - 1) / block_;
    // Two tasks a thread even out what else the processor does.
    const std::int64_t wanted = (2 * call.threads + p_.B * blocks_ - 1) / (p_.B * blocks_);
    const std::int64_t possible = (p_.S + 255) / 256;
    splits_ = call.threads > 1 ? least(wanted, possible) : 1;
    tokens_ = kTileFloats / layout_.D / 16 * 16;
    tokens_ = least(tokens_ < 16 ? 16 : tokens_, 128);
  }

  std::int64_t floats() const { return batch_ * rows_ * (width_ + splits_ * (layout_.D + 2)); }

  void run() {
    queries_ = scratch(Purpose::kShared, floats());
    sums_ = queries_ + batch_ * rows_ * width_;
    running_ = sums_ + splits_ * batch_ * rows_ * layout_.D;
    const auto rows = static_cast<double>(batch_ * rows_), D = static_cast<double>(p_.D);
    const std::int64_t step = portion();
    const std::int64_t portions = (batch_ + step - 1) / step;
    call_.divide(p_.G * portions, call_.slim() ? 0 : rows * static_cast<double>(p_.K) * D,
                 [&](std::size_t i) {
                   const std::int64_t g = Call::index(i) / portions;
                   const std::int64_t b = Call::index(i) % portions * step;
                   absorb(g, b, least(step, batch_ - b));
                 });
    if (blocks_ > 1) call_.append_all(first_, batch_);
    const double work = rows * static_cast<double>(p_.S) * (D + static_cast<double>(width_));
    call_.divide(batch_ * blocks_ * splits_, work, [&](std::size_t i) {
      const std::int64_t split = Call::index(i) % splits_, rest = Call::index(i) / splits_;
      attend(rest / blocks_, rest % blocks_ * block_, split);
    });
    call_.divide(p_.G * portions, rows * static_cast<double>(p_.V) * D, [&](std::size_t i) {
      const std::int64_t g = Call::index(i) / portions, b = Call::index(i) % portions * step;
      finish(g, b, least(step, batch_ - b));
    });
  }

  // Rows of the batch whose queries of one group make a good product.
  std::int64_t portion() const {
    const std::int64_t rows = 4 * kRows / (p_.share() * p_.T);
    return least(batch_, rows > 1 ? rows : 1);
  }

  // Rows [b, h, t] of one group over some rows of the batch, product by product: for each row of
  // the batch they are dense; a single one is as far from that of the next as all heads are wide.
  template <class Task>
  void each_product(std::int64_t g, std::int64_t b, std::int64_t batch, Task&& task) const {
    const std::int64_t dense = p_.share() * p_.T;
    if (dense == 1) return task(b * rows_ + g, batch, rows_, 0);
    for (std::int64_t i = 0; i < batch; ++i)
      task((b + i) * rows_ + g * dense, dense, std::int64_t{1}, i * dense);
  }

  float* sums(std::int64_t split, std::int64_t row) const {
    return sums_ + (split * batch_ * rows_ + row) * layout_.D;
  }

  Running& running(std::int64_t split, std::int64_t row) const {
    return reinterpret_cast<Running*>(running_)[split * batch_ * rows_ + row];
  }

  // Queries of one group as the scores need them.
  void absorb(std::int64_t g, std::int64_t b, std::int64_t batch) const {
    const std::int64_t share = p_.share(), count = batch * share * p_.T;
    float* room = call_.slim() ? nullptr : scratch(Purpose::kTask, count * layout_.K);
    for (std::int64_t i = 0; i < batch; ++i)
      for (std::int64_t n = 0; n < share; ++n) {
        const std::int64_t h = g * share + n;
        float* to = call_.slim() ? queries_ + ((b + i) * rows_ + h * p_.T) * width_
                                 : room + (i * share + n) * p_.T * layout_.K;
        call_.read_queries(first_ + b + i, h, 0, p_.T, to);
      }
    if (call_.slim()) return;
    each_product(g, b, batch,
                 [&](std::int64_t row, std::int64_t rows, std::int64_t stride, std::int64_t from) {
                   multiply({room + from * layout_.K, layout_.K}, call_.key_weight(g), rows, p_.K,
                            layout_.D, {queries_ + row * width_, stride * width_}, false);
                 });
  }

  // One block of queries of one row of the batch over one split of the tokens.
  void attend(std::int64_t b, std::int64_t start, std::int64_t split) const {
    const std::int64_t count = least(block_, rows_ - start), row = b * rows_ + start;
    const std::int64_t tile_room = Tile::room(p_, layout_, tokens_);
    float* room = scratch(Purpose::kTask, tile_room + (count + 1) * tokens_);
    const Target weights{room + tile_room, tokens_};
    float* bias_room = weights[count];
    const Target sums{this->sums(split, row), layout_.D};
    Running* running = &this->running(split, row);
    for (std::int64_t i = 0; i < count; ++i) running[i] = kNothingSeen;
    const Bias bias(p_, first_ + b);
    Tile tile(p_, layout_, call_.key_terms(), first_ + b, tokens_, blocks_ > 1, room);
    const std::int64_t tiles = (p_.S + tokens_ - 1) / tokens_;
    const std::int64_t end = least(p_.S, tiles * (split + 1) / splits_ * tokens_);
    bool add = false;
    for (std::int64_t s = tiles * split / splits_ * tokens_; s < end; s += tokens_) {
      const std::int64_t n = least(tokens_, end - s);
      if (blocks_ == 1) append_tile(b, s, s + n);
      if (all_hidden(bias, start, count, s, n, running, bias_room)) continue;
      tile.move(s, n, call_.slim() || !Tile::loadable(p_));
      score(tile, row, start, count, n, weights);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t h = (start + i) / p_.T, t = (start + i) % p_.T;
        const float* terms = bias.row(h, t, s, n, bias_room);
        const float scale = weigh(weights[i], n, terms, p_.softcap, running[i]);
        if (add && scale != 1) scale_row(sums[i], layout_.D, scale);
      }
      collect(tile, count, n, weights, sums, add);
      add = true;
    }
    if (!add)
      std::memset(sums.data, 0, static_cast<std::size_t>(count * layout_.D) * sizeof(float));
  }

  void append_tile(std::int64_t b, std::int64_t start, std::int64_t stop) const {
    for (std::int64_t g = 0; g < p_.latent.groups; ++g)
      append(p_, p_.latent, (first_ + b) * p_.latent.groups + g, start, stop);
    append(p_, p_.residual, first_ + b, start, stop);
  }

  bool all_hidden(const Bias& bias, std::int64_t start, std::int64_t count, std::int64_t s,
                  std::int64_t n, const Running* running, float* room) const {
    if (!p_.bias) return false;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t h = (start + i) / p_.T, t = (start + i) % p_.T;
      if (!hidden(bias.row(h, t, s, n, room), n, running[i])) return false;
    }
    return true;
  }

  void score(const Tile& tile, std::int64_t row, std::int64_t start, std::int64_t count,
             std::int64_t n, Target scores) const {
    const Rows queries{queries_ + row * width_, width_};
    if (!call_.slim())
      return tile.with_latent(0, [&](auto latent) {
        multiply_transposed(queries, latent, count, n, width_, scores, tile.ahead(p_.latent, 0, 0));
      });
    const std::int64_t dense = p_.share() * p_.T;
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t g = (start + i) / dense;
      const std::int64_t rows = least(count, (g + 1) * dense - start) - i;
      multiply_transposed({queries[i], width_}, tile.positioned(g), rows, n, width_,
                          {scores[i], scores.stride}, tile.ahead(p_.latent, g, 0));
      i += rows;
    }
  }

  void collect(const Tile& tile, std::int64_t count, std::int64_t n, Target weights, Target sums,
               bool add) const {
    const Rows given{weights.data, weights.stride};
    for (std::int64_t g = 0; g < p_.latent.groups; ++g) {
      tile.with_latent(g, [&](auto latent) {
        multiply(given, latent, count, n, layout_.latent, sums, add, tile.ahead(p_.latent, g, 1));
      });
      sums.data += layout_.latent;
    }
    multiply(given, tile.residual(), count, n, layout_.residual, sums, add);
  }

  // The sums of one group over all splits, times the value weight.
  void finish(std::int64_t g, std::int64_t b, std::int64_t batch) const {
    const std::int64_t share = p_.share(), dense = share * p_.T;
    float* room = scratch(Purpose::kTask, batch * dense * layout_.V);
    for (std::int64_t i = 0; i < batch * dense; ++i)
      combine((b + i / dense) * rows_ + g * dense + i % dense);
    each_product(g, b, batch,
                 [&](std::int64_t row, std::int64_t rows, std::int64_t stride, std::int64_t to) {
                   const Target target{room + to * layout_.V, layout_.V};
                   Rows parts{sums(0, row), stride * layout_.D};
                   bool add = false;
                   for (std::int64_t part = 0; part < p_.latent.groups; ++part) {
                     const std::int64_t width = p_.latent.width;
                     multiply(parts, call_.value_weight(g, part * width), rows, width, layout_.V,
                              target, add);
                     parts.data += layout_.latent;
                     add = true;
                   }
                   if (p_.residual.width)
                     multiply(parts, call_.value_weight(g, p_.latent.groups * p_.latent.width),
                              rows, p_.residual.width, layout_.V, target, add);
                 });
    for (std::int64_t i = 0; i < batch * dense; ++i) {
      const std::int64_t h = g * share + i % dense / p_.T;
      const Running& seen = running(0, (b + i / dense) * rows_ + g * dense + i % dense);
      float* row = room + i * layout_.V;
      scale_row(row, layout_.V, 1 / seen.total);
      call_.write_output(first_ + b + i / dense, h, i % p_.T, row, seen);
    }
  }

  // Adds the sums of all splits up, into those of the first.
  void combine(std::int64_t row) const {
    if (splits_ == 1) return;
    Running& whole = running(0, row);
    float most = whole.most;
    for (std::int64_t split = 1; split < splits_; ++split)
      most = running(split, row).most > most ? running(split, row).most : most;
    if (most == -kInfinity) return;
    float* to = sums(0, row);
    const float scale = exponential(all(whole.most - most))[0];
    if (scale != 1) scale_row(to, layout_.D, scale);
    whole = {most, whole.total * scale};
    for (std::int64_t split = 1; split < splits_; ++split) {
      const Running& part = running(split, row);
      const float* from = sums(split, row);
      const float factor = exponential(all(part.most - most))[0];
      whole.total += part.total * factor;
      for (std::int64_t i = 0; i < layout_.D; i += kLanes)
        store(to + i, load(to + i) + load(from + i) * all(factor));
    }
  }

  const Call& call_;
  const Problem& p_;
  const Layout& layout_;
  std::int64_t first_, batch_, rows_, width_, block_, blocks_, splits_, tokens_;
  float *queries_ = nullptr, *sums_ = nullptr, *running_ = nullptr;
};

}  // namespace
}  // namespace onnx_tricks::cpu

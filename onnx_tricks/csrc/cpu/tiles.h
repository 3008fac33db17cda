// The cached rows as floats, tile by tile.
#pragma once

#include "level.h"
#include "product.h"

namespace onnx_tricks::cpu {
namespace {

// Widths of rows in vectors' worth of floats. The latent of one token is the keys of all groups,
// each padded, then the residual; or one padded row of a layer's or an encoder's states.
struct Layout {
  explicit Layout(const Problem& p)
      : K(padded(p.K)),
        V(padded(p.V)),
        latent(padded(p.latent.width)),
        residual(padded(p.residual.width)),
        D(p.latent.groups * latent + residual) {}

  std::int64_t K, V, latent, residual, D;
};

inline const void* at(const void* data, Type type, std::int64_t element) {
  return static_cast<const char*>(data) + element * size_of(type);
}

inline void* at(void* data, Type type, std::int64_t element) {
  return static_cast<char*>(data) + element * size_of(type);
}

// Dense rows as floats with padding of zeros: where they lie if that is what they are.
struct FloatRows {
  const void* data;
  Type type;
  std::int64_t width;
  float* room;

  bool in_place() const { return type == Type::kFloat && padded(width) == width; }

  void read(std::int64_t rows) const {
    if (in_place()) return;
    const std::int64_t stride = padded(width);
    if (stride == width) return widen(data, type, room, rows * width);
    for (std::int64_t row = 0; row < rows; ++row) {
      float* to = room + row * stride;
      widen(at(data, type, row * width), type, to, width);
      for (std::int64_t i = width; i < stride; ++i) to[i] = 0;
    }
  }

  Rows rows() const { return {in_place() ? static_cast<const float*>(data) : room, padded(width)}; }
};

// What keys are put through beside their rotation: [G, K], padded; null where there is none.
struct KeyTerms {
  Rows bias, gain, shift;
};

// By what a norm shifts and multiplies.
struct Moments {
  float mean, scale;
};

// Copies past the processor's caches, which a copy of this size would only fill.
inline void stream(void* to, const void* from, std::int64_t bytes) {
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
#ifdef __AVX2__
  if (reinterpret_cast<std::uintptr_t>(target) % 32 == 0) {
    for (; bytes >= 32; bytes -= 32, target += 32, source += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
    _mm_sfence();
  }
#endif
  std::memcpy(target, source, static_cast<std::size_t>(bytes));
}

constexpr std::int64_t kStreamedBytes =
    2 << 20;  // of a state that no cache keeps until the next step

// Writes the rows [start, stop) of a present state: copies of the past's, or new ones.
inline void append(const Problem& p, const State& state, std::int64_t row, std::int64_t start,
                   std::int64_t stop) {
  if (p.kind == Operator::kCross || !state.width) return;
  const std::int64_t width = state.width;
  void* present = at(state.present, p.cache, row * state.present_length * width);
  const std::int64_t old = least(stop, p.P);
  if (start < old && !state.in_place()) {
    const void* past = at(state.past, p.cache, (row * state.past_length + start) * width);
    const std::int64_t bytes = width * size_of(p.cache);
    void* to = at(present, p.cache, start * width);
    if (p.B * state.groups * p.S * bytes > kStreamedBytes)
      stream(to, past, (old - start) * bytes);
    else
      std::memcpy(to, past, static_cast<std::size_t>((old - start) * bytes));
  }
  const std::int64_t first = start > p.P ? start : p.P;
  if (first >= stop) return;
  const std::int64_t count = (stop - first) * width;
  const void* fresh = at(state.fresh, p.type, (row * p.T + first - p.P) * width);
  void* to = at(present, p.cache, first * width);
  if (p.type == p.cache)
    std::memcpy(to, fresh, static_cast<std::size_t>(count * size_of(p.cache)));
  else
    narrow(static_cast<const float*>(fresh), p.cache, to, count);
}

// One tile of tokens of one row of the batch: [start, start + count).
class Tile {
 public:
  static std::int64_t room(const Problem& p, const Layout& layout, std::int64_t tokens) {
    const std::int64_t moments = p.normed() ? 2 : 0;
    return tokens * (layout.D + p.G * layout.K + 2 * padded(p.R / 2) + moments);
  }

  // `room` is for `room(p, layout, tokens)` floats. `appended` says whether the present states are
  // written already, and not tile by tile.
  Tile(const Problem& p, const Layout& layout, const KeyTerms& terms, std::int64_t b,
       std::int64_t tokens, bool appended, float* room)
      : p_(p),
        layout_(layout),
        terms_(terms),
        b_(b),
        tokens_(tokens),
        appended_(appended),
        room_(room) {}

  // Whether products can load the latent as it is cached, in half the memory of floats.
  static bool loadable(const Problem& p) {
    return kConverts && p.cache != Type::kFloat && padded(p.latent.width) == p.latent.width;
  }

  // Reads what is in another form than that of floats; the latent only if it is to be floats.
  void move(std::int64_t start, std::int64_t count, bool as_floats = true) {
    start_ = start;
    count_ = count;
    as_floats_ = as_floats;
    for (std::int64_t group = 0; as_floats && group < p_.latent.groups; ++group)
      part(p_.latent, group).read(count);
    if (p_.residual.width) part(p_.residual, 0).read(count);
    if (p_.key_norm == Norm::kHeads) measure(0, p_.G);
    if (!p_.R) return;
    angles(p_.cos, 0).read(count);
    angles(p_.sin, 1).read(count);
  }

  // [count, latent.width], as floats.
  Rows latent(std::int64_t group) const { return part(p_.latent, group).rows(); }

  // Calls task(rows) with the same, as floats or as it is cached.
  template <class Task>
  void with_latent(std::int64_t group, Task&& task) const {
    const FloatRows rows = part(p_.latent, group);
    if (as_floats_)
      task(rows.rows());
    else if (p_.cache == Type::kHalf)
      task(RowsOf<Half>{static_cast<const Half*>(rows.data), rows.width});
    else
      task(RowsOf<Brief>{static_cast<const Brief*>(rows.data), rows.width});
  }

  // [count, residual.width]
  Rows residual() const { return part(p_.residual, 0).rows(); }

  // Half of the memory that the tile behind this one is made of, for the prefetches of one product.
  Ahead ahead(const State& state, std::int64_t group, int half) const {
    const std::int64_t start = start_ + count_;
    const bool past = from_past(start);
    const std::int64_t count = least(tokens_, (past ? p_.P : p_.S) - start);
    if (count <= 0) return {};
    const std::int64_t length = past ? state.past_length : state.present_length;
    const std::int64_t row = (b_ * state.groups + group) * length + start;
    const void* from = at(past ? state.past : state.present, p_.cache, row * state.width);
    const std::int64_t bytes = (count * state.width * size_of(p_.cache) + 1) / 2;
    const char* middle = static_cast<const char*>(from) + bytes;
    return half ? Ahead{middle, middle + bytes} : Ahead{middle - bytes, middle};
  }

  // Keys as queries meet them, [count, K], from those that are cached.
  Rows positioned(std::int64_t group) const {
    const Rows keys = latent(group);
    const float* bias = of_group(terms_.bias, group);
    if (!bias && !p_.R && !p_.normed()) return keys;
    const std::int64_t half = p_.R / 2;
    const Rows cosines = angles(p_.cos, 0).rows(), sines = angles(p_.sin, 1).rows();
    const Target target{room_ + tokens_ * (layout_.D + group * layout_.K), layout_.K};
    if (p_.key_norm == Norm::kHead) measure(group, 1);
    for (std::int64_t s = 0; s < count_; ++s) {
      const float* key = keys[s];
      float* to = target[s];
      if (p_.normed()) {
        normalise(key, group, s, to);
        key = to;
      } else if (bias) {
        for (std::int64_t k = 0; k < layout_.K; k += kLanes)
          store(to + k, load(key + k) + load(bias + k));
        key = to;
      } else {
        for (std::int64_t k = p_.R / kLanes * kLanes; k < layout_.K; k += kLanes)
          store(to + k, load(key + k));
      }
      if (p_.interleaved)
        rotate_pairs(key, cosines[s], sines[s], half, to);
      else
        rotate_halves(key, cosines[s], sines[s], half, to);
    }
    return {target.data, target.stride};
  }

 private:
  // Whether rows are to be read from the past, of which the present is only being made a copy.
  bool from_past(std::int64_t stop) const {
    return !appended_ && p_.kind != Operator::kCross && stop <= p_.P;
  }

  FloatRows part(const State& state, std::int64_t group) const {
    const bool past = from_past(start_ + count_);
    const std::int64_t length = past ? state.past_length : state.present_length;
    const std::int64_t row = (b_ * state.groups + group) * length + start_;
    const std::int64_t before =
        &state == &p_.latent ? group * layout_.latent : p_.latent.groups * layout_.latent;
    return {at(past ? state.past : state.present, p_.cache, row * state.width), p_.cache,
            state.width, room_ + tokens_ * before};
  }

  FloatRows angles(const void* data, std::int64_t index) const {
    const std::int64_t half = p_.R / 2, offset = b_ * p_.angle_stride + start_ * half;
    float* room = room_ + tokens_ * (layout_.D + p_.G * layout_.K + index * padded(half));
    return {at(data, p_.type, offset), p_.type, half, room};
  }

  static const float* of_group(Rows rows, std::int64_t group) {
    return rows.data ? rows[group] : nullptr;
  }

  // What the keys of some groups of each token are normalised by.
  void measure(std::int64_t first, std::int64_t groups) const {
    Moments* const to = moments();
    const auto count = static_cast<float>(groups * p_.K);
    for (std::int64_t s = 0; s < count_; ++s) to[s] = {};
    if (p_.key_centered) {
      for (std::int64_t g = first; g < first + groups; ++g)
        add_up(g, &Moments::mean, [](float, auto x) { return x; });
      for (std::int64_t s = 0; s < count_; ++s) to[s].mean /= count;
    }
    for (std::int64_t g = first; g < first + groups; ++g)
      add_up(g, &Moments::scale, [](float mean, auto x) { return (x - mean) * (x - mean); });
    for (std::int64_t s = 0; s < count_; ++s)
      to[s].scale = 1 / __builtin_sqrtf(to[s].scale / count + p_.key_epsilon);
  }

  // Adds term(mean, x) over the channels of one group to what is known of each token.
  template <class Term>
  void add_up(std::int64_t group, float Moments::* to, Term&& term) const {
    const Rows keys = latent(group);
    const float* bias = of_group(terms_.bias, group);
    for (std::int64_t s = 0; s < count_; ++s) {
      const float* key = keys[s];
      const float mean = moments()[s].mean;
      Vector parts = {};
      std::int64_t k = 0;
      for (; k + kLanes <= p_.K; k += kLanes)
        parts += term(mean, bias ? load(key + k) + load(bias + k) : load(key + k));
      float total = sum(parts);
      for (; k < p_.K; ++k) total += term(mean, bias ? key[k] + bias[k] : key[k]);
      moments()[s].*to += total;
    }
  }

  Moments* moments() const {
    const std::int64_t before = layout_.D + p_.G * layout_.K + 2 * padded(p_.R / 2);
    return reinterpret_cast<Moments*>(room_ + tokens_ * before);
  }

  // A key with its bias, normalised, times the gain and shifted.
  void normalise(const float* key, std::int64_t group, std::int64_t s, float* to) const {
    const Moments of = moments()[s];
    const float* bias = of_group(terms_.bias, group);
    const float* gain = of_group(terms_.gain, group);
    const float* shift = of_group(terms_.shift, group);
    for (std::int64_t k = 0; k < layout_.K; k += kLanes) {
      Vector x = bias ? load(key + k) + load(bias + k) : load(key + k);
      x = (x - of.mean) * of.scale;
      if (gain) x *= load(gain + k);
      store(to + k, shift ? x + load(shift + k) : x);
    }
  }

  static void rotate_pairs(const float* key, const float* cos, const float* sin, std::int64_t half,
                           float* to) {
    for (std::int64_t i = 0; i < half; ++i) {
      const float x = key[2 * i], y = key[2 * i + 1];
      to[2 * i] = x * cos[i] - y * sin[i];
      to[2 * i + 1] = y * cos[i] + x * sin[i];
    }
  }

  static void rotate_halves(const float* key, const float* cos, const float* sin, std::int64_t half,
                            float* to) {
    std::int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const Vector x = load(key + i), y = load(key + half + i);
      const Vector c = load(cos + i), n = load(sin + i);
      store(to + i, x * c - y * n);
      store(to + half + i, y * c + x * n);
    }
    for (; i < half; ++i) {
      const float x = key[i], y = key[half + i];
      to[i] = x * cos[i] - y * sin[i];
      to[half + i] = y * cos[i] + x * sin[i];
    }
  }

  const Problem& p_;
  const Layout& layout_;
  const KeyTerms& terms_;
  std::int64_t b_, tokens_;
  bool appended_, as_floats_ = true;
  float* room_;
  std::int64_t start_ = 0, count_ = 0;
};

}  // namespace
}  // namespace onnx_tricks::cpu

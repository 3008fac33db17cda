// How a problem is computed, and where in the scratch memory its parts lie.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "collect.cuh"
#include "product.cuh"
#include "prompt.cuh"
#include "rows.cuh"

namespace onnx_tricks::cuda {

#ifndef ONNX_TRICKS_SCRATCH_FLOATS
#define ONNX_TRICKS_SCRATCH_FLOATS (1 << 26)  // more only where one row needs it
#endif

// Products of one task keep all processors busy only where there are many.
inline std::int64_t parts_for(const Device& device, std::int64_t blocks, std::int64_t depth) {
  const std::int64_t wanted = 2 * device.processors / std::max<std::int64_t>(blocks, 1);
  return std::max<std::int64_t>(1, std::min({wanted, depth / 256, std::int64_t{64}}));
}

// What computes the sums of the latent, or, where it is expanded, those of values (not in clusters).
// The environment variable ONNX_TRICKS_CUDA holds back what is
// faster than it says, to compare them: "plain" or "tensor".
enum class Path { kPlain, kTensor, kCluster };

inline bool allowed(Path path) {
  const char* most = std::getenv("ONNX_TRICKS_CUDA");
  if (!most) return true;
  return std::strcmp(most, "plain") != 0 && (path == Path::kTensor || std::strcmp(most, "tensor") != 0);
}

// Whether the latent can be read 16 bytes at a time, and multiplied as numbers of 16 bits.
inline bool fits_collect(const Problem& p) {
  if (p.cache == Type::kFloat) return false;
  const auto places = reinterpret_cast<std::uintptr_t>(p.latent.present) |
                      reinterpret_cast<std::uintptr_t>(p.residual.present) |
                      reinterpret_cast<std::uintptr_t>(p.cos) | reinterpret_cast<std::uintptr_t>(p.sin);
  if (places % 16) return false;
  if (p.kind != Operator::kSlim) return p.D % 32 == 0;
  return p.K % kPiece == 0 && p.residual.width % kPiece == 0 && p.R / 2 % kPiece == 0;
}

// The same of weights, keys and values.
inline bool fits_prompt(const Problem& p) {
  if (p.type == Type::kFloat || p.type != p.cache || std::max(p.K, p.V) > kMostWidth) return false;
  std::uintptr_t places = 0;
  for (const void* place : {static_cast<const void*>(p.latent.present), static_cast<const void*>(p.residual.present),
                            p.query, p.key_weight, p.value_weight})
    places |= reinterpret_cast<std::uintptr_t>(place);
  return places % 16 == 0 && (p.K | p.V | p.D) % kPiece == 0;
}

// Spreads the columns over blocks. False if they are too many.
inline bool divide(const Device& device, Collect& c) {
  const int unit = c.slim() ? kPiece : 32, most = c.together ? 8 : 1 << 12;
  const int pieces = kMostPieces[c.together] * kWarps;
  const auto round_up = [](std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); };
  for (c.blocks = 1; c.blocks <= most; c.blocks *= 2) {
    c.groups_each = c.slim() ? round_up(c.p.G, c.blocks) : 0;
    c.tail_each = round_up(round_up(c.tail.width, c.blocks), unit) * unit;
    if (c.columns_each() <= pieces * kPiece && Room(c).size <= device.shared_memory) return true;
  }
  return false;
}

struct Plan {
  // Whether keys and values are made whole, which is less work for many new tokens; else the
  // weights are absorbed, and the cache is read as it is.
  bool expand = false;
  Path path = Path::kPlain;
  Collect collect;  // but for what depends on a chunk; in use unless the path is plain or expands
  Chunk chunk;      // the largest
  std::int64_t sum_parts = 1, output_parts = 1;

  float *queries = nullptr, *scores = nullptr;
  float *keys = nullptr, *values = nullptr;  // numbers of 16 bits for prompts
  float* moments = nullptr;  // of keys, but for those that clusters read
  float *totals = nullptr, *sums = nullptr, *seen = nullptr, *outputs = nullptr;
  std::int64_t floats = 0, whole = 0;  // of all these, and of expanded keys and values alone

  // Whether the kernel of prompt.cuh does all that follows the expansion.
  bool prompt() const { return expand && path == Path::kTensor; }

  Plan(const Problem& p, const Device& device, void* scratch) {
    if (p.empty()) return;
    expand = work_expanded(p) < work_absorbed(p);
    chunk = {0, p.B, 0, p.T};
    choose_path(p, device);
    for (lay_out(p, device, scratch); floats > ONNX_TRICKS_SCRATCH_FLOATS; lay_out(p, device, scratch)) {
      std::int64_t& most = chunk.batch > 1 ? chunk.batch : chunk.tokens;
      // What is expanded of one row of the batch does not get smaller with fewer of its queries.
      if (most == 1 || (chunk.batch == 1 && floats - whole <= ONNX_TRICKS_SCRATCH_FLOATS)) break;
      most = (most + 1) / 2;
    }
  }

 private:
  static double work_absorbed(const Problem& p) {
    const auto D = double(p.D), K = double(p.K), S = double(p.S);
    const bool slim = p.kind == Operator::kSlim;
    return double(p.H * p.T) * (S * D + D * double(p.V) + (slim ? S * K : S * D + D * K));
  }

  static double work_expanded(const Problem& p) {
    const auto D = double(p.D), K = double(p.K), V = double(p.V), S = double(p.S);
    const bool slim = p.kind == Operator::kSlim;
    return double(p.G) * S * D * (slim ? V : V + K) + double(p.H * p.T) * S * (K + V);
  }

  void choose_path(const Problem& p, const Device& device) {
    if (expand && fits_prompt(p) && device.capability >= 80 && allowed(Path::kTensor)) path = Path::kTensor;
    if (expand || !fits_collect(p)) return;
    for (const Path faster : {Path::kCluster, Path::kTensor}) {
      if (device.capability < (faster == Path::kCluster ? 90 : 80) || !allowed(faster)) continue;
      collect = {p, chunk, p.kind == Operator::kSlim ? p.residual : p.latent};
      collect.together = faster == Path::kCluster;
      if (!divide(device, collect)) continue;
      path = faster;
      return;
    }
  }

  // One block of a cluster fills a processor; two of the others.
  int splits(const Device& device) const {
    const std::int64_t tasks = collect.blocks * collect.row_blocks() * chunk.batch;
    const std::int64_t wanted = (path == Path::kCluster ? 1 : 2) * device.processors / tasks;
    return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>({wanted, collect.tiles(), 64})));
  }

  void lay_out(const Problem& p, const Device& device, void* scratch) {
    const std::int64_t rows = chunk.rows(p), flat = rows <= kFewRows ? 8 : 64;
    const bool slim = p.kind == Operator::kSlim;
    floats = 0;
    const auto take = [&](std::int64_t count) {
      float* const place = static_cast<float*>(scratch) + (scratch ? floats : 0);
      floats += (count + 3) / 4 * 4;
      return place;
    };
    if (expand) {
      const std::int64_t lines = chunk.batch * p.G * p.S, each = prompt() ? 2 : 1;
      sum_parts = 0;
      output_parts = prompt() ? 0 : parts_for(device, rows / flat * ((p.V + 63) / 64), p.S);
      keys = take(lines * p.K / each);
      values = take(lines * p.V / each);
      whole = floats;
    } else {
      const std::int64_t high = (p.H * chunk.tokens + flat - 1) / flat;
      sum_parts = parts_for(device, chunk.batch * high * ((p.D + 63) / 64), p.S);
      output_parts = parts_for(device, p.G * ((rows / p.G + 63) / 64) * ((p.V + 63) / 64), p.D);
      queries = take(slim ? 0 : rows * p.D);
      collect.chunk = chunk;
      if (path != Path::kPlain) sum_parts = collect.splits = splits(device);
    }
    moments = take(p.normed() && path != Path::kCluster ? 2 * p.B * p.norms() * p.S : 0);
    scores = take(path == Path::kCluster || prompt() ? 0 : rows * p.S);
    seen = take(path == Path::kCluster ? 2 * sum_parts * rows : 0);
    totals = take(prompt() ? 0 : rows);
    sums = take(sum_parts * rows * p.D);
    outputs = take(output_parts * rows * p.V);
  }
};

}  // namespace onnx_tricks::cuda

// Attention of many queries in 16 bits, over keys and values that expand.cuh made whole.
//
// A block has 128 queries of one group, 16 for each warp, and goes through the tokens tile by tile;
// scores, weights and sums stay in registers. Keys of a tile are on their way while the values of
// the last are multiplied, and the other way round.
#pragma once

#include "expand.cuh"

namespace onnx_tricks::cuda {

constexpr int kPromptRows = 16 * kWarps;
constexpr int kMostWidth = 256;  // of keys and of values

// What a block of keys and values of at most `kWidth` channels has in shared memory: tiles whose
// rows begin in different banks, with zeros in the place of channels that there are not.
template <int kWidth>
struct PromptRoom {
  // Queries of 128 channels stay in registers, beside the sums.
  static constexpr bool kHeld = kWidth <= 128;
  static constexpr int kTokens = kHeld ? 64 : 32, kStride = kWidth + kPiece;
  static constexpr int kSize = 2 * kStride * (2 * kTokens + (kHeld ? 0 : kPromptRows));
};

struct Prompt {
  Problem p;
  Chunk chunk;         // all new tokens of some rows of the batch
  const void* keys;    // [b, g, S, K]
  const void* values;  // [b, g, S, V]

  __host__ __device__ std::int64_t group_rows() const { return p.share() * p.T; }
  __host__ __device__ std::int64_t row_blocks() const { return (group_rows() + kPromptRows - 1) / kPromptRows; }
  std::int64_t blocks() const { return chunk.batch * p.G * row_blocks(); }
};

template <class T, int kWidth>
class Prompter {
 public:
  __device__ explicit Prompter(const Prompt& c)
      : c_(c), p_(c.p), thread_(static_cast<int>(threadIdx.x)), lane_(thread_ % 32) {
    const std::int64_t z = blockIdx.x / c.row_blocks();
    b_ = c.chunk.first + z / p_.G;
    group_ = z % p_.G;
    const std::int64_t row_of_warp = blockIdx.x % c.row_blocks() * kPromptRows + thread_ / 32 * 16;
    first_row_ = row_of_warp + lane_ / 4;
    keys_ = static_cast<const T*>(c.keys) + z * p_.S * p_.K;
    values_ = static_cast<const T*>(c.values) + z * p_.S * p_.V;
    key_tile_ = reinterpret_cast<T*>(shared_memory());
    value_tile_ = key_tile_ + kTokens * kStride;
    bias_ahead_ = bias_of(row_of_warp + lane_ / 2);
    query_tile_ = value_tile_ + kTokens * kStride + thread_ / 32 * 16 * kStride;
  }

  __device__ void run() {
    prepare();
    load(key_tile_, keys_, p_.K, 0);
    for (std::int64_t start = 0; start < p_.S; start += kTokens) {
      wait_for_copies<0>();
      __syncthreads();  // keys are there, and nobody reads the values before them any more
      load(value_tile_, values_, p_.V, start);
      const bool seen = bias(start);
      prefetch_bias(start + kTokens);
      if (seen) score();
      const bool weighty = seen && weigh();
      wait_for_copies<0>();
      __syncthreads();  // values are there, and nobody reads the keys any more
      if (start + kTokens < p_.S) load(key_tile_, keys_, p_.K, start + kTokens);
      if (weighty) gather();
    }
    finish();
  }

 private:
  using Room = PromptRoom<kWidth>;
  static constexpr bool kHeld = Room::kHeld;
  static constexpr int kTokens = Room::kTokens, kStride = Room::kStride;

  __device__ std::int64_t row(int half) const { return first_row_ + 8 * half; }
  __device__ bool exists(int half) const { return row(half) < c_.group_rows(); }
  __device__ std::int64_t head(std::int64_t row) const { return group_ * p_.share() + row / p_.T; }

  // Null where there is none.
  __device__ const T* bias_of(std::int64_t row) const {
    if (!p_.bias || row >= c_.group_rows()) return nullptr;
    return static_cast<const T*>(p_.bias) + b_ * p_.bias_strides[0] + head(row) * p_.bias_strides[1] +
           row % p_.T * p_.bias_strides[2];
  }

  __device__ void prepare() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = exists(half) ? this->row(half) : 0;
      const std::int64_t line = (b_ * p_.H + head(row)) * p_.T + row % p_.T;
      const T* const query = static_cast<const T*>(p_.query) + line * p_.K;
#pragma unroll
      for (int k = 0; k < kWidth / 8; ++k) {
        const int column = k * 8 + lane_ % 4 * 2;
        const std::uint32_t two = exists(half) && column < p_.K
                                      ? *reinterpret_cast<const std::uint32_t*>(query + column) : 0;
        if constexpr (kHeld) queries_[k / 2][k % 2 * 2 + half] = two;
        else *reinterpret_cast<std::uint32_t*>(query_tile_ + (lane_ / 4 + half * 8) * kStride + column) = two;
      }
      biases_[half] = bias_of(this->row(half));
    }
  }

  // Zeros beyond the last token and the last column.
  __device__ void load(T* tile, const T* from, std::int64_t width, std::int64_t start) const {
    constexpr int kPieces = kWidth / kPiece;
#pragma unroll
    for (int i = thread_; i < kTokens * kPieces; i += kThreads) {
      const int token = i / kPieces, column = i % kPieces * kPiece;
      const bool exists = start + token < p_.S && column < width;
      copy_async(tile + token * kStride + column, exists ? from + (start + token) * width + column : from, exists);
    }
    commit_copies();
  }

  // Scores begin with the bias. False if this warp's queries see none of the tokens.
  __device__ bool bias(std::int64_t start) {
    float most = -INFINITY;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t s = start + j * 8 + lane_ % 4 * 2 + i % 2;
        const T* const biases = biases_[i / 2];
        float one = s < p_.S && exists(i / 2) ? 0 : -INFINITY;
        if (one == 0 && biases) one = widen(biases[s * p_.bias_strides[3]]);
        scores_[j][i] = one;
        // What is no number has to be seen, too.
        if (!(one <= most)) most = one == one ? one : INFINITY;
      }
    return most_of_warp(most) != -INFINITY;
  }

  // Every lane has the first or the last token of one of the warp's rows.
  __device__ void prefetch_bias(std::int64_t start) const {
    const std::int64_t s = start + (lane_ % 2 ? kTokens - 1 : 0);
    if (bias_ahead_ && s < p_.S) prefetch(bias_ahead_ + s * p_.bias_strides[3]);
  }

  __device__ void score() {
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      float sums[2][4] = {};
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) {
        std::uint32_t query[4], keys[4];
        if constexpr (!kHeld)
          load_left(query, query_tile_, kStride, 0, k * 16);
        load_pair<true>(keys, key_tile_, kStride, k * 16, j * 8);
#pragma unroll
        for (int n = 0; n < 2; ++n)
          multiply<T>(sums[n], kHeld ? queries_[k] : query, keys[2 * n], keys[2 * n + 1]);
      }
#pragma unroll
      for (auto& four : sums)
#pragma unroll
        for (float& sum : four) sum *= p_.scale;
      if (p_.softcap != 0) soften(sums);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[j + n][i] += sums[n][i];
    }
  }

  // tanhf would be exact for small scores, too, and take far more code.
  __device__ void soften(float (&scores)[2][4]) const {
#pragma unroll
    for (auto& four : scores)
#pragma unroll
      for (float& score : four) score = p_.softcap * (1 - 2 / (expf(score / p_.softcap * 2) + 1));
  }

  // Scores become weights, relative to the greatest score so far. False if all are zero.
  __device__ bool weigh() {
    bool some = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = most_[half];
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) most = fmaxf(most, fmaxf(scores_[j][2 * half], scores_[j][2 * half + 1]));
      for (int step = 1; step < 4; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
      const float base = most == -INFINITY ? 0 : most, scale = expf(most_[half] - base);
      most_[half] = most;
      totals_[half] *= scale;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float weight = expf(scores_[j][i] - base);
          scores_[j][i] = weight;
          totals_[half] += weight;
          some |= weight != 0;
        }
#pragma unroll
      for (auto& sums : sums_) {
        sums[2 * half] *= scale;
        sums[2 * half + 1] *= scale;
      }
    }
    return most_of_warp(some) != 0;
  }

  __device__ void gather() {
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      const std::uint32_t weights[4] = {
          pack<T>(scores_[j][0], scores_[j][1]), pack<T>(scores_[j][2], scores_[j][3]),
          pack<T>(scores_[j + 1][0], scores_[j + 1][1]), pack<T>(scores_[j + 1][2], scores_[j + 1][3])};
#pragma unroll
      for (int v = 0; v < kWidth / 16; ++v) {
        std::uint32_t values[4];
        load_pair<false>(values, value_tile_, kStride, j * 8, v * 16);
#pragma unroll
        for (int n = 0; n < 2; ++n)
          multiply<T>(sums_[2 * v + n], weights, values[2 * n], values[2 * n + 1]);
      }
    }
  }

  __device__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = totals_[half];
      for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
      if (!exists(half)) continue;
      if (!(total > 0)) total = total_of_nothing(p_, total);
      const std::int64_t h = head(row(half)), t = row(half) % p_.T;
      const T* const biases = p_.value_bias ? static_cast<const T*>(p_.value_bias) + h * p_.V : nullptr;
      T* const output = static_cast<T*>(p_.output) + ((b_ * p_.T + t) * p_.H + h) * p_.V;
#pragma unroll
      for (int v = 0; v < kWidth / 8; ++v) {
        const int column = v * 8 + lane_ % 4 * 2;
        if (column >= p_.V) break;
        float two[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          two[i] = finish_sum(p_, sums_[v][2 * half + i], total, biases ? widen(biases[column + i]) : 0);
        *reinterpret_cast<std::uint32_t*>(output + column) = pack<T>(two[0], two[1]);
      }
    }
  }

  const Prompt& c_;
  const Problem& p_;
  const int thread_, lane_;
  std::int64_t b_, group_, first_row_;  // the rows of this thread: that, and the eighth behind it
  const T *keys_, *values_;
  T *key_tile_, *value_tile_, *query_tile_;  // the last of this warp
  const T *biases_[2], *bias_ahead_;
  std::uint32_t queries_[kHeld ? kWidth / 16 : 1][4];
  float scores_[kTokens / 8][4];
  float most_[2] = {-INFINITY, -INFINITY}, totals_[2] = {};
  float sums_[kWidth / 8][4] = {};
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) attend_prompt(const __grid_constant__ Prompt c) {
  Prompter<T, kWidth>(c).run();
}

template <class T>
const char* launch_prompt(const Prompt& c, void* stream) {
  const auto run = [&](auto* kernel, std::size_t memory) {
    return launch(kernel, c.blocks(), kThreads, memory, 1, stream, c);
  };
  const std::int64_t width = std::max(c.p.K, c.p.V);
  if (width <= 64) return run(attend_prompt<T, 64>, PromptRoom<64>::kSize);
  if (width <= 96) return run(attend_prompt<T, 96>, PromptRoom<96>::kSize);
  if (width <= 128) return run(attend_prompt<T, 128>, PromptRoom<128>::kSize);
  return run(attend_prompt<T, kMostWidth>, PromptRoom<kMostWidth>::kSize);
}

}  // namespace onnx_tricks::cuda

// Sums of the latent by tensor cores: for few queries and caches of 16 bits.
//
// Every block has some columns of the latent (whole keys, and a part of what follows them) and goes
// through a split of the tokens, tile by tile; up to 32 queries' sums of these columns stay in
// registers. Weights come from a softmax that was computed before, so that the keys are read
// twice; or the blocks of a cluster, which have all columns between them, compute them together and
// read everything once:
//
//   1. Each scores its own columns: all that a query of its keys needs, or a part of each score of
//      hidden states, which goes to the one block that owns the query.
//   2. The owner of a query turns the scores of a tile into weights, relative to the greatest score
//      so far, and writes them to all blocks, with the factor by which old sums shrink.
//   3. Each multiplies the weights of all queries with its columns.
//
// Weights of fp32 models are multiplied as two numbers of 16 bits each.
#pragma once

#include "score.cuh"

namespace onnx_tricks::cuda {

template <class T, bool kTogether>
class Collector {
 public:
  __device__ explicit Collector(const Collect& c)
      : c_(c), room_(c), memory_(shared_memory()), thread_(static_cast<int>(threadIdx.x)) {
    lane_ = thread_ % 32;
    warp_ = thread_ / 32;
    unsigned id = blockIdx.x;
    rank_ = static_cast<int>(id % c.blocks);
    id /= c.blocks;
    first_row_ = static_cast<int>(id % c.row_blocks()) * kBlockRows;
    id /= c.row_blocks();
    split_ = static_cast<int>(id % c.splits);
    row_of_batch_ = static_cast<int>(id / c.splits);
    b_ = c.chunk.first + row_of_batch_;
    rows_ = min(kBlockRows, c.rows() - first_row_);
    first_group_ = min(rank_ * c.groups_each, static_cast<int>(c.p.G));
    const int groups = min(c.groups_each, static_cast<int>(c.p.G) - first_group_);
    keys_ = c.slim() ? groups * static_cast<int>(c.p.K) : 0;
    first_tail_ = min(rank_ * c.tail_each, static_cast<int>(c.tail.width));
    columns_ = keys_ + min(c.tail_each, static_cast<int>(c.tail.width) - first_tail_);
    own(groups);
  }

  __device__ void run() {
    const auto tiles = static_cast<std::int64_t>(c_.tiles());
    const int first = static_cast<int>(tiles * split_ / c_.splits);
    const int last = static_cast<int>(tiles * (split_ + 1) / c_.splits);
    prepare();
    if (first < last) start_to_load(first, 0);
    commit_copies();
    if constexpr (kTogether) sync_cluster();
    else fetch_weights(first);
    for (int tile = first; tile < last; ++tile) {
      const int stage = (tile - first) % 2;
      if (tile + 1 < last) start_to_load(tile + 1, 1 - stage);
      commit_copies();
      if constexpr (kTogether) fetch_biases(tile);
      wait_for_copies<1>();
      __syncthreads();
      if constexpr (kTogether) {
        if (c_.slim()) {
          if (c_.p.normed()) measure_keys(stage);
          score_keys(stage);
          __syncthreads();
        } else {
          score_states(stage);
          sync_cluster();
        }
        weigh(tile, stage);
        // Weights come from all; those of the tile before last are no longer read by any.
        sync_cluster();
        shrink(stage);
      } else {
        store_weights(stage);
        __syncthreads();
        fetch_weights(tile + 1);
      }
      gather(stage);
      __syncthreads();
    }
    finish();
  }

 private:
  template <class U>
  __device__ U* at(int bytes) const {
    return reinterpret_cast<U*>(memory_ + bytes);
  }

  __device__ T* tile(int stage, int token) const {
    return at<T>(room_.tiles) + (stage * kTile + token) * room_.stride;
  }

  __device__ char* angles(int stage, int token, bool sine) const {
    return memory_ + room_.angles + ((stage * 2 + sine) * kTile + token) * room_.angle_bytes;
  }

  __device__ T* weights(int stage, int part, int row) const {
    return at<T>(room_.weights) + ((stage * c_.parts() + part) * kBlockRows + row) * kWeightStride;
  }

  __device__ T* absorbed(int part, int row) const {
    return at<T>(room_.queries) + (part * kBlockRows + row) * room_.stride;
  }

  // Which queries this block turns into weights: those of its keys, or an equal share.
  __device__ void own(int groups) {
    const int each = c_.slim() ? c_.share() * static_cast<int>(c_.chunk.tokens) : kBlockRows / c_.blocks;
    const int start = c_.slim() ? first_group_ * each - first_row_ : rank_ * each;
    const int stop = start + (c_.slim() ? groups : 1) * each;
    first_own_ = max(0, min(start, rows_));
    own_ = max(0, min(stop, rows_)) - first_own_;
  }

  __device__ void prepare() {
    for (int i = thread_; i < 2 * c_.parts() * kBlockRows * kWeightStride; i += kThreads)
      at<T>(room_.weights)[i] = narrow<T>(0);
    if constexpr (kTogether) {
      for (int i = thread_; i < kBlockRows; i += kThreads) {
        at<float2>(room_.running)[i] = float2{-INFINITY, 0};
        at<float>(room_.scales)[i] = at<float>(room_.scales)[kBlockRows + i] = 1;
      }
      c_.slim() ? load_queries() : load_absorbed();
    }
  }

  __device__ void load_queries() {
    const auto K = static_cast<int>(c_.p.K);
    for (int i = thread_; i < own_ * K; i += kThreads) {
      const std::int64_t row = first_row_ + first_own_ + i / K;
      const std::int64_t h = row / c_.chunk.tokens, t = c_.chunk.start + row % c_.chunk.tokens;
      at<float>(room_.queries)[i] =
          Numbers{c_.p.query, c_.p.type}[((b_ * c_.p.H + h) * c_.p.T + t) * K + i % K];
    }
    float* to = at<float>(room_.terms);
    for (const void* term : {c_.p.key_bias, c_.p.key_gain, c_.p.key_shift}) {
      if (!term) continue;
      for (int i = thread_; i < keys_; i += kThreads)
        to[i] = Numbers{term, c_.p.type}[first_group_ * K + i];
      to += c_.keys_each();
    }
  }

  // Of the keys in the columns from here on.
  __device__ KeyTerms terms(int column) const {
    const float* next = at<float>(room_.terms) + column;
    const auto take = [&](const void* term) {
      const float* const place = term ? next : nullptr;
      if (term) next += c_.keys_each();
      return place;
    };
    KeyTerms found;
    found.bias = take(c_.p.key_bias);
    found.gain = take(c_.p.key_gain);
    found.shift = take(c_.p.key_shift);
    return found;
  }

  // Absorbed queries relative to the greatest number of each, which may be any.
  __device__ void load_absorbed() {
    for (int row = warp_; row < kBlockRows; row += kWarps) {
      const std::int64_t place = std::int64_t{row_of_batch_} * c_.rows() + first_row_ + row;
      const float* query = c_.queries + place * c_.p.D + first_tail_;
      float most = 0;
      if (row < rows_)
        for (int i = lane_; i < columns_; i += 32) most = fmaxf(most, fabsf(query[i]));
      most = most_of_warp(most);
      if (most == 0) most = 1;
      if (lane_ == 0) at<float>(room_.scales)[2 * kBlockRows + row] = most;
      for (int i = lane_; i < columns_; i += 32)
        store(absorbed(0, row) + i, row < rows_ ? query[i] / most : 0, kBlockRows * room_.stride);
    }
  }

  // A number as one of 16 bits, or as the sum of two, `apart` from each other.
  __device__ void store(T* to, float value, int apart) const {
    const T near = narrow<T>(value);
    *to = near;
    if (c_.parts() == 2) to[apart] = narrow<T>(value - widen(near));
  }

  __device__ void start_to_load(int tile, int stage) {
    const std::int64_t start = std::int64_t{tile} * kTile;
    for (int column = lane_ * kPiece; column < columns_; column += 32 * kPiece) {
      const bool key = column < keys_;
      const State& state = key ? c_.p.latent : c_.tail;
      const auto width = static_cast<int>(state.width);
      const std::int64_t group = key ? b_ * c_.p.G + first_group_ + column / width : b_;
      const int channel = key ? column % width : first_tail_ + column - keys_;
      const auto* from = static_cast<const T*>(state.present) +
                         (group * state.present_length + start) * width + channel;
      load_rows(from, width, this->tile(stage, 0) + column, room_.stride, start);
    }
    if (!kTogether || !c_.p.R || !own_) return;
    const int half = static_cast<int>(c_.p.R / 2), each = 16 / c_.angle_size();
    for (int i = lane_; i < 2 * half / each; i += 32) {
      const bool sine = i >= half / each;
      const int bytes = (sine ? i - half / each : i) * 16;
      const std::int64_t place = (b_ * c_.p.angle_stride + start * half) * (16 / each);
      const auto* from = static_cast<const char*>(sine ? c_.p.sin : c_.p.cos) + place + bytes;
      load_rows(from, half * (16 / each), angles(stage, 0, sine) + bytes, room_.angle_bytes, start);
    }
  }

  // 16 bytes of every row of a tile; strides are those of the pointers.
  template <class U>
  __device__ void load_rows(const U* from, int from_stride, U* to, int to_stride, std::int64_t start) {
    for (int token = warp_; token < kTile; token += kWarps) {
      const bool exists = start + token < c_.p.S;
      copy_async(to + token * to_stride, exists ? from + std::int64_t{token} * from_stride : from, exists);
    }
  }

  // What the keys of a tile are normalised by: for each head and token, or for each token in the
  // place of the first head.
  __device__ void measure_keys(int stage) {
    const auto K = static_cast<int>(c_.p.K);
    const bool shared = c_.p.key_norm == Norm::kHeads;
    auto* moments = at<float2>(room_.moments);
    for (int i = thread_; i < keys_ / K * kTile; i += kThreads) {
      const int column = i / kTile * K;
      const float2 of = measure(tile(stage, i % kTile) + column, terms(column).bias);
      moments[i] = shared ? of : float2{of.x, scale_for(c_.p, of.y, static_cast<float>(K))};
    }
    __syncthreads();
    if (!shared) return;
    auto* parts = at<float2>(room_.parts);
    if (thread_ < kTile) {
      const float2 own = join(moments, keys_ / K, [&](int) { return K; });
      for (int i = 0; i < c_.blocks; ++i) of_block(parts, i)[rank_ * kTile + thread_] = own;
    }
    sync_cluster();
    if (thread_ < kTile) {
      const auto keys_of = [&](int block) {
        const int first = min(block * c_.groups_each, static_cast<int>(c_.p.G));
        return min(c_.groups_each, static_cast<int>(c_.p.G) - first) * K;
      };
      const float2 all = join(parts, c_.blocks, keys_of);
      moments[thread_] = float2{all.x, scale_for(c_.p, all.y, static_cast<float>(c_.p.G * K))};
    }
    __syncthreads();
  }

  // The mean of one key's channels, zero where it stays, and the sum of squares about it.
  __device__ float2 measure(const T* key, const float* bias) const {
    const auto K = static_cast<int>(c_.p.K);
    float eight[kPiece], mean = 0, squares = 0;
    for (int channel = 0; c_.p.key_centered && channel < K; channel += kPiece) {
      read_key(key, bias, channel, eight);
#pragma unroll
      for (const float one : eight) mean += one / static_cast<float>(K);
    }
    for (int channel = 0; channel < K; channel += kPiece) {
      read_key(key, bias, channel, eight);
#pragma unroll
      for (const float one : eight) squares += (one - mean) * (one - mean);
    }
    return {mean, squares};
  }

  // The same of several rows [kTile] of parts together, of this thread's token.
  template <class Count>
  __device__ float2 join(const float2* parts, int rows, const Count& count) const {
    float mean = 0, squares = 0, all = 0;
    for (int i = 0; i < rows; ++i) {
      mean += static_cast<float>(count(i)) * parts[i * kTile + thread_].x;
      all += static_cast<float>(count(i));
    }
    mean = all > 0 ? mean / all : 0;
    for (int i = 0; i < rows; ++i) {
      const float2 part = parts[i * kTile + thread_];
      squares += part.y + static_cast<float>(count(i)) * (part.x - mean) * (part.x - mean);
    }
    return {mean, squares};
  }

  // Scores of own queries, a thread for each query and token.
  __device__ void score_keys(int stage) {
    const auto K = static_cast<int>(c_.p.K);
    for (int i = thread_; i < own_ * kTile; i += kThreads) {
      const int row = i / kTile, token = i % kTile;
      const auto h = static_cast<int>((first_row_ + first_own_ + row) / c_.chunk.tokens);
      const int group = h / c_.share() - first_group_, column = group * K;
      const int norm = c_.p.key_norm == Norm::kHead ? group : 0;
      const float2 moments =
          c_.p.normed() ? at<float2>(room_.moments)[norm * kTile + token] : float2{};
      at<float>(room_.scores)[i] =
          score_key(c_.p, tile(stage, token) + column, at<float>(room_.queries) + row * K,
                    terms(column), moments, angles(stage, token, false), angles(stage, token, true));
    }
  }

  // Parts of the scores of hidden states, eight tokens for each warp, to the owners of the queries.
  __device__ void score_states(int stage) {
    static_assert(kWarps * kPiece == kTile);
    float scores[2][4] = {};
    for (int column = 0; column < columns_; column += 32) {
      std::uint32_t states[4], query[4];
      load_matrices<false>(states, tile(stage, warp_ * kPiece + lane_ % 8) + column + lane_ / 8 * 8);
      for (int part = 0; part < c_.parts(); ++part)
#pragma unroll
        for (int high = 0; high < 2; ++high)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            load_left(query, absorbed(part, 0), room_.stride, high * 16, column + k * 16);
            multiply<T>(scores[high], query, states[2 * k], states[2 * k + 1]);
          }
    }
    const int each = kBlockRows / c_.blocks;
#pragma unroll
    for (int high = 0; high < 2; ++high)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = high * 16 + lane_ / 4 + i / 2 * 8, token = warp_ * kPiece + lane_ % 4 * 2 + i % 2;
        if (row >= rows_) continue;
        float* to = of_block(at<float>(room_.scores), row / each);
        to[(rank_ * each + row % each) * kTile + token] =
            scores[high][i] * at<float>(room_.scales)[2 * kBlockRows + row];
      }
  }

  __device__ float whole_score(int own, int token) const {
    const float* scores = at<float>(room_.scores);
    if (c_.slim()) return scores[own * kTile + token];
    const int each = kBlockRows / c_.blocks;
    float sum = 0;
    for (int i = 0; i < c_.blocks; ++i) sum += scores[(i * each + own) * kTile + token];
    return sum;
  }

  // The bias of what this thread is going to weigh, long before that.
  __device__ void fetch_biases(int tile) {
    if (!c_.p.bias) return;
#pragma unroll
    for (int i = 0; i < kBlockRows / kWarps; ++i) {
      const std::int64_t query = first_row_ + first_own_ + warp_ + i * kWarps;
      if (warp_ + i * kWarps >= own_) break;
      const std::int64_t h = query / c_.chunk.tokens, t = c_.chunk.start + query % c_.chunk.tokens;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::int64_t s = std::int64_t{tile} * kTile + 2 * lane_ + j;
        biases_[i][j] = s < c_.p.S ? bias_at(c_.p, b_, h, t, s) : 0;
      }
    }
  }

  // Weights of own queries, a warp for each, two tokens for each lane; to all blocks.
  __device__ void weigh(int tile, int stage) {
#pragma unroll
    for (int n = 0; n < kBlockRows / kWarps; ++n) {
      const int own = warp_ + n * kWarps, row = first_own_ + own, token = 2 * lane_;
      if (own >= own_) break;
      float scores[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool exists = std::int64_t{tile} * kTile + token + i < c_.p.S;
        const float score = whole_score(own, token + i);
        scores[i] = exists ? finish_score(c_.p, score, biases_[n][i]) : -INFINITY;
      }
      float2& running = at<float2>(room_.running)[own];
      const float most = fmaxf(running.x, most_of_warp(fmaxf(scores[0], scores[1])));
      // Nothing seen yet leaves no greatest score to subtract.
      const float base = most == -INFINITY ? 0 : most, scale = expf(running.x - base);
      float total = 0;
      for (int i = 0; i < 2; ++i) total += scores[i] = expf(scores[i] - base);
      total = sum_of_warp(total);
      for (int i = 0; i < c_.blocks; ++i) {
        T* const to = of_block(weights(stage, 0, row), i) + token;
        store(to, scores[0], kBlockRows * kWeightStride);
        store(to + 1, scores[1], kBlockRows * kWeightStride);
        if (lane_ == 0) of_block(at<float>(room_.scales) + stage * kBlockRows, i)[row] = scale;
      }
      if (lane_ == 0) running = float2{most, running.y * scale + total};
    }
  }

  __device__ void shrink(int stage) {
    const float* scales = at<float>(room_.scales) + stage * kBlockRows;
#pragma unroll
    for (int high = 0; high < 2; ++high)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float scale = scales[high * 16 + lane_ / 4 + i * 8];
#pragma unroll
        for (auto& sums : sums_) {
          sums[high][2 * i] *= scale;
          sums[high][2 * i + 1] *= scale;
        }
      }
  }

  __device__ void fetch_weights(int tile) {
    const std::int64_t place = std::int64_t{row_of_batch_} * c_.rows() + first_row_;
#pragma unroll
    for (int i = 0; i < kBlockRows / 4; ++i) {
      const int row = i * 4 + thread_ / kTile;
      const std::int64_t s = std::int64_t{tile} * kTile + thread_ % kTile;
      fetched_[i] = row < rows_ && s < c_.p.S ? c_.weights[(place + row) * c_.p.S + s] : 0;
    }
  }

  __device__ void store_weights(int stage) {
    static_assert(kThreads == 4 * kTile);
#pragma unroll
    for (int i = 0; i < kBlockRows / 4; ++i)
      store(weights(stage, 0, i * 4 + thread_ / kTile) + thread_ % kTile, fetched_[i],
            kBlockRows * kWeightStride);
  }

  // Adds weights times columns, the pieces of columns spread over the warps.
  __device__ void gather(int stage) {
    for (int part = 0; part < c_.parts(); ++part)
#pragma unroll
      for (int start = 0; start < kTile; start += 32) {
        std::uint32_t weights[2][2][4], latent[4];
#pragma unroll
        for (int high = 0; high < 2; ++high)
#pragma unroll
          for (int k = 0; k < 2; ++k)
            load_left(weights[high][k], this->weights(stage, part, 0), kWeightStride, high * 16, start + k * 16);
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          const int column = (warp_ + j * kWarps) * kPiece;
          if (column >= columns_) break;
          load_matrices<true>(latent, tile(stage, start + lane_) + column);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            multiply<T>(sums_[j][0], weights[0][k], latent[2 * k], latent[2 * k + 1]);
            if (rows_ > 16) multiply<T>(sums_[j][1], weights[1][k], latent[2 * k], latent[2 * k + 1]);
          }
        }
      }
  }

  __device__ void finish() {
    const std::int64_t all = c_.chunk.rows(c_.p);
    const std::int64_t place = split_ * all + std::int64_t{row_of_batch_} * c_.rows() + first_row_;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int column = (warp_ + j * kWarps) * kPiece + lane_ % 4 * 2;
      if (column >= columns_) break;
      const std::int64_t d = column < keys_
                                 ? first_group_ * c_.p.K + column
                                 : c_.p.D - c_.tail.width + first_tail_ + column - keys_;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2 * 16 + lane_ / 4 + i % 2 * 8;
        if (row >= rows_) continue;
        auto* to = reinterpret_cast<float2*>(c_.sums + (place + row) * c_.p.D + d);
        *to = float2{sums_[j][i / 2][i % 2 * 2], sums_[j][i / 2][i % 2 * 2 + 1]};
      }
    }
    if constexpr (kTogether)
      for (int i = thread_; i < own_; i += kThreads)
        c_.seen[place + first_own_ + i] = at<float2>(room_.running)[i];
  }

  static constexpr int kPieces = kMostPieces[kTogether];

  const Collect& c_;
  const Room room_;
  char* const memory_;
  const int thread_;
  int lane_, warp_, rank_, split_, row_of_batch_;
  int first_row_, rows_;       // queries
  int first_own_, own_;        // those that this block turns into weights, from first_row_
  int first_group_, keys_;     // keys: columns [0, keys_) of the block
  int first_tail_, columns_;   // the rest
  std::int64_t b_;
  float sums_[kPieces][2][4] = {};
  float fetched_[kBlockRows / 4];
  float biases_[kBlockRows / kWarps][2] = {};
};

template <class T, bool kTogether>
__global__ void __launch_bounds__(kThreads) collect(const __grid_constant__ Collect c) {
  if constexpr (kHasClusters || !kTogether) Collector<T, kTogether>(c).run();
}

}  // namespace onnx_tricks::cuda

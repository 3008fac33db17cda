// Keys and values of all cached tokens, made whole for many queries.
//
// In 16 bits they are as exact as what the model had before it was made slim: it computed the same
// rows, and rounded them to the same type.
#pragma once

#include "product.cuh"
#include "room.cuh"

namespace onnx_tricks::cuda {

constexpr int kExpandHigh = 128, kExpandWide = 64, kExpandDepth = 64;  // of a block's tiles

// target[z] = latent[z] @ weight[z % G], rows for tokens.
struct Expansion {
  Latent latent;
  const void* weight;  // [G, D, columns]; or [G, columns, D]
  void* target;        // [z, S, columns]
  std::int64_t matrices, S, D, columns;

  __host__ __device__ std::int64_t wide() const { return (columns + kExpandWide - 1) / kExpandWide; }
  __host__ __device__ std::int64_t high() const { return (S + kExpandHigh - 1) / kExpandHigh; }
  std::int64_t blocks() const { return matrices * high() * wide(); }
};

constexpr int kExpandStride = kExpandDepth + kPiece;  // rows begin in different banks
constexpr int kExpandStage = (kExpandHigh + kExpandWide) * kExpandStride;
constexpr int kExpandMemory = 2 * kExpandStage * 2;

// Warps have 32 x 32 numbers of a tile each. `kAcross`: the weight's rows are the target's columns.
template <class T, bool kAcross>
__global__ void __launch_bounds__(kThreads) expand_states(const __grid_constant__ Expansion e) {
  static_assert(kExpandWide == kExpandDepth, "a tile of weights is a square either way");
  auto* memory = reinterpret_cast<T*>(shared_memory());
  const auto thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const std::int64_t groups = e.latent.groups, id = blockIdx.x / e.wide();
  const std::int64_t first_column = blockIdx.x % e.wide() * kExpandWide;
  // Neighbouring blocks read the same states, for all groups.
  const auto z = static_cast<unsigned>(id / (groups * e.high()) * groups + id % groups);
  const std::int64_t first_row = id / groups % e.high() * kExpandHigh;
  const auto* weight = static_cast<const T*>(e.weight) + z % groups * e.D * e.columns;

  const auto load = [&](std::int64_t depth, int stage) {
    T* const states = memory + stage * kExpandStage;
    T* const weights = states + kExpandHigh * kExpandStride;
    constexpr int kPieces = kExpandDepth / kPiece, kDown = kThreads / kPieces;
    const int piece = thread % kPieces * kPiece;
    const bool deep = depth + piece < e.D;
    const auto from = e.latent.place(z, 0, static_cast<unsigned>(deep ? depth + piece : 0));
    const std::int64_t step = depth + piece < e.latent.keys.width * e.latent.keys.groups
                                  ? e.latent.keys.width : e.latent.rest.width;
    const auto* state = static_cast<const T*>(from.data) + from.index;
#pragma unroll
    for (int row = thread / kPieces; row < kExpandHigh; row += kDown) {
      const bool exists = deep && first_row + row < e.S;
      copy_async(states + row * kExpandStride + piece, exists ? state + (first_row + row) * step : state, exists);
    }
#pragma unroll
    for (int row = thread / kPieces; row < kExpandWide; row += kDown) {
      const std::int64_t d = depth + (kAcross ? piece : row), n = first_column + (kAcross ? row : piece);
      const bool exists = d < e.D && n < e.columns;
      const T* place = weight + (kAcross ? n * e.D + d : d * e.columns + n);
      copy_async(weights + row * kExpandStride + piece, exists ? place : weight, exists);
    }
    commit_copies();
  };

  const int row = warp / 2 * 32, column = warp % 2 * 32;
  float sums[2][4][4] = {};
  load(0, 0);
  int stage = 0;
  for (std::int64_t depth = 0; depth < e.D; depth += kExpandDepth, stage = 1 - stage) {
    if (depth + kExpandDepth < e.D) load(depth + kExpandDepth, 1 - stage);
    else commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    const T* const states = memory + stage * kExpandStage;
    const T* const weights = states + kExpandHigh * kExpandStride;
#pragma unroll
    for (int k = 0; k < kExpandDepth; k += 16) {
      std::uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_left(a[i], states, kExpandStride, row + i * 16, k);
#pragma unroll
      for (int j = 0; j < 2; ++j) load_pair<kAcross>(b[j], weights, kExpandStride, k, column + j * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();
  }

  T* const target = static_cast<T*>(e.target) + z * e.S * e.columns;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::int64_t s = first_row + row + i * 16 + half * 8 + lane / 4;
        const std::int64_t n = first_column + column + j * 8 + lane % 4 * 2;
        if (s < e.S && n < e.columns)
          *reinterpret_cast<std::uint32_t*>(target + s * e.columns + n) =
              pack<T>(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      }
}

// Keys of a cache [z, S, K] as they meet the queries: with bias, normalised and rotated.
template <class T>
__global__ void __launch_bounds__(kThreads) expand_keys(Keys keys, std::int64_t count, T* target) {
  const Problem& p = keys.p;
  for_each(count, [&](std::int64_t i) {
    const std::int64_t line = i / p.K;
    target[i] = narrow<T>(keys(static_cast<unsigned>(line / p.S), static_cast<unsigned>(i % p.K),
                               static_cast<unsigned>(line % p.S)));
  });
}

}  // namespace onnx_tricks::cuda

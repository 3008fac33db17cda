// Products of few rows with weights, which are read once, 16 bytes at a time.
#pragma once

#include "product.cuh"
#include "score.cuh"

namespace onnx_tricks::cuda {

constexpr int kStreamRows = 4, kStreamColumns = 128, kStreamDepth = 256;
constexpr std::int64_t kMostStreamRows = 64;  // more of them reuse what a tile of weights holds
constexpr int kStreamMemory = (kStreamRows * kStreamDepth + kProductThreads * kStreamRows * kPiece) * 4;

// Threads have eight columns and every 16th row of the weights each; sums of all are joined last.
template <class T>
__global__ void __launch_bounds__(kProductThreads) stream_weights(Product<Matrix, Matrix> p) {
  constexpr int kEach = kPiece, kAcross = kStreamColumns / kEach, kDown = kProductThreads / kAcross;
  auto* a = reinterpret_cast<float*>(shared_memory());  // [kStreamRows, kStreamDepth]
  float* joined = a + kStreamRows * kStreamDepth;       // [kDown, kStreamRows, kStreamColumns]

  const auto thread = static_cast<int>(threadIdx.x);
  const int across = thread % kAcross, down = thread / kAcross;
  const std::int64_t wide = (p.columns + kStreamColumns - 1) / kStreamColumns;
  const std::int64_t high = (p.rows + kStreamRows - 1) / kStreamRows;
  std::int64_t id = blockIdx.x;
  const std::int64_t first_column = id % wide * kStreamColumns, column = first_column + across * kEach;
  id /= wide;
  const std::int64_t row = id % high * kStreamRows;
  id /= high;
  const auto z = static_cast<unsigned>(id % p.matrices);
  const std::int64_t part = id / p.matrices;
  const auto start = static_cast<int>(p.depth * part / p.parts);
  const auto stop = static_cast<int>(p.depth * (part + 1) / p.parts);
  const auto* weights = static_cast<const T*>(p.b.numbers.data) +
                        p.b.index(z, 0, static_cast<unsigned>(column < p.columns ? column : 0));

  float sums[kStreamRows][kEach] = {};
  for (int depth = start; depth < stop; depth += kStreamDepth) {
    __syncthreads();
    for (int i = thread; i < kStreamRows * kStreamDepth; i += kProductThreads) {
      const int m = i / kStreamDepth, k = depth + i % kStreamDepth;
      a[i] = row + m < p.rows && k < stop
                 ? p.a(z, static_cast<unsigned>(row + m), static_cast<unsigned>(k))
                 : 0;
    }
    __syncthreads();
    const int count = min(kStreamDepth, stop - depth);
#pragma unroll 4
    for (int k = down; k < count; k += kDown) {
      float eight[kEach];
      read_eight(weights + (depth + k) * p.b.row_stride, eight);
#pragma unroll
      for (int n = 0; n < kEach; ++n)
#pragma unroll
        for (int m = 0; m < kStreamRows; ++m) sums[m][n] += a[m * kStreamDepth + k] * eight[n];
    }
  }
#pragma unroll
  for (int m = 0; m < kStreamRows; ++m)
#pragma unroll
    for (int n = 0; n < kEach; ++n)
      joined[(down * kStreamRows + m) * kStreamColumns + across * kEach + n] = sums[m][n];
  __syncthreads();
  for (int i = thread; i < kStreamRows * kStreamColumns; i += kProductThreads) {
    const std::int64_t m = row + i / kStreamColumns, n = first_column + i % kStreamColumns;
    if (m >= p.rows || n >= p.columns) continue;
    float sum = 0;
    for (int j = 0; j < kDown; ++j) sum += joined[j * kStreamRows * kStreamColumns + i];
    p.target.numbers.set(part * p.target.part_stride +
                             p.target.index(z, static_cast<unsigned>(m), static_cast<unsigned>(n)),
                         sum);
  }
}

// Whether every row of b can be read in whole vectors.
inline bool streams(const Product<Matrix, Matrix>& p) {
  const auto strides = p.columns | p.b.row_stride | p.b.group_stride | p.b.batch_stride;
  return p.rows <= kMostStreamRows && p.b.column_stride == 1 && p.b.parts == 1 && strides % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(p.b.numbers.data) % 16 == 0;
}

inline const char* multiply_weights(const Product<Matrix, Matrix>& p, void* stream) {
  if (!streams(p)) return multiply_all(p, stream);
  const auto run = [&](auto* kernel) {
    const std::int64_t tiles = ((p.rows + kStreamRows - 1) / kStreamRows) *
                               ((p.columns + kStreamColumns - 1) / kStreamColumns);
    return launch(kernel, tiles * p.matrices * p.parts, kProductThreads, kStreamMemory, 1, stream, p);
  };
  if (p.b.numbers.type == Type::kFloat) return run(stream_weights<float>);
  return p.b.numbers.type == Type::kHalf ? run(stream_weights<Half>) : run(stream_weights<Brief>);
}

}  // namespace onnx_tricks::cuda

// Many products of matrices in fp32, of operands that lie in memory in whatever way.
//
// An operand tells the number at (row, column) of its matrix z, and along which of the two its
// memory is contiguous. What a kernel reads is decided by the operand alone; this file knows tiles.
#pragma once

#include "moments.cuh"

namespace onnx_tricks::cuda {

// Dense matrices. Matrix z is that of group z % groups of row z / groups of the batch; its rows
// come in blocks of `fold`. Strides are in elements. Several parts are summed where they are read.
struct Matrix {
  Numbers numbers;
  std::int64_t groups = 1, batch_stride = 0, group_stride = 0;
  std::int64_t fold = INT32_MAX, fold_stride = 0, row_stride = 0, column_stride = 1;
  std::int64_t parts = 1, part_stride = 0;

  __device__ std::int64_t index(unsigned z, unsigned row, unsigned column) const {
    const auto group = static_cast<unsigned>(groups), block = static_cast<unsigned>(fold);
    return z / group * batch_stride + z % group * group_stride + row / block * fold_stride +
           row % block * row_stride + column * column_stride;
  }
  __device__ float operator()(unsigned z, unsigned row, unsigned column) const {
    const std::int64_t place = index(z, row, column);
    float sum = numbers[place];
    for (std::int64_t i = 1; i < parts; ++i) sum += numbers[place + i * part_stride];
    return sum;
  }
  __device__ bool rows_contiguous() const { return column_stride == 1; }
};

// The cached rows [S, D] of row first + z / groups of the batch: keys side by side, then the rest.
struct Latent {
  struct Place {
    const void* data;
    std::int64_t index;
  };

  State keys, rest;  // keys of no width where there are none
  Type type;
  std::int64_t first, groups;

  // Where the number lies.
  __device__ Place place(unsigned z, unsigned row, unsigned column) const {
    const std::int64_t b = first + z / static_cast<unsigned>(groups);
    const auto width = static_cast<unsigned>(keys.width), side = width * static_cast<unsigned>(keys.groups);
    if (column >= side)
      return {rest.present, (b * rest.present_length + row) * rest.width + (column - side)};
    const std::int64_t line = (b * keys.groups + column / width) * keys.present_length + row;
    return {keys.present, line * width + column % width};
  }
  __device__ float operator()(unsigned z, unsigned row, unsigned column) const {
    const Place found = place(z, row, column);
    return Numbers{found.data, type}[found.index];
  }
  __device__ bool rows_contiguous() const { return true; }
};

// Keys of one group as columns [K, S], with bias, normalised and rotated.
struct Keys {
  Problem p;
  std::int64_t first;
  const float2* moments;  // where they are to be normalised

  __device__ float key(std::int64_t b, unsigned g, unsigned s, unsigned k) const {
    float value = biased_key(p, b, g, s, k);
    if (!p.normed()) return value;
    const float2 of = moments[moments_place(p, b, g, s)];
    value = (value - of.x) * of.y;
    if (p.key_gain) value *= Numbers{p.key_gain, p.type}[g * p.K + k];
    return p.key_shift ? value + Numbers{p.key_shift, p.type}[g * p.K + k] : value;
  }
  __device__ float operator()(unsigned z, unsigned k, unsigned s) const {
    const auto groups = static_cast<unsigned>(p.G), half = static_cast<unsigned>(p.R / 2);
    const std::int64_t b = first + z / groups;
    const unsigned g = z % groups;
    const float one = key(b, g, s, k);
    if (k >= p.R) return one;
    const unsigned angle = p.interleaved ? k / 2 : k % half;
    const bool second = p.interleaved ? k % 2 : k >= half;
    const unsigned apart = p.interleaved ? 1 : half;
    const float other = key(b, g, s, second ? k - apart : k + apart);
    const std::int64_t place = b * p.angle_stride + std::int64_t{s} * half + angle;
    const float cos = Numbers{p.cos, p.type}[place], sin = Numbers{p.sin, p.type}[place];
    return second ? one * cos + other * sin : one * cos - other * sin;
  }
  __device__ bool rows_contiguous() const { return false; }
};

// target[part][z] = a[z] @ b[z] over one part of the depth each.
template <class A, class B>
struct Product {
  A a;
  B b;
  Matrix target;  // of floats
  std::int64_t matrices, rows, columns, depth, parts;
};

constexpr int kProductThreads = 256;

template <int kRows, int kColumns, class A, class B>
__global__ void __launch_bounds__(kProductThreads) multiply_tiles(Product<A, B> p) {
  constexpr int kDepth = 32, kAcross = kColumns == 64 ? 16 : kColumns;
  constexpr int kDown = kProductThreads / kAcross;
  constexpr int kHigh = kRows / kDown, kWide = kColumns / kAcross;
  auto* a = reinterpret_cast<float*>(shared_memory());  // [kDepth, kRows + 1]
  float* b = a + kDepth * (kRows + 1);                  // [kDepth, kColumns + 1]

  const auto thread = static_cast<int>(threadIdx.x);
  const std::int64_t wide = (p.columns + kColumns - 1) / kColumns;
  const std::int64_t high = (p.rows + kRows - 1) / kRows;
  std::int64_t id = blockIdx.x;
  const std::int64_t column = id % wide * kColumns;
  id /= wide;
  const std::int64_t row = id % high * kRows;
  id /= high;
  const auto z = static_cast<unsigned>(id % p.matrices);
  const std::int64_t part = id / p.matrices;
  const std::int64_t stop = p.depth * (part + 1) / p.parts;

  float sums[kHigh][kWide] = {};
  for (std::int64_t start = p.depth * part / p.parts; start < stop; start += kDepth) {
    for (int i = thread; i < kDepth * kRows; i += kProductThreads) {
      const int k = p.a.rows_contiguous() ? i % kDepth : i / kRows;
      const int m = p.a.rows_contiguous() ? i / kDepth : i % kRows;
      const bool exists = start + k < stop && row + m < p.rows;
      a[k * (kRows + 1) + m] =
          exists ? p.a(z, static_cast<unsigned>(row + m), static_cast<unsigned>(start + k)) : 0;
    }
    for (int i = thread; i < kDepth * kColumns; i += kProductThreads) {
      const int k = p.b.rows_contiguous() ? i / kColumns : i % kDepth;
      const int n = p.b.rows_contiguous() ? i % kColumns : i / kDepth;
      const bool exists = start + k < stop && column + n < p.columns;
      b[k * (kColumns + 1) + n] =
          exists ? p.b(z, static_cast<unsigned>(start + k), static_cast<unsigned>(column + n)) : 0;
    }
    __syncthreads();
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int i = 0; i < kHigh; ++i)
#pragma unroll
        for (int j = 0; j < kWide; ++j)
          sums[i][j] += a[k * (kRows + 1) + thread / kAcross + i * kDown] *
                        b[k * (kColumns + 1) + thread % kAcross + j * kAcross];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kHigh; ++i)
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const std::int64_t m = row + thread / kAcross + i * kDown;
      const std::int64_t n = column + thread % kAcross + j * kAcross;
      if (m < p.rows && n < p.columns)
        p.target.numbers.set(part * p.target.part_stride +
                                 p.target.index(z, static_cast<unsigned>(m), static_cast<unsigned>(n)),
                             sums[i][j]);
    }
}

// Few rows make flat tiles.
constexpr std::int64_t kFewRows = 16;

template <class A, class B>
const char* multiply_all(const Product<A, B>& p, void* stream) {
  const auto run = [&](auto* kernel, int high, int wide) {
    const std::int64_t tiles = ((p.rows + high - 1) / high) * ((p.columns + wide - 1) / wide);
    return launch(kernel, tiles * p.matrices * p.parts, kProductThreads,
                  sizeof(float) * 32 * (high + wide + 2), 1, stream, p);
  };
  return p.rows <= kFewRows ? run(multiply_tiles<8, 128, A, B>, 8, 128)
                            : run(multiply_tiles<64, 64, A, B>, 64, 64);
}

}  // namespace onnx_tricks::cuda

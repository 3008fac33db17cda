// Products of small matrices, held in registers tile by tile; nothing is packed.
//
// All widths that vectors run along are multiples of kLanes.
#pragma once

#include "vector.h"

namespace onnx_tricks::cpu {
namespace {

// Tiles for 32 registers, or for 16: rows by vectors, and rows by rows.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4, kDotRows = 6;
#else
constexpr int kRows = 6, kVectors = 2, kDotRows = 3;
#endif
constexpr int kDotColumns = 4, kFewRows = 2;

// Rows of a matrix, of floats or of what a vector of floats can be loaded from.
template <class Number>
struct RowsOf {
  const Number* data;
  std::int64_t stride;
  const Number* operator[](std::int64_t row) const { return data + row * stride; }
};
using Rows = RowsOf<float>;

struct Target {
  float* data;
  std::int64_t stride;
  float* operator[](std::int64_t row) const { return data + row * stride; }
};

// Memory that is needed soon, and is sent for bit by bit while there is other work: a processor
// does not foresee by itself what lies behind several rows that it reads at once.
struct Ahead {
  const char* next = nullptr;
  const char* end = nullptr;

  void fetch() {
    if (next >= end) return;
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    next += 128;
  }
};

template <int M, int N, class Number>
inline void multiply_tile(Rows a, RowsOf<Number> b, std::int64_t depth, Target c, bool add,
                          Ahead& ahead) {
  Vector sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c[m] + n * kLanes) : Vector{};
  const Number* row = b.data;
  Ahead soon = ahead;
  for (std::int64_t k = 0; k < depth; ++k, row += b.stride) {
    soon.fetch();
    // With so few rows, the other factor itself comes from memory.
    if constexpr (M <= kFewRows)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(row + 8 * b.stride + n * kLanes);
    Vector values[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) values[n] = load(row + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector factor = all(a[m][k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] += factor * values[n];
    }
  }
  ahead = soon;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c[m] + n * kLanes, sums[m][n]);
}

template <int M, int N, class Number>
inline void multiply_rows(Rows a, RowsOf<Number> b, std::int64_t rows, std::int64_t depth, Target c,
                          bool add, Ahead& ahead) {
  for (; rows >= M; rows -= M) {
    multiply_tile<M, N>(a, b, depth, c, add, ahead);
    a.data += M * a.stride;
    c.data += M * c.stride;
  }
  if constexpr (M > 1)
    if (rows > 0) multiply_rows<M - 1, N>(a, b, rows, depth, c, add, ahead);
}

template <int M, int N, class Number>
inline void multiply_columns(Rows a, RowsOf<Number> b, std::int64_t rows, std::int64_t depth,
                             std::int64_t columns, Target c, bool add, Ahead& ahead) {
  for (; columns >= N * kLanes; columns -= N * kLanes) {
    multiply_rows<M, N>(a, b, rows, depth, c, add, ahead);
    b.data += N * kLanes;
    c.data += N * kLanes;
  }
  if constexpr (N > 1)
    if (columns > 0) multiply_columns<M, N / 2>(a, b, rows, depth, columns, c, add, ahead);
}

// c [rows, columns] (+)= a [rows, depth] @ b [depth, columns]
template <class Number = float>
inline void multiply(Rows a, RowsOf<Number> b, std::int64_t rows, std::int64_t depth,
                     std::int64_t columns, Target c, bool add, Ahead ahead = {}) {
  if (rows <= kFewRows)
    multiply_columns<kFewRows, 2 * kVectors>(a, b, rows, depth, columns, c, add, ahead);
  else
    multiply_columns<kRows, kVectors>(a, b, rows, depth, columns, c, add, ahead);
}

template <int M, int N, class Number>
inline void dot_tile(Rows a, RowsOf<Number> b, std::int64_t depth, Target c, Ahead& ahead) {
  Ahead soon = ahead;
  Vector products[M][N] = {};
  for (std::int64_t k = 0; k < depth; k += kLanes) {
    soon.fetch();
    Vector rows[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) rows[m] = load(a[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vector value = load(b[n] + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) products[m][n] += rows[m] * value;
    }
  }
  ahead = soon;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    if constexpr (N == 4)
      *reinterpret_cast<FourAnywhere*>(c[m]) =
          sums(products[m][0], products[m][1], products[m][2], products[m][3]);
    else
      for (int n = 0; n < N; ++n) c[m][n] = sum(products[m][n]);
  }
}

template <int M, class Number>
inline void dot_rows(Rows a, RowsOf<Number> b, std::int64_t rows, std::int64_t columns,
                     std::int64_t depth, Target c, Ahead& ahead) {
  for (; rows >= M; rows -= M) {
    std::int64_t n = 0;
    for (; n + kDotColumns <= columns; n += kDotColumns)
      dot_tile<M, kDotColumns>(a, RowsOf<Number>{b[n], b.stride}, depth, {c.data + n, c.stride},
                               ahead);
    for (; n < columns; ++n)
      dot_tile<M, 1>(a, RowsOf<Number>{b[n], b.stride}, depth, {c.data + n, c.stride}, ahead);
    a.data += M * a.stride;
    c.data += M * c.stride;
  }
  if constexpr (M > 1)
    if (rows > 0) dot_rows<M - 1>(a, b, rows, columns, depth, c, ahead);
}

// c [rows, columns] = a [rows, depth] @ b [columns, depth]^T
template <class Number = float>
inline void multiply_transposed(Rows a, RowsOf<Number> b, std::int64_t rows, std::int64_t columns,
                                std::int64_t depth, Target c, Ahead ahead = {}) {
  dot_rows<kDotRows>(a, b, rows, columns, depth, c, ahead);
}

}  // namespace
}  // namespace onnx_tricks::cpu

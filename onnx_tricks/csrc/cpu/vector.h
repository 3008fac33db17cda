// Vectors of floats, as wide as the instruction set that a file is compiled for.
//
// Included once by each file of kernels. Everything is in an unnamed namespace, and nothing of the
// standard library's templates is used: a function that two files share under one name could be
// linked in the version that the processor at hand does not understand.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../attention.h"
#include "number.h"

namespace onnx_tricks::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr std::int64_t kLanes = kBytes / 4;

typedef float Vector __attribute__((vector_size(kBytes)));
typedef std::uint32_t Integers __attribute__((vector_size(kBytes)));
typedef float Anywhere __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16)));
typedef float FourAnywhere __attribute__((vector_size(16), aligned(4), may_alias));

constexpr float kInfinity = __builtin_inff();

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t round_up(std::int64_t n, std::int64_t unit) {
  return (n + unit - 1) / unit * unit;
}
inline std::int64_t padded(std::int64_t n) { return round_up(n, kLanes); }

inline Vector load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }
inline void store(float* to, Vector v) { *reinterpret_cast<Anywhere*>(to) = v; }
inline Vector all(float x) { return x - Vector{}; }
inline Vector greater(Vector a, Vector b) { return a > b ? a : b; }

// Loaded from numbers of 16 bits, where that is one instruction more.
#if defined(__AVX512F__)
constexpr bool kConverts = true;
inline Vector load(const Half* from) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Vector load(const Brief* from) {
  const auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const auto wide = reinterpret_cast<Integers>(_mm512_maskz_cvtepu16_epi32(0xffff, bits));
  return reinterpret_cast<Vector>(wide << 16);
}
#elif defined(__AVX2__)
constexpr bool kConverts = true;
inline Vector load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Vector load(const Brief* from) {
  const auto bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Vector>(reinterpret_cast<Integers>(_mm256_cvtepu16_epi32(bits)) << 16);
}
#else
constexpr bool kConverts = false;
template <class Number>
inline Vector load(const Number* from) {
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(from[i]);
  return v;
}
#endif

// Parts of vectors: the index lists that __builtin_shufflevector needs, lane of four by lane.
#if defined(__AVX512F__)
#define ONNX_TRICKS_LANES(a, b, c, d)                                                           \
  a, b, c, d, (a) + 4, (b) + 4, (c) + 4, (d) + 4, (a) + 8, (b) + 8, (c) + 8, (d) + 8, (a) + 12, \
      (b) + 12, (c) + 12, (d) + 12
inline Four fold(Vector v) {
  const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
}
#elif defined(__AVX2__)
#define ONNX_TRICKS_LANES(a, b, c, d) a, b, c, d, (a) + 4, (b) + 4, (c) + 4, (d) + 4
inline Four fold(Vector v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#else
#define ONNX_TRICKS_LANES(a, b, c, d) a, b, c, d
inline Four fold(Vector v) { return v; }
#endif

// The sums of four vectors.
inline Four sums(Vector a, Vector b, Vector c, Vector d) {
  constexpr int n = kLanes;
  const Vector ab = __builtin_shufflevector(a, b, ONNX_TRICKS_LANES(0, n, 1, n + 1)) +
                    __builtin_shufflevector(a, b, ONNX_TRICKS_LANES(2, n + 2, 3, n + 3));
  const Vector cd = __builtin_shufflevector(c, d, ONNX_TRICKS_LANES(0, n, 1, n + 1)) +
                    __builtin_shufflevector(c, d, ONNX_TRICKS_LANES(2, n + 2, 3, n + 3));
  return fold(__builtin_shufflevector(ab, cd, ONNX_TRICKS_LANES(0, 1, n, n + 1)) +
              __builtin_shufflevector(ab, cd, ONNX_TRICKS_LANES(2, 3, n + 2, n + 3)));
}

inline float sum(Vector v) {
  const Four four = fold(v);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

inline float greatest(Vector v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// e^x for x <= 0, to 1e-7 of its value; zero where that is no normal number.
inline Vector exponential(Vector x) {
  const Vector bounded = x < all(-87.0f) ? all(-87.0f) : x;  // NaN stays
  // Adding 1.5 * 2^23 rounds to an integer, which then is in the lowest bits.
  const Vector shifted = bounded * all(1.44269504f) + all(0x1.8p23f);
  const Vector n = shifted - all(0x1.8p23f);
  const Vector r = (bounded - n * all(0.693359375f)) + n * all(2.12194440e-4f);
  Vector tail = all(1.392625083e-3f);
  tail = tail * r + all(8.363232884e-3f);
  tail = tail * r + all(4.166655421e-2f);
  tail = tail * r + all(1.666657667e-1f);
  tail = tail * r + all(0.5f);
  const Integers power = (reinterpret_cast<Integers>(shifted) + 127) << 23;
  const Vector value = (tail * (r * r) + r + all(1.0f)) * reinterpret_cast<Vector>(power);
  return x < all(-87.0f) ? Vector{} : value;
}

inline Vector tangent(Vector x) {  // hyperbolic
  const Vector size = x < Vector{} ? -x : x;
  const Vector square = x * x;
  Vector tail = all(2.292744815e-3f);
  tail = tail * square + all(-8.343945515e-3f);
  tail = tail * square + all(2.176891865e-2f);
  tail = tail * square + all(-5.395925958e-2f);
  tail = tail * square + all(1.333330356e-1f);
  tail = tail * square + all(-3.333333317e-1f);
  const Vector small = x + x * square * tail;
  const Vector power = exponential(-2.0f * size);
  const Vector large = (1.0f - power) / (1.0f + power);
  return size < all(0.625f) ? small : (x < Vector{} ? -large : large);
}

template <class Number>
inline void widen(const Number* from, float* to, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// Numbers of any type but double as floats.
inline void widen(const void* from, Type type, float* to, std::int64_t count) {
  if (type == Type::kFloat)
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  else if (type == Type::kHalf)
    widen(static_cast<const Half*>(from), to, count);
  else
    widen(static_cast<const Brief*>(from), to, count);
}

inline void narrow(const float* from, Type type, void* to, std::int64_t count) {
  if (type == Type::kFloat) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  } else if (type == Type::kHalf) {
    auto* numbers = static_cast<Half*>(to);
    for (std::int64_t i = 0; i < count; ++i) numbers[i] = Half(from[i]);
  } else {
    auto* numbers = static_cast<Brief*>(to);
    for (std::int64_t i = 0; i < count; ++i) numbers[i] = Brief(from[i]);
  }
}

}  // namespace
}  // namespace onnx_tricks::cpu

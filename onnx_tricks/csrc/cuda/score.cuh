// The score of a query and a key that is rotated where it lies, eight channels at a time.
#pragma once

#include "room.cuh"

namespace onnx_tricks::cuda {

template <class T, int kCount>
struct alignas(16) Vector {
  T numbers[kCount];
};

// Eight numbers from 16-byte vectors.
template <class T>
__device__ inline void read_eight(const T* from, float (&to)[kPiece]) {
  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kPiece; i += kEach) {
    const auto vector = *reinterpret_cast<const Vector<T, kEach>*>(from + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[i + j] = widen(vector.numbers[j]);
  }
}

// The same of a row of cosines, which are floats or of the cache's type.
template <class T>
__device__ inline void read_angles(const char* row, int first, Type type, float (&to)[kPiece]) {
  if (type == Type::kFloat) read_eight(reinterpret_cast<const float*>(row) + first, to);
  else read_eight(reinterpret_cast<const T*>(row) + first, to);
}

// What keys are put through beside their rotation, of the channels of one key; null what there is not.
struct KeyTerms {
  const float *bias = nullptr, *gain = nullptr, *shift = nullptr;
};

// Eight channels of a key with its bias.
template <class T>
__device__ inline void read_key(const T* key, const float* bias, int channel, float (&to)[kPiece]) {
  read_eight(key + channel, to);
  if (!bias) return;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) to[i] += bias[channel + i];
}

// Normalises them.
__device__ inline void normalise(const KeyTerms& terms, float2 moments, int channel, float (&to)[kPiece]) {
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    to[i] = (to[i] - moments.x) * moments.y;
    if (terms.gain) to[i] *= terms.gain[channel + i];
    if (terms.shift) to[i] += terms.shift[channel + i];
  }
}

// All in shared memory: a query and the key's terms in floats, cosines and sines as given.
template <class T>
__device__ inline float score_key(const Problem& p, const T* key, const float* query,
                                  const KeyTerms& terms, float2 moments, const char* cosines,
                                  const char* sines) {
  const auto K = static_cast<int>(p.K), half = static_cast<int>(p.R / 2);
  float sum = 0, one[kPiece], two[kPiece], cos[kPiece], sin[kPiece];
  const auto read = [&](int channel, float(&to)[kPiece]) {
    read_key(key, terms.bias, channel, to);
    if (p.normed()) normalise(terms, moments, channel, to);
  };
  // q . rotated(k) = cos (q1 k1 + q2 k2) + sin (q2 k1 - q1 k2)
  const auto turn = [&](float q1, float q2, float k1, float k2, float cos, float sin) {
    sum += cos * (q1 * k1 + q2 * k2) + sin * (q2 * k1 - q1 * k2);
  };
  for (int angle = 0; angle < half; angle += kPiece) {
    const int first = p.interleaved ? 2 * angle : angle;
    const int second = first + (p.interleaved ? kPiece : half);
    read(first, one);
    read(second, two);
    read_angles<T>(cosines, angle, p.type, cos);
    read_angles<T>(sines, angle, p.type, sin);
    const float *q1 = query + first, *q2 = query + second;
    if (p.interleaved) {
#pragma unroll
      for (int i = 0; i < kPiece; i += 2) {
        turn(q1[i], q1[i + 1], one[i], one[i + 1], cos[i / 2], sin[i / 2]);
        turn(q2[i], q2[i + 1], two[i], two[i + 1], cos[4 + i / 2], sin[4 + i / 2]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) turn(q1[i], q2[i], one[i], two[i], cos[i], sin[i]);
    }
  }
  for (int channel = 2 * half; channel < K; channel += kPiece) {
    read(channel, one);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sum += query[channel + i] * one[i];
  }
  return sum;
}

}  // namespace onnx_tricks::cuda

// What a norm takes off keys and multiplies them by, before they are rotated.
#pragma once

#include "rows.cuh"

namespace onnx_tricks::cuda {

// Where those of a key lie in [B, norms, S].
__host__ __device__ inline std::int64_t moments_place(const Problem& p, std::int64_t b,
                                                      std::int64_t g, std::int64_t s) {
  return (b * p.norms() + g * p.norms() / p.G) * p.S + s;
}

// One channel of a cached key with its bias.
__device__ inline float biased_key(const Problem& p, std::int64_t b, unsigned g, unsigned s,
                                   unsigned k) {
  const std::int64_t place = (b * p.G + g) * p.latent.present_length + s;
  const float value = Numbers{p.latent.present, p.cache}[place * p.K + k];
  return p.key_bias ? value + Numbers{p.key_bias, p.type}[g * p.K + k] : value;
}

__device__ inline float scale_for(const Problem& p, float squares, float count) {
  return 1 / sqrtf(squares / count + p.key_epsilon);
}

// Mean and scale of all keys, a warp for those of one token that are normalised together.
__global__ void __launch_bounds__(kThreads) measure_keys(Problem p, float2* moments) {
  const auto lane = static_cast<unsigned>(threadIdx.x % 32);
  const auto step = std::int64_t{gridDim.x} * (kThreads / 32);
  const auto K = static_cast<unsigned>(p.K);
  const auto channels = static_cast<unsigned>(p.G / p.norms()) * K;
  for (std::int64_t i = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
       i < p.B * p.norms() * p.S; i += step) {
    const auto s = static_cast<unsigned>(i % p.S);
    const auto first = static_cast<unsigned>(i / p.S % p.norms()) * channels;
    const std::int64_t b = i / p.S / p.norms();
    const auto sum = [&](auto term) {
      float total = 0;
      for (unsigned j = lane; j < channels; j += 32)
        total += term(biased_key(p, b, (first + j) / K, s, (first + j) % K));
      return sum_of_warp(total);
    };
    const auto count = static_cast<float>(channels);
    const float mean = p.key_centered ? sum([](float x) { return x; }) / count : 0;
    const float squares = sum([mean](float x) { return (x - mean) * (x - mean); });
    if (lane == 0) moments[i] = float2{mean, scale_for(p, squares, count)};
  }
}

}  // namespace onnx_tricks::cuda

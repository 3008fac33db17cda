// What is done element by element or row by row, beside the products.
#pragma once

#include "numbers.cuh"

namespace onnx_tricks::cuda {

constexpr int kThreads = 256;

// A part of the queries: of some rows of the batch and some tokens, for all heads, [b, h, t].
struct Chunk {
  std::int64_t first = 0, batch = 0;   // rows of the batch
  std::int64_t start = 0, tokens = 0;  // new tokens

  __host__ __device__ std::int64_t rows(const Problem& p) const { return batch * p.H * tokens; }
};

// One thread for each element; blocks walk on where there are very many.
template <class Task>
__device__ void for_each(std::int64_t count, const Task& task) {
  const auto step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step)
    task(i);
}

inline std::int64_t blocks_for(std::int64_t count) {
  const std::int64_t blocks = (count + kThreads - 1) / kThreads;
  return blocks < 1 << 20 ? blocks : 1 << 20;
}

// The first rows of every [length, width] of the past, in units of as many bytes as divide a row.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    copy_past(const Unit* past, Unit* present, std::int64_t count, std::int64_t each,
              std::int64_t past_stride, std::int64_t present_stride) {
  for_each(count * each, [&](std::int64_t i) {
    present[i / each * present_stride + i % each] = past[i / each * past_stride + i % each];
  });
}

__global__ void __launch_bounds__(kThreads)
    append_fresh(Numbers fresh, Numbers present, std::int64_t count, std::int64_t each,
                 std::int64_t offset, std::int64_t stride) {
  for_each(count * each, [&](std::int64_t i) {
    present.set(i / each * stride + offset + i % each, fresh[i]);
  });
}

// What is added to a score.
__device__ inline float bias_at(const Problem& p, std::int64_t b, std::int64_t h, std::int64_t t,
                                std::int64_t s) {
  if (!p.bias) return 0;
  const std::int64_t place = b * p.bias_strides[0] + h * p.bias_strides[1] +
                             t * p.bias_strides[2] + s * p.bias_strides[3];
  return Numbers{p.bias, p.type}[place];
}

// What a score becomes before the softmax.
__device__ inline float finish_score(const Problem& p, float score, float bias) {
  score *= p.scale;
  if (p.softcap != 0) score = p.softcap * tanhf(score / p.softcap);
  return score + bias;
}

// Scores [rows, S] become weights, a block for each row: powers that are still to be divided by
// their total, as small shares of a long context would not fit 16 bits. A total of 0 says that
// there is nothing to attend to.
constexpr int kMostSoftmaxThreads = 1024;

__global__ void __launch_bounds__(kMostSoftmaxThreads)
    softmax(Problem p, Chunk chunk, float* scores, float* totals) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const std::int64_t row = blockIdx.x, t = chunk.start + row % chunk.tokens;
  const std::int64_t h = row / chunk.tokens % p.H, b = chunk.first + row / chunk.tokens / p.H;
  scores += row * p.S;
  const auto over_block = [&](float value, auto of_warp, auto join) {
    value = of_warp(value);
    __syncthreads();
    if (thread % 32 == 0) shared[thread / 32] = value;
    __syncthreads();
    value = shared[0];
    for (int i = 1; i < threads / 32; ++i) value = join(value, shared[i]);
    return value;
  };
  float most = -INFINITY, total = 0;
  for (std::int64_t s = thread; s < p.S; s += threads) {
    scores[s] = finish_score(p, scores[s], bias_at(p, b, h, t, s));
    most = fmaxf(most, scores[s]);
  }
  most = over_block(most, most_of_warp, [](float x, float y) { return fmaxf(x, y); });
  const bool nothing = most == -INFINITY && (p.safe || p.S == 0);
  for (std::int64_t s = thread; s < p.S; s += threads) {
    scores[s] = nothing ? 0 : expf(scores[s] - most);
    total += scores[s];
  }
  total = over_block(total, sum_of_warp, [](float x, float y) { return x + y; });
  if (thread == 0) totals[row] = total;
}

// Of a row in which no score is greater than -INFINITY.
__device__ inline float total_of_nothing(const Problem& p, float total) {
  return total == 0 && (p.safe || p.S == 0) ? 0 : NAN;
}

// Sums of several splits of the tokens, each with the greatest score that it saw and the total of
// its powers, become one, in place of the first: [rows, D], not yet times the value weight.
__global__ void __launch_bounds__(kThreads)
    combine(Problem p, std::int64_t rows, std::int64_t splits, const float2* seen, float* sums,
            float* totals) {
  for_each(rows * p.D, [&](std::int64_t i) {
    const std::int64_t row = i / p.D;
    float most = -INFINITY, total = 0, sum = 0;
    for (std::int64_t j = 0; j < splits; ++j) most = fmaxf(most, seen[j * rows + row].x);
    for (std::int64_t j = 0; j < splits; ++j) {
      const float2 one = seen[j * rows + row];
      const float weight = one.x == -INFINITY ? 0 : expf(one.x - most);
      total += one.y * weight;
      sum += sums[j * rows * p.D + i] * weight;
    }
    sums[i] = sum;
    if (i % p.D == 0) totals[row] = total > 0 ? total : total_of_nothing(p, total);
  });
}

// One number of the output, of the sum of weights times values.
__device__ inline float finish_sum(const Problem& p, float sum, float total, float bias) {
  const bool nothing = total == 0;
  sum = nothing ? 0 : sum / total;
  return nothing && p.safe ? sum : sum + bias;
}

// Parts of [b, h, t, V] become the output [B, T, H, V].
__global__ void __launch_bounds__(kThreads)
    write_output(Problem p, Chunk chunk, const float* parts, std::int64_t count, const float* totals) {
  for_each(chunk.rows(p) * p.V, [&](std::int64_t i) {
    const std::int64_t row = i / p.V, v = i % p.V, t = chunk.start + row % chunk.tokens;
    const std::int64_t h = row / chunk.tokens % p.H, b = chunk.first + row / chunk.tokens / p.H;
    float sum = 0;
    for (std::int64_t j = 0; j < count; ++j) sum += parts[j * chunk.rows(p) * p.V + i];
    const float bias = p.value_bias ? Numbers{p.value_bias, p.type}[h * p.V + v] : 0;
    Numbers{p.output, p.type}.set(((b * p.T + t) * p.H + h) * p.V + v,
                                  finish_sum(p, sum, totals[row], bias));
  });
}

}  // namespace onnx_tricks::cuda

// What a block of the kernel of collect.cuh is given, and what it has in shared memory.
#pragma once

#include "rows.cuh"

namespace onnx_tricks::cuda {

constexpr int kTile = 64;       // tokens
constexpr int kBlockRows = 32;  // queries
constexpr int kPiece = 8;       // columns that are multiplied at once: 16 bytes
constexpr int kWarps = kThreads / 32;
constexpr int kMostPieces[] = {6, 10};         // of a warp: with given weights, in a cluster
constexpr int kWeightStride = kTile + kPiece;  // rows begin in different banks

struct Collect {
  Problem p;
  Chunk chunk;
  State tail;                      // the columns behind the keys, or all of a hidden state
  int blocks = 1;                  // that share the columns
  int groups_each = 0;             // keys of each of them
  int tail_each = 0;               // and columns of the tail
  int splits = 1;                  // of the tokens
  const float* queries = nullptr;  // [b, h, t, D] absorbed; null: those of the problem
  bool together = false;           // clusters compute the weights
  const float* weights = nullptr;  // [b, h, t, S], where they are given
  float* sums = nullptr;           // [split, b, h, t, D]
  float2* seen = nullptr;          // [split, b, h, t]: greatest score and total of powers

  __host__ __device__ bool slim() const { return p.kind == Operator::kSlim; }
  __host__ __device__ int keys_each() const { return groups_each * static_cast<int>(p.K); }
  __host__ __device__ int columns_each() const { return keys_each() + tail_each; }
  // Bias, gain and shift of keys: as many of them as there are.
  __host__ __device__ int key_terms() const {
    return (p.key_bias != nullptr) + (p.key_gain != nullptr) + (p.key_shift != nullptr);
  }
  __host__ __device__ int parts() const { return p.type == Type::kFloat ? 2 : 1; }
  __host__ __device__ int angle_size() const { return p.type == Type::kFloat ? 4 : 2; }
  __host__ __device__ int share() const { return static_cast<int>(p.share()); }
  __host__ __device__ int rows() const { return static_cast<int>(p.H * chunk.tokens); }
  __host__ __device__ int row_blocks() const { return (rows() + kBlockRows - 1) / kBlockRows; }
  __host__ __device__ int tiles() const { return static_cast<int>((p.S + kTile - 1) / kTile); }
};

// Where everything lies in a block's shared memory, in bytes.
struct Room {
  int stride;       // numbers from row to row of a tile
  int angle_bytes;  // from row to row of cosines; odd in pieces, for rows to begin in different banks
  int tiles = 0, angles, weights, scales, scores, running, queries, terms, moments, parts, size;

  __host__ __device__ explicit Room(const Collect& c) {
    stride = (c.columns_each() / kPiece | 1) * kPiece;
    angle_bytes = (static_cast<int>(c.p.R / 2) * c.angle_size() / 16 | 1) * 16;
    const bool together = c.together;
    const std::int64_t keyed = c.groups_each * c.share() * c.chunk.tokens;
    const int own = c.slim() && keyed < kBlockRows ? static_cast<int>(keyed) : kBlockRows;
    angles = tiles + 2 * kTile * stride * 2;
    weights = angles + (together && c.p.R ? 4 * kTile * angle_bytes : 0);
    scales = weights + 2 * c.parts() * kBlockRows * kWeightStride * 2;
    scores = scales + (together ? 3 * kBlockRows * 4 : 0);
    running = scores + (together ? own * kTile * 4 : 0);
    queries = running + (together ? kBlockRows * 8 : 0);
    terms = queries;
    if (together) terms += own * (c.slim() ? static_cast<int>(c.p.K) * 4 : c.parts() * stride * 2);
    const bool normed = together && c.p.normed(), shared = normed && c.p.key_norm == Norm::kHeads;
    moments = terms + (together ? c.key_terms() * c.keys_each() * 4 : 0);
    parts = moments + (normed ? c.groups_each * kTile * 8 : 0);
    size = parts + (shared ? c.blocks * kTile * 8 : 0);
  }
};

}  // namespace onnx_tricks::cuda

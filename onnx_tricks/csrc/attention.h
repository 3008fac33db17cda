// One call of any of the three operators, as plain numbers and pointers: all that a kernel sees.
//
// Dimensions: B batch, T new tokens, P cached tokens, S = P + T, H heads in G groups that share
// keys, K width of a query head, V width of a value head, r width of the residual, R number of
// rotated channels of a key head. Seen as one thing, every way to cache is latent attention:
//
//   latent [S, D]   the cached rows: keys of all groups side by side, then the residual
//   (SlimAttention,
//                   D = G K + r); or states of the layer or the encoder (the others)
//   scores          SlimAttention: query . rotate(norm(key + key_bias) * key_gain + key_shift);
//                   the others: (query @ key_weight) . latent
//   output          softmax(softcap(scale * scores) + bias) @ latent @ value_weight + value_bias
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ONNX_TRICKS_ANYWHERE __host__ __device__  // may be called by both
#else
#define ONNX_TRICKS_ANYWHERE
#endif

namespace onnx_tricks {

enum class Operator { kSlim, kHidden, kCross };  // SlimAttention, SlimHiddenAttention, SlimCross...

// What keys are normalised over before they are rotated: each head, or all heads of a token.
enum class Norm : int { kNone, kHead, kHeads };

enum class Type : int { kFloat = 1, kHalf = 10, kDouble = 11, kBrief = 16 };  // ONNX's numbers

constexpr std::int64_t size_of(Type type) {
  return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
}

// Rows that live from step to step. All arrays are dense, [B, groups, length, width].
//
// Past and present are one buffer (`past == present`) where the caller bound it so; its length is
// then its capacity, and nothing but the new rows is to be written. Otherwise the past has P rows,
// which are to be copied, and the new ones behind them. SlimCrossAttention appends nothing: its
// `present` is the input, `past` and `fresh` are null.
struct State {
  std::int64_t groups = 0;          // 1 but for keys
  std::int64_t width = 0;           // channels of a row; 0 where there is no such state
  const void* past = nullptr;       // type `cache`
  std::int64_t past_length = 0;     // rows that `past` is laid out for, at least P
  const void* fresh = nullptr;      // [B, groups, T, width], type `type`
  void* present = nullptr;          // type `cache`
  std::int64_t present_length = 0;  // rows that `present` is laid out for, at least S

  bool in_place() const { return past == present; }
};

struct Problem {
  Operator kind = Operator::kSlim;
  Type type = Type::kFloat;   // queries, new rows, weights, bias, output
  Type cache = Type::kFloat;  // states

  std::int64_t B = 0, T = 0, P = 0, S = 0, H = 0, G = 0, K = 0, V = 0;
  std::int64_t D = 0;  // rows of a value weight: latent.groups * latent.width + residual.width
  std::int64_t R = 0;  // 0: keys are not rotated

  State latent;    // keys before rotation and bias; or states of the layer or the encoder
  State residual;  // SlimAttention only

  const void* query = nullptr;         // [B, H, T, K]
  const void* key_weight = nullptr;    // [G, K, D]; null for SlimAttention
  const void* value_weight = nullptr;  // [G, D, V]
  const void* key_bias = nullptr;      // [G, K] or null; so are the next two
  const void* key_gain = nullptr;      // only where keys are normalised
  const void* key_shift = nullptr;
  const void* value_bias = nullptr;    // [H, V] or null
  const void* cos = nullptr;           // [S, R / 2] for each row of the batch, or null
  const void* sin = nullptr;
  std::int64_t angle_stride = 0;      // elements from one row of the batch to the next; 0: shared
  const void* bias = nullptr;         // added to scores; null: none
  std::int64_t bias_strides[4] = {};  // of B, H, T, S in elements; 0 where it is broadcast

  float scale = 1;
  float softcap = 0;         // 0: none
  bool interleaved = false;  // neighbouring channels are rotated together, not those of two halves
  bool safe = false;         // rows in which everything is masked give zeros

  Norm key_norm = Norm::kNone;
  bool key_centered = false;  // the norm takes off the mean
  float key_epsilon = 0;      // is added to the mean square

  void* output = nullptr;  // [B, T, H, V]

  ONNX_TRICKS_ANYWHERE bool normed() const { return key_norm != Norm::kNone; }

  // Nothing to compute, though present states may have to be written: no numbers of an output.
  bool empty() const { return !(B && T && H && V); }
  ONNX_TRICKS_ANYWHERE std::int64_t share() const { return H / G; }  // heads of one group

  // Of the keys of one token.
  ONNX_TRICKS_ANYWHERE std::int64_t norms() const { return key_norm == Norm::kHead ? G : 1; }
};

}  // namespace onnx_tricks

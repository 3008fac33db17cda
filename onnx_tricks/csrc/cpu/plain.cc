// Plain loops for doubles, straight from the definition: for proofs, at no particular speed.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "level.h"

namespace onnx_tricks::cpu {
namespace {

class Plain {
 public:
  explicit Plain(const Problem& problem)
      : p_(problem), moments_(problem.normed() ? problem.B * problem.norms() * problem.S : 0) {}

  void append(const State& state, std::int64_t row) const {
    const auto* past =
        static_cast<const double*>(state.past) + row * state.past_length * state.width;
    const auto* fresh = static_cast<const double*>(state.fresh) + row * p_.T * state.width;
    auto* present = static_cast<double*>(state.present) + row * state.present_length * state.width;
    if (!state.in_place()) std::memcpy(present, past, p_.P * state.width * sizeof(double));
    for (std::int64_t i = 0; i < p_.T * state.width; ++i)
      present[p_.P * state.width + i] = fresh[i];
  }

  // Of the keys of one row of the batch that are normalised together.
  void measure(std::int64_t b, std::int64_t norm) {
    const std::int64_t groups = p_.G / p_.norms(), first = norm * groups;
    const auto mean = [&](std::int64_t s, auto&& term) {
      double sum = 0;
      for (std::int64_t g = first; g < first + groups; ++g)
        for (std::int64_t k = 0; k < p_.K; ++k) sum += term(biased(b, g, s, k));
      return sum / double(groups * p_.K);
    };
    for (std::int64_t s = 0; s < p_.S; ++s) {
      Moments& of = moments_[(b * p_.norms() + norm) * p_.S + s];
      of.mean = p_.key_centered ? mean(s, [](double x) { return x; }) : 0;
      const double square = mean(s, [&](double x) { return (x - of.mean) * (x - of.mean); });
      of.scale = 1 / std::sqrt(square + double(p_.key_epsilon));
    }
  }

  void attend(std::int64_t b, std::int64_t h) const {
    const std::int64_t g = h / p_.share();
    const auto* query = static_cast<const double*>(p_.query) + (b * p_.H + h) * p_.T * p_.K;
    std::vector<double> row(p_.kind == Operator::kSlim ? p_.K : p_.D), scores(p_.S), sums(p_.D);
    for (std::int64_t t = 0; t < p_.T; ++t, query += p_.K) {
      load_query(query, g, row);
      double most = -std::numeric_limits<double>::infinity(), total = 0;
      for (std::int64_t s = 0; s < p_.S; ++s) {
        scores[s] = score(row, b, g, s) * double(p_.scale);
        if (p_.softcap != 0)
          scores[s] = double(p_.softcap) * std::tanh(scores[s] / double(p_.softcap));
        if (p_.bias) {
          const std::int64_t* strides = p_.bias_strides;
          scores[s] += double(static_cast<const double*>(
              p_.bias)[b * strides[0] + h * strides[1] + t * strides[2] + s * strides[3]]);
        }
        most = std::max(most, scores[s]);
      }
      std::fill(sums.begin(), sums.end(), double(0));
      for (std::int64_t s = 0; s < p_.S; ++s) {
        const double weight = std::exp(scores[s] - most);
        total += weight;
        for (std::int64_t d = 0; d < p_.D; ++d) sums[d] += weight * latent(b, s, d);
      }
      const bool nothing = p_.S == 0 || (p_.safe && !(total > 0));
      auto* output = static_cast<double*>(p_.output) + ((b * p_.T + t) * p_.H + h) * p_.V;
      const auto* weight = static_cast<const double*>(p_.value_weight) + g * p_.D * p_.V;
      for (std::int64_t v = 0; v < p_.V; ++v) {
        double sum = 0;
        for (std::int64_t d = 0; d < p_.D; ++d) sum += sums[d] * double(weight[d * p_.V + v]);
        sum = nothing ? double(0) : sum / total;
        if (p_.value_bias && !(nothing && p_.safe))
          sum += double(static_cast<const double*>(p_.value_bias)[h * p_.V + v]);
        output[v] = sum;
      }
    }
  }

 private:
  struct Moments {
    double mean, scale;
  };

  double cached(const State& state, std::int64_t b, std::int64_t g, std::int64_t s,
                std::int64_t c) const {
    const std::int64_t row = (b * state.groups + g) * state.present_length + s;
    return double(static_cast<const double*>(state.present)[row * state.width + c]);
  }

  double latent(std::int64_t b, std::int64_t s, std::int64_t d) const {
    const std::int64_t width = p_.latent.groups * p_.latent.width;
    return d < width ? cached(p_.latent, b, d / p_.latent.width, s, d % p_.latent.width)
                     : cached(p_.residual, b, 0, s, d - width);
  }

  void load_query(const double* query, std::int64_t g, std::vector<double>& row) const {
    if (p_.kind == Operator::kSlim) {
      for (std::int64_t k = 0; k < p_.K; ++k) row[k] = double(query[k]);
      return;
    }
    const auto* weight = static_cast<const double*>(p_.key_weight) + g * p_.K * p_.D;
    std::fill(row.begin(), row.end(), double(0));
    for (std::int64_t k = 0; k < p_.K; ++k)
      for (std::int64_t d = 0; d < p_.D; ++d)
        row[d] += double(query[k]) * double(weight[k * p_.D + d]);
  }

  double biased(std::int64_t b, std::int64_t g, std::int64_t s, std::int64_t k) const {
    double value = cached(p_.latent, b, g, s, k);
    if (p_.key_bias) value += double(static_cast<const double*>(p_.key_bias)[g * p_.K + k]);
    return value;
  }

  // Before its rotation.
  double key(std::int64_t b, std::int64_t g, std::int64_t s, std::int64_t k) const {
    double value = biased(b, g, s, k);
    if (!p_.normed()) return value;
    const std::int64_t norm = g * p_.norms() / p_.G;
    const Moments& of = moments_[(b * p_.norms() + norm) * p_.S + s];
    value = (value - of.mean) * of.scale;
    if (p_.key_gain) value *= double(static_cast<const double*>(p_.key_gain)[g * p_.K + k]);
    if (p_.key_shift) value += double(static_cast<const double*>(p_.key_shift)[g * p_.K + k]);
    return value;
  }

  double score(const std::vector<double>& row, std::int64_t b, std::int64_t g,
               std::int64_t s) const {
    double sum = 0;
    if (p_.kind != Operator::kSlim) {
      for (std::int64_t d = 0; d < p_.D; ++d) sum += row[d] * cached(p_.latent, b, 0, s, d);
      return sum;
    }
    const std::int64_t half = p_.R / 2, angles = b * p_.angle_stride + s * half;
    for (std::int64_t i = 0; i < half; ++i) {
      const std::int64_t one = p_.interleaved ? 2 * i : i;
      const std::int64_t two = p_.interleaved ? 2 * i + 1 : i + half;
      const double cos = double(static_cast<const double*>(p_.cos)[angles + i]);
      const double sin = double(static_cast<const double*>(p_.sin)[angles + i]);
      const double x = key(b, g, s, one), y = key(b, g, s, two);
      sum += row[one] * (x * cos - y * sin) + row[two] * (y * cos + x * sin);
    }
    for (std::int64_t k = p_.R; k < p_.K; ++k) sum += row[k] * key(b, g, s, k);
    return sum;
  }

  const Problem& p_;
  std::vector<Moments> moments_;  // [B, norms, S]
};

}  // namespace

void attend_plain(const Problem& p, const Parallel& parallel) {
  Plain plain(p);
  for (const State* state : {&p.latent, &p.residual}) {
    if (p.kind == Operator::kCross || !state->width) continue;
    auto append = [&](std::size_t row) { plain.append(*state, static_cast<std::int64_t>(row)); };
    parallel(static_cast<std::size_t>(p.B * state->groups), append);
  }
  if (p.empty()) return;
  if (p.normed()) {
    auto measure = [&](std::size_t i) {
      plain.measure(static_cast<std::int64_t>(i) / p.norms(),
                    static_cast<std::int64_t>(i) % p.norms());
    };
    parallel(static_cast<std::size_t>(p.B * p.norms()), measure);
  }
  auto attend = [&](std::size_t i) {
    plain.attend(static_cast<std::int64_t>(i) / p.H, static_cast<std::int64_t>(i) % p.H);
  };
  parallel(static_cast<std::size_t>(p.B * p.H), attend);
}

}  // namespace onnx_tricks::cpu

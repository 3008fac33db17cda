#include "attend.h"

#include "few_rows.cuh"
#include "plan.h"
#include "product.cuh"
#include "prompt.cuh"
#include "rows.cuh"

namespace onnx_tricks::cuda {
namespace {

// What went wrong first; nothing is launched behind it.
class Errors {
 public:
  template <class Launch>
  void operator()(const Launch& launch) {
    if (!first_) first_ = launch();
  }
  const char* first() const { return first_; }

 private:
  const char* first_ = nullptr;
};

class Attention {
 public:
  Attention(const Problem& p, const Device& device, void* stream, void* scratch)
      : p_(p), plan_(p, device, scratch), stream_(stream) {}

  const char* run() {
    if (p_.kind != Operator::kCross)
      for (const State* state : {&p_.latent, &p_.residual}) append(*state);
    if (p_.empty()) return errors_.first();
    if (p_.normed() && plan_.path != Path::kCluster)
      each(measure_keys, p_.B * p_.norms() * p_.S * 32, p_, moments());
    const Chunk& most = plan_.chunk;
    for (std::int64_t b = 0; b < p_.B; b += most.batch) {
      chunk_.first = b;
      chunk_.batch = std::min(most.batch, p_.B - b);
      if (plan_.prompt()) {
        p_.type == Type::kHalf ? attend_prompt<Half>() : attend_prompt<Brief>();
        continue;
      }
      if (plan_.expand) expand();
      for (std::int64_t t = 0; t < p_.T; t += most.tokens) {
        chunk_.start = t;
        chunk_.tokens = std::min(most.tokens, p_.T - t);
        if (!slim() && !plan_.expand) absorb();
        if (plan_.path != Path::kCluster) score();
        plan_.expand ? attend_expanded() : attend_absorbed();
        each(write_output, chunk_.rows(p_) * p_.V, p_, chunk_, plan_.outputs, plan_.output_parts,
             plan_.totals);
      }
    }
    return errors_.first();
  }

 private:
  bool slim() const { return p_.kind == Operator::kSlim; }

  float2* moments() const { return reinterpret_cast<float2*>(plan_.moments); }

  template <class... Parameters, class... Arguments>
  void each(void (*kernel)(Parameters...), std::int64_t count, const Arguments&... arguments) {
    errors_([&] {
      return launch(kernel, blocks_for(count), kThreads, 0, 1, stream_, arguments...);
    });
  }

  template <class A, class B>
  void multiply(const Product<A, B>& product) {
    errors_([&] { return multiply_all(product, stream_); });
  }

  void multiply_weights(const Product<Matrix, Matrix>& product) {
    errors_([&] { return cuda::multiply_weights(product, stream_); });
  }

  void append(const State& state) {
    const std::int64_t rows = p_.B * state.groups, size = size_of(p_.cache);
    const std::int64_t past = p_.P * state.width, fresh = p_.T * state.width;
    const std::int64_t past_stride = state.past_length * state.width;
    const std::int64_t stride = state.present_length * state.width;
    const auto copy = [&](auto unit) {
      using Unit = decltype(unit);
      const auto units = [&](std::int64_t count) { return count * size / std::int64_t{sizeof(Unit)}; };
      each(copy_past<Unit>, rows * units(past), static_cast<const Unit*>(state.past),
           static_cast<Unit*>(state.present), rows, units(past), units(past_stride), units(stride));
    };
    const auto places = reinterpret_cast<std::uintptr_t>(state.past) |
                        reinterpret_cast<std::uintptr_t>(state.present) |
                        static_cast<std::uintptr_t>(state.width * size);
    if (!state.in_place()) places % 16 ? copy(std::uint16_t{}) : copy(uint4{});
    each(append_fresh, rows * fresh, Numbers{state.fresh, p_.type},
         Numbers{state.present, p_.cache}, rows, fresh, past, stride);
  }

  // Rows of all heads of a group in a scratch array [b, h, t, width].
  Matrix rows(const float* data, std::int64_t width, std::int64_t groups) const {
    Matrix m{{data, Type::kFloat}};
    m.groups = groups;
    m.batch_stride = p_.H * chunk_.tokens * width;
    m.group_stride = m.batch_stride / groups;
    m.row_stride = width;
    return m;
  }

  // The same of all rows of the batch at once.
  Matrix rows_of_group(const float* data, std::int64_t width, std::int64_t parts) const {
    Matrix m = rows(data, width, p_.G);
    m.fold = p_.share() * chunk_.tokens;
    m.fold_stride = m.batch_stride;
    m.parts = parts;
    m.part_stride = chunk_.rows(p_) * width;
    return m;
  }

  Matrix query() const {
    const std::int64_t head = p_.T * p_.K;
    Matrix m{{at(p_.query, p_.type, chunk_.first * p_.H * head + chunk_.start * p_.K), p_.type}};
    m.groups = p_.G;
    m.batch_stride = p_.H * head;
    m.group_stride = p_.share() * head;
    m.fold = chunk_.tokens;
    m.fold_stride = head;
    m.row_stride = p_.K;
    return m;
  }

  // Weights [G, high, wide], or transposed.
  Matrix weight(const void* data, std::int64_t high, std::int64_t wide, bool transposed) const {
    Matrix m{{data, p_.type}};
    m.groups = p_.G;
    m.group_stride = high * wide;
    m.row_stride = transposed ? 1 : wide;
    m.column_stride = transposed ? wide : 1;
    return m;
  }

  // Expanded keys or values [b, g, S, width].
  Matrix expanded(const float* data, std::int64_t width) const {
    Matrix m{{data, Type::kFloat}};
    m.groups = p_.G;
    m.group_stride = p_.S * width;
    m.batch_stride = p_.G * m.group_stride;
    m.row_stride = width;
    return m;
  }

  static Matrix transposed(Matrix m) {
    std::swap(m.row_stride, m.column_stride);
    return m;
  }

  Latent latent(std::int64_t groups) const {
    const State none;
    return {slim() ? p_.latent : none, slim() ? p_.residual : p_.latent, p_.cache, chunk_.first, groups};
  }

  static const void* at(const void* data, Type type, std::int64_t i) {
    return static_cast<const char*>(data) + i * size_of(type);
  }

  std::int64_t group_rows() const { return p_.share() * chunk_.tokens; }

  void expand() {
    const std::int64_t matrices = chunk_.batch * p_.G;
    multiply(Product<Latent, Matrix>{latent(p_.G), weight(p_.value_weight, p_.D, p_.V, false),
                                     expanded(plan_.values, p_.V), matrices, p_.S, p_.V, p_.D, 1});
    if (slim()) return expand_cached_keys<float>();
    multiply(Product<Latent, Matrix>{latent(p_.G), weight(p_.key_weight, p_.K, p_.D, true),
                                     expanded(plan_.keys, p_.K), matrices, p_.S, p_.K, p_.D, 1});
  }

  template <class T>
  void expand_cached_keys() {
    const std::int64_t count = chunk_.batch * p_.G * p_.S * p_.K;
    each(expand_keys<T>, count, Keys{p_, chunk_.first, moments()}, count, reinterpret_cast<T*>(plan_.keys));
  }

  template <class T>
  void attend_prompt() {
    const auto expand = [&](auto* kernel, const void* weight, float* target, std::int64_t columns) {
      const Expansion e{latent(p_.G), weight, target, chunk_.batch * p_.G, p_.S, p_.D, columns};
      errors_([&] { return launch(kernel, e.blocks(), kThreads, kExpandMemory, 1, stream_, e); });
    };
    expand(expand_states<T, false>, p_.value_weight, plan_.values, p_.V);
    if (slim()) expand_cached_keys<T>();
    else expand(expand_states<T, true>, p_.key_weight, plan_.keys, p_.K);
    errors_([&] { return launch_prompt<T>({p_, chunk_, plan_.keys, plan_.values}, stream_); });
  }

  // Weights [b, h, t, S].
  void score() {
    const std::int64_t matrices = chunk_.batch * p_.G;
    const Matrix scores = rows(plan_.scores, p_.S, p_.G);
    if (plan_.expand) {
      multiply(Product<Matrix, Matrix>{query(), transposed(expanded(plan_.keys, p_.K)), scores,
                                       matrices, group_rows(), p_.S, p_.K, 1});
    } else if (slim()) {
      multiply(Product<Matrix, Keys>{query(), {p_, chunk_.first, moments()}, scores, matrices,
                                     group_rows(), p_.S, p_.K, 1});
    } else {
      const std::int64_t stride = p_.latent.present_length * p_.D;
      Matrix latent{{at(p_.latent.present, p_.cache, chunk_.first * stride), p_.cache}};
      latent.batch_stride = stride;
      latent.row_stride = p_.D;
      multiply(Product<Matrix, Matrix>{rows(plan_.queries, p_.D, 1), transposed(latent),
                                       rows(plan_.scores, p_.S, 1), chunk_.batch,
                                       p_.H * chunk_.tokens, p_.S, p_.D, 1});
    }
    const int threads = p_.S < 4 * kMostSoftmaxThreads ? kThreads : kMostSoftmaxThreads;
    errors_([&] {
      return launch(softmax, chunk_.rows(p_), threads, sizeof(float) * threads / 32, 1, stream_, p_,
                    chunk_, plan_.scores, plan_.totals);
    });
  }

  // Single tokens of all rows of the batch make one product, which reads the weights once.
  void absorb() {
    const Matrix weights = weight(p_.key_weight, p_.K, p_.D, false);
    if (p_.T > 1)
      return multiply_weights({query(), weights, rows(plan_.queries, p_.D, p_.G),
                               chunk_.batch * p_.G, group_rows(), p_.D, p_.K, 1});
    Matrix queries = query();
    queries.row_stride = p_.K;
    queries.fold = p_.share();
    queries.fold_stride = queries.batch_stride;
    multiply_weights({queries, weights, rows_of_group(plan_.queries, p_.D, 1), p_.G,
                      chunk_.batch * group_rows(), p_.D, p_.K, 1});
  }

  void attend_expanded() {
    Matrix outputs = rows(plan_.outputs, p_.V, p_.G);
    outputs.part_stride = chunk_.rows(p_) * p_.V;
    multiply(Product<Matrix, Matrix>{rows(plan_.scores, p_.S, p_.G), expanded(plan_.values, p_.V),
                                     outputs, chunk_.batch * p_.G, group_rows(), p_.V, p_.S,
                                     plan_.output_parts});
  }

  void attend_absorbed() {
    std::int64_t parts = plan_.sum_parts;
    if (plan_.path == Path::kPlain) {
      Matrix sums = rows(plan_.sums, p_.D, 1);
      sums.part_stride = chunk_.rows(p_) * p_.D;
      multiply(Product<Matrix, Latent>{rows(plan_.scores, p_.S, 1), latent(1), sums, chunk_.batch,
                                       p_.H * chunk_.tokens, p_.D, p_.S, parts});
    } else {
      p_.cache == Type::kHalf ? collect<Half>() : collect<Brief>();
      if (plan_.path == Path::kCluster) parts = 1;
    }
    multiply_weights({rows_of_group(plan_.sums, p_.D, parts),
                      weight(p_.value_weight, p_.D, p_.V, false),
                      rows_of_group(plan_.outputs, p_.V, 1), p_.G, chunk_.batch * group_rows(), p_.V,
                      p_.D, plan_.output_parts});
  }

  template <class T>
  void collect() {
    Collect c = plan_.collect;
    c.chunk = chunk_;
    c.queries = plan_.queries;
    c.weights = plan_.scores;
    c.sums = plan_.sums;
    c.seen = reinterpret_cast<float2*>(plan_.seen);
    const std::int64_t blocks = c.blocks * c.row_blocks() * c.splits * chunk_.batch;
    errors_([&] {
      return launch(c.together ? cuda::collect<T, true> : cuda::collect<T, false>, blocks, kThreads,
                    static_cast<std::size_t>(Room(c).size), c.together ? c.blocks : 1, stream_, c);
    });
    if (c.together)
      each(combine, chunk_.rows(p_) * p_.D, p_, chunk_.rows(p_), c.splits, c.seen, plan_.sums,
           plan_.totals);
  }

  const Problem& p_;
  const Plan plan_;
  void* const stream_;
  Chunk chunk_;
  Errors errors_;
};

}  // namespace

std::size_t scratch_size(const Problem& problem) {
  return static_cast<std::size_t>(Plan(problem, Device(), nullptr).floats) * sizeof(float);
}

const char* attend(const Problem& problem, void* stream, void* scratch) {
  return Attention(problem, Device(), stream, scratch).run();
}

}  // namespace onnx_tricks::cuda

// Calls the operators' arguments and kernels with random inputs, most of them wrong.
//
//     fuzz SECONDS SEED
//
// Stands in for ONNX Runtime: a table with the few functions that a kernel calls. Built with
// address and undefined-behaviour sanitizers, which say what goes wrong.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/level.h"

using namespace onnx_tricks;

namespace {

struct FakeTensor {
  int type;
  std::vector<std::int64_t> dims;
  std::unique_ptr<char[]> data;  // exactly as large as the shape says
  void* at;                      // `data`, or that of the tensor which this one shares it with
};

struct FakeContext {
  std::vector<std::unique_ptr<FakeTensor>> inputs, outputs;
  const FakeTensor* bound[3] = {};  // inputs whose memory the caller bound as outputs
};

// What the opaque types of the interface are here.
template <class To, class From>
To as(From from) {
  return reinterpret_cast<To>(from);
}

std::size_t bytes(int type, const std::vector<std::int64_t>& dims) {
  std::size_t count = 1;
  for (const std::int64_t dim : dims) count *= static_cast<std::size_t>(dim);
  return count * static_cast<std::size_t>(size_of(static_cast<Type>(type)));
}

constexpr const char* kMismatch = "a bound output has another shape";

ort::Status* make_status(int, const char* text) { return as<ort::Status*>(new std::string(text)); }

ort::Status* input_count(const ort::KernelContext* context, std::size_t* count) {
  *count = as<const FakeContext*>(context)->inputs.size();
  return nullptr;
}

ort::Status* input(const ort::KernelContext* context, std::size_t i, const ort::Value** value) {
  *value = as<const ort::Value*>(as<const FakeContext*>(context)->inputs[i].get());
  return nullptr;
}

ort::Status* output(ort::KernelContext* context, std::size_t i, const std::int64_t* dims,
                    std::size_t rank, ort::Value** value) {
  auto& self = *as<FakeContext*>(context);
  auto& made = self.outputs[i];
  made->dims.assign(dims, dims + rank);
  if (self.bound[i]) {
    // The runtime takes no buffer of another shape either.
    if (made->dims != self.bound[i]->dims) return make_status(0, kMismatch);
    made->at = self.bound[i]->at;
  } else {
    made->data.reset(new char[bytes(made->type, made->dims)]);
    made->at = made->data.get();
  }
  *value = as<ort::Value*>(made.get());
  return nullptr;
}

ort::Status* tensor_data(ort::Value* value, void** data) {
  *data = as<FakeTensor*>(value)->at;
  return nullptr;
}

ort::Status* tensor_info(const ort::Value* value, ort::TensorInfo** info) {
  *info = as<ort::TensorInfo*>(const_cast<ort::Value*>(value));
  return nullptr;
}

ort::Status* element_type(const ort::TensorInfo* info, int* type) {
  *type = as<const FakeTensor*>(info)->type;
  return nullptr;
}

ort::Status* rank(const ort::TensorInfo* info, std::size_t* count) {
  *count = as<const FakeTensor*>(info)->dims.size();
  return nullptr;
}

ort::Status* dims(const ort::TensorInfo* info, std::int64_t* to, std::size_t count) {
  const auto& from = as<const FakeTensor*>(info)->dims;
  for (std::size_t i = 0; i < count; ++i) to[i] = from[i];
  return nullptr;
}

void release_tensor_info(ort::TensorInfo*) {}

const ort::Api* make_api() {
  static void* slots[300];
#define STAND_IN(name, official, slot, ...) \
  if (!std::strcmp(#name, wanted)) slots[slot] = function;
  const auto set = [&](const char* wanted, void* function) { ONNX_TRICKS_ORT_FUNCTIONS(STAND_IN) };
  set("create_status", as<void*>(&make_status));
  set("input_count", as<void*>(&input_count));
  set("input", as<void*>(&input));
  set("output", as<void*>(&output));
  set("tensor_data", as<void*>(&tensor_data));
  set("tensor_info", as<void*>(&tensor_info));
  set("element_type", as<void*>(&element_type));
  set("rank", as<void*>(&rank));
  set("dims", as<void*>(&dims));
  set("release_tensor_info", as<void*>(&release_tensor_info));
  return as<const ort::Api*>(&slots);
}

struct Serial final : cpu::Parallel {
  explicit Serial(int count) { threads = count; }

  void run(std::size_t count, void (*task)(void*, std::size_t), void* data) const override {
    for (std::size_t i = 0; i < count; ++i) task(data, i);
  }
};

class Fuzzer {
 public:
  explicit Fuzzer(unsigned seed) : random_(seed) {}

  void once() {
    const Signature& signature = kSignatures[below(3)];
    static constexpr std::pair<Type, Type> kTypes[] = {
        {Type::kFloat, Type::kFloat}, {Type::kFloat, Type::kHalf},  {Type::kFloat, Type::kBrief},
        {Type::kHalf, Type::kHalf},   {Type::kBrief, Type::kBrief}, {Type::kDouble, Type::kDouble}};
    Problem problem;
    std::tie(problem.type, problem.cache) = kTypes[below(6)];
    problem.scale = 0.25f;
    problem.softcap = below(2) ? 3.0f : 0.0f;
    problem.interleaved = below(2);
    problem.safe = below(2);
    problem.key_norm = static_cast<Norm>(below(below(8) ? 3 : 5));
    problem.key_centered = below(2);
    problem.key_epsilon = below(4) ? 1e-5f : 0.0f;
    choose_sizes();
    FakeContext context;
    make_inputs(signature, problem, context);
    make_outputs(signature, problem, context);
    static const ort::Api* api = make_api();
    auto* status = read_arguments(api, as<ort::KernelContext*>(&context), signature, problem);
    if (status) {
      auto* text = as<std::string*>(status);
      if (*text != kMismatch && text->rfind(std::string(signature.name) + ": ", 0) != 0)
        fail("a message without the operator's name", *text);
      delete text;
      ++refused;
      return;
    }
    static cpu::Attend* const levels[] = {
        cpu::attend_portable,
#ifdef ONNX_TRICKS_X86
        __builtin_cpu_supports("avx2") ? cpu::attend_avx2 : cpu::attend_portable,
        __builtin_cpu_supports("avx512bw") ? cpu::attend_avx512 : cpu::attend_portable,
#endif
    };
    cpu::Attend* const attend =
        problem.type == Type::kDouble ? cpu::attend_plain : levels[below(std::size(levels))];
    attend(problem, Serial(1 + static_cast<int>(below(4))));
    ++run;
  }

  long run = 0, refused = 0;

 private:
  [[noreturn]] static void fail(const char* what, const std::string& text) {
    std::fprintf(stderr, "%s: %s\n", what, text.c_str());
    std::abort();
  }

  std::size_t below(std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_);
  }

  std::int64_t one_of(std::initializer_list<std::int64_t> values) {
    return values.begin()[below(values.size())];
  }

  // A number for every letter of the signatures.
  void choose_sizes() {
    const auto set = [&](char letter, std::int64_t value) {
      sizes_[static_cast<int>(letter)] = value;
    };
    const std::int64_t G = one_of({1, 2, 3}), K = one_of({0, 1, 6, 8, 32}), r = one_of({0, 1, 4, 16});
    const std::int64_t T = one_of({0, 1, 1, 2, 7, 40}), P = one_of({0, 1, 5, 70, 300});
    set('B', one_of({0, 1, 1, 2, 3}));
    set('G', G);
    set('H', G * one_of({0, 1, 1, 2}));
    set('K', K);
    set('T', T);
    set('S', P + T);
    // The past as long as it is, or a buffer: with too little room once in a while.
    buffer_ = below(3) == 0;
    set('C', buffer_ ? P + T + one_of({-1, 0, 3}) : P);
    if (sizes_['C'] < 0) set('C', 0);
    set('V', one_of({0, 1, 5, 16, 33}));
    set('r', r);
    set('A', one_of({0, 1, K / 2}));
    hidden_ = one_of({0, 1, 8, 33, 64});
    latent_ = G * K + r;
  }

  void make_inputs(const Signature& signature, const Problem& problem, FakeContext& context) {
    sizes_['D'] = signature.kind == Operator::kSlim ? latent_ : hidden_;
    const bool residual = below(2), angles = below(2);
    if (signature.kind == Operator::kSlim && !residual) sizes_['D'] -= sizes_['r'];
    const bool spoil = below(3) == 0;
    const std::size_t spoilt = below(signature.input_count);
    for (std::size_t i = 0; i < signature.input_count; ++i) {
      const Tensor& tensor = signature.inputs[i];
      const std::string name = tensor.name;
      const bool pair = name.find("residual") != name.npos ? residual
                        : name == "cos" || name == "sin"   ? angles
                                                           : below(2);
      if (tensor.optional && !pair) {
        context.inputs.push_back(nullptr);
        continue;
      }
      auto made = std::make_unique<FakeTensor>();
      made->type = static_cast<int>(tensor.cached ? problem.cache : problem.type);
      made->dims = *tensor.dims == '*' ? bias_dims() : dims_of(tensor.dims);
      if (spoil && i == spoilt) this->spoil(context, *made);
      fill(*made);
      context.inputs.push_back(std::move(made));
    }
    if (spoil && below(8) == 0) context.inputs[spoilt] = nullptr;
    while (!context.inputs.empty() && !context.inputs.back()) context.inputs.pop_back();
  }

  std::vector<std::int64_t> dims_of(const char* letters) {
    std::vector<std::int64_t> dims;
    for (const char* letter = letters; *letter; ++letter)
      dims.push_back(*letter == '1'   ? 1
                     : *letter == 'b' ? (below(2) ? 1 : sizes_['B'])
                                      : sizes_[static_cast<int>(*letter)]);
    return dims;
  }

  std::vector<std::int64_t> bias_dims() {
    std::vector<std::int64_t> dims = {sizes_['B'], sizes_['H'], sizes_['T'], sizes_['S']};
    for (int axis = 0; axis < 4; ++axis)
      if (below(2)) dims[static_cast<std::size_t>(axis)] = 1;
    dims.erase(dims.begin(), dims.begin() + static_cast<std::ptrdiff_t>(below(5)));
    return dims;
  }

  void spoil(FakeContext&, FakeTensor& tensor) {
    switch (below(4)) {
      case 0:
        tensor.dims.push_back(1);
        break;
      case 1:
        if (!tensor.dims.empty()) tensor.dims.pop_back();
        break;
      case 2:
        if (!tensor.dims.empty()) tensor.dims[below(tensor.dims.size())] = one_of({0, 1, 2, 9});
        break;
      default:
        tensor.type = one_of({1, 10, 11, 16}) & 31;
    }
  }

  void fill(FakeTensor& tensor) {
    const std::size_t size = bytes(tensor.type, tensor.dims);
    tensor.data.reset(new char[size]);
    tensor.at = tensor.data.get();
    std::normal_distribution<float> normal;
    const bool wild = below(8) == 0;
    for (std::size_t i = 0; i + 1 < size; i += 2) {
      // The upper half of a float makes a number of every type: any at all, or one near 1.
      const float number = normal(random_);
      std::uint32_t bits;
      std::memcpy(&bits, &number, 4);
      const auto half = static_cast<std::uint16_t>(wild ? random_() : bits >> 16 & 0xbfff);
      std::memcpy(tensor.data.get() + i, &half, 2);
    }
  }

  void make_outputs(const Signature& signature, const Problem& problem, FakeContext& context) {
    for (std::size_t i = 0; i < signature.output_count; ++i) {
      context.outputs.push_back(std::make_unique<FakeTensor>());
      const Type type = signature.outputs[i].cached ? problem.cache : problem.type;
      context.outputs.back()->type = static_cast<int>(type);
    }
    if (!buffer_ || !below(2) || signature.kind == Operator::kCross) return;
    // One buffer for past and present, where it is large enough to be one.
    const std::size_t pasts[] = {2, 8};
    for (std::size_t i = 0; i < signature.output_count - 1; ++i) {
      const std::size_t past = pasts[i];
      if (past >= context.inputs.size() || !context.inputs[past]) continue;
      const FakeTensor& tensor = *context.inputs[past];
      const bool whole = tensor.type == static_cast<int>(problem.cache) &&
                         tensor.dims == dims_of(signature.inputs[past].dims);
      if (whole && sizes_['C'] >= sizes_['S']) context.bound[i + 1] = &tensor;
    }
  }

  std::mt19937 random_;
  std::int64_t sizes_[128] = {}, hidden_ = 0, latent_ = 0;
  bool buffer_ = false;
};

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 5;
  Fuzzer fuzzer(count > 2 ? static_cast<unsigned>(std::atoi(arguments[2])) : 0);
  const auto start = std::chrono::steady_clock::now();
  const std::chrono::duration<double> limit(seconds);
  while (std::chrono::steady_clock::now() - start < limit) fuzzer.once();
  std::printf("%ld run, %ld refused\n", fuzzer.run, fuzzer.refused);
  return 0;
}

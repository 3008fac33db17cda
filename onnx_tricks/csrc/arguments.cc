#include "arguments.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace onnx_tricks {
namespace {

using Dims = std::vector<std::int64_t>;

// No dimension of a tensor that exists comes near; below it no product of two overflows.
constexpr std::int64_t kMostRows = std::int64_t{1} << 31;
constexpr std::int64_t kUnknown = -1;

std::string spell(const Dims& dims) {
  std::string text = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

const char* spell(Type type) {
  switch (type) {
    case Type::kFloat:
      return "float";
    case Type::kHalf:
      return "float16";
    case Type::kDouble:
      return "double";
    case Type::kBrief:
      return "bfloat16";
  }
  return "another type";
}

// A complaint; empty if there is none.
using Complaint = std::string;

// Which number stands for which letter.
class Letters {
 public:
  Letters() { numbers_.fill(kUnknown); }

  std::int64_t operator[](char letter) const { return numbers_[index(letter)]; }
  void set(char letter, std::int64_t number) { numbers_[index(letter)] = number; }
  bool knows(char letter) const { return (*this)[letter] != kUnknown; }

  // Whether the dimensions are what the letters stand for; learns letters that are new.
  bool match(const char* letters, const Dims& dims) {
    if (dims.size() != std::strlen(letters)) return false;
    for (std::size_t i = 0; i < dims.size(); ++i) {
      const char letter = letters[i];
      if (dims[i] < 0 || dims[i] >= kMostRows) return false;
      if (letter == '1' || (letter == 'b' && dims[i] == 1)) {
        if (dims[i] != 1) return false;
        continue;
      }
      const char known = letter == 'b' ? 'B' : letter;
      if (!knows(known)) set(known, dims[i]);
      if ((*this)[known] != dims[i]) return false;
    }
    return true;
  }

  // "[B, H, 1, K] with B = 2, H = 4", for messages.
  std::string spell(const char* letters) const {
    std::string shape, known;
    for (const char* letter = letters; *letter; ++letter) {
      shape +=
          (letter == letters ? "" : ", ") + (*letter == 'b' ? "B or 1" : std::string(1, *letter));
      const char name = *letter == 'b' ? 'B' : *letter;
      if (name == '1' || !knows(name)) continue;
      known += (known.empty() ? " with " : ", ");
      known += std::string(1, name) + " = " + std::to_string((*this)[name]);
    }
    return "[" + shape + "]" + known;
  }

 private:
  static std::size_t index(char letter) { return static_cast<unsigned char>(letter) % 128; }
  std::array<std::int64_t, 128> numbers_;
};

struct Argument {
  void* data = nullptr;
  Dims dims;
};

ort::Status* shape_of(const ort::Api* api, const ort::TensorInfo* info, Dims& dims) {
  std::size_t rank = 0;
  if (auto* status = ort::rank(api, info, &rank)) return status;
  dims.resize(rank);
  return ort::dims(api, info, dims.data(), rank);
}

// Looks at the inputs of one call.
class Reader {
 public:
  Reader(const ort::Api* api, ort::KernelContext* context, const Signature& signature, Problem& p)
      : api_(api), context_(context), signature_(signature), p_(p) {}

  ort::Status* read() {
    if (auto* status = read_inputs()) return status;
    std::string complaint = check();
    if (!complaint.empty()) return fail(complaint);
    fill();
    return make_outputs();
  }

 private:
  ort::Status* fail(const std::string& complaint) const {
    const std::string message = std::string(signature_.name) + ": " + complaint;
    return ort::create_status(api_, int{ort::kInvalidArgument}, message.c_str());
  }

  const Argument* find(const char* name) const {
    for (std::size_t i = 0; i < signature_.input_count; ++i)
      if (!std::strcmp(signature_.inputs[i].name, name)) return present_[i] ? &inputs_[i] : nullptr;
    return nullptr;
  }

  const void* data(const char* name) const {
    const Argument* argument = find(name);
    return argument ? argument->data : nullptr;
  }

  ort::Status* read_inputs() {
    std::size_t count = 0;
    if (auto* status = ort::input_count(api_, context_, &count)) return status;
    for (std::size_t i = 0; i < signature_.input_count; ++i) {
      const Tensor& tensor = signature_.inputs[i];
      const ort::Value* value = nullptr;
      if (i < count)
        if (auto* status = ort::input(api_, context_, i, &value)) return status;
      if (!value) {
        if (!tensor.optional) return fail(std::string(tensor.name) + " is missing");
        continue;
      }
      if (auto* status = read_input(tensor, value, inputs_[i])) return status;
      present_[i] = true;
    }
    return nullptr;
  }

  ort::Status* read_input(const Tensor& tensor, const ort::Value* value, Argument& argument) {
    ort::TensorInfo* info = nullptr;
    if (auto* status = ort::tensor_info(api_, value, &info)) return status;
    int type = 0;
    ort::Status* status = ort::element_type(api_, info, &type);
    if (!status) status = shape_of(api_, info, argument.dims);
    ort::release_tensor_info(api_, info);
    if (status) return status;
    const Type expected = tensor.cached ? p_.cache : p_.type;
    if (type != static_cast<int>(expected))
      return fail(std::string(tensor.name) + " is of element type " + std::to_string(type) +
                  "; expected " + spell(expected));
    return ort::tensor_data(api_, const_cast<ort::Value*>(value), &argument.data);
  }

  Complaint check() {
    for (std::size_t i = 0; i < signature_.input_count; ++i) {
      const Tensor& tensor = signature_.inputs[i];
      if (!present_[i] || *tensor.dims == '*') continue;
      if (!letters_.match(tensor.dims, inputs_[i].dims))
        return std::string(tensor.name) + " is " + spell(inputs_[i].dims) + "; expected " +
               letters_.spell(tensor.dims);
    }
    for (const auto& [one, other] : {std::pair{"cos", "sin"}, {"residual", "past_residual"}})
      if ((find(one) == nullptr) != (find(other) == nullptr))
        return std::string(find(one) ? one : other) + " is given without " +
               (find(one) ? other : one);
    if (find("cos") && find("cos")->dims != find("sin")->dims)
      return "sin is " + spell(find("sin")->dims) + "; expected the shape of cos, " +
             spell(find("cos")->dims);
    for (auto step : {&Reader::check_norm, &Reader::check_widths, &Reader::check_bias,
                      &Reader::check_lengths})
      if (Complaint complaint = (this->*step)(); !complaint.empty()) return complaint;
    return {};
  }

  Complaint check_norm() {
    const auto norm = static_cast<int>(p_.key_norm);
    const int most = signature_.kind == Operator::kSlim ? 2 : 0;
    if (norm < 0 || norm > most)
      return "key_norm is " + std::to_string(norm) + "; expected " + (most ? "0, 1 or 2" : "none");
    for (const char* name : {"key_gain", "key_shift"})
      if (find(name) && !p_.normed())
        return std::string(name) + " is given without key_norm; expected 1 or 2";
    return {};
  }

  Complaint check_widths() {
    const std::int64_t H = letters_['H'], G = letters_['G'], K = letters_['K'];
    if (G < 1 || H % G)
      return "query has " + std::to_string(H) + " heads, value_weight " + std::to_string(G) +
             " groups; expected a multiple of them";
    if (K < 1 || letters_['D'] < 1)
      return "query is " + spell(find("query")->dims) + " and value_weight " +
             spell(find("value_weight")->dims) + "; expected at least one channel in both";
    if (signature_.kind != Operator::kSlim) return {};
    const std::int64_t r = letters_.knows('r') ? letters_['r'] : 0;
    if (letters_['D'] != G * K + r)
      return "value_weight is " + spell(find("value_weight")->dims) + "; expected [G, G K + r, V]" +
             " with G = " + std::to_string(G) + ", K = " + std::to_string(K) +
             ", r = " + std::to_string(r);
    if (find("cos") && 2 * letters_['A'] > K)
      return "cos is " + spell(find("cos")->dims) +
             "; expected at most K / 2 channels, K = " + std::to_string(K);
    return {};
  }

  // The bias against [B, H, T, S]; S may be known from nowhere else.
  Complaint check_bias() {
    const Argument* bias = find("bias");
    if (!bias) return {};
    const char* letters = "BHTS";
    const std::size_t rank = bias->dims.size();
    bool fits = rank <= 4;
    for (std::size_t i = 0; fits && i < rank; ++i) {
      const std::int64_t dim = bias->dims[rank - 1 - i];
      const char letter = letters[3 - i];
      if (dim == 1) continue;
      fits = dim >= 0 && dim < kMostRows;
      if (letter == 'S' && !letters_.knows('S')) letters_.set('S', dim);
      fits = fits && dim == letters_[letter];
    }
    if (!fits)
      return "bias is " + spell(bias->dims) + "; expected what broadcasts to " +
             letters_.spell(letters);
    return {};
  }

  // How many rows of the past count: all, or those that S leaves in a buffer of some capacity.
  Complaint check_lengths() {
    if (signature_.kind == Operator::kCross) return {};
    const std::int64_t C = letters_['C'], T = letters_['T'];
    if (!letters_.knows('S')) letters_.set('S', C + T);
    const std::int64_t S = letters_['S'], P = S - T;
    letters_.set('P', P);
    if (P < 0 || (C != P && C < S))
      return std::string(signature_.inputs[2].name) + " is " + spell(inputs_[2].dims) + ", with " +
             std::to_string(T) + " new tokens and cos or bias for S = " + std::to_string(S) +
             " in all; expected S - T rows, or a buffer of at least S";
    letters_.set('L', C == P ? S : C);
    return {};
  }

  void fill() {
    p_.kind = signature_.kind;
    p_.B = letters_['B'];
    p_.T = letters_['T'];
    p_.S = letters_['S'];
    p_.P = letters_.knows('P') ? letters_['P'] : 0;
    p_.H = letters_['H'];
    p_.G = letters_['G'];
    p_.K = letters_['K'];
    p_.V = letters_['V'];
    p_.D = letters_['D'];
    p_.query = data("query");
    p_.key_weight = data("key_weight");
    p_.value_weight = data("value_weight");
    p_.key_bias = data("key_bias");
    p_.key_gain = data("key_gain");
    p_.key_shift = data("key_shift");
    p_.value_bias = data("value_bias");
    p_.bias = data("bias");
    if (const Argument* cos = find("cos")) {
      p_.R = 2 * letters_['A'];
      p_.cos = cos->data;
      p_.sin = data("sin");
      cos_rows_ = cos->dims[0];
    }
    const std::int64_t past = letters_.knows('C') ? letters_['C'] : 0;
    const std::int64_t present = letters_.knows('L') ? letters_['L'] : p_.S;
    if (signature_.kind == Operator::kSlim) {
      p_.latent = {p_.G, p_.K, data("past_key"), past, data("key"), nullptr, present};
      if (find("residual"))
        p_.residual = {1,       letters_['r'], data("past_residual"), past, data("residual"),
                       nullptr, present};
    } else if (signature_.kind == Operator::kHidden) {
      p_.latent = {1, p_.D, data("past_hidden"), past, data("hidden"), nullptr, present};
    } else {
      p_.latent = {1, p_.D, nullptr, 0, nullptr, const_cast<void*>(data("hidden")), present};
    }
  }

  ort::Status* make_outputs() {
    for (std::size_t i = 0; i < signature_.output_count; ++i) {
      const Tensor& tensor = signature_.outputs[i];
      void** target = i == 0 ? &p_.output : i == 1 ? &p_.latent.present : &p_.residual.present;
      if (i == 2 && !find("residual")) break;
      Dims dims;
      for (const char* letter = tensor.dims; *letter; ++letter)
        dims.push_back(*letter == '+' ? p_.H * p_.V : letters_[*letter]);
      ort::Value* value = nullptr;
      if (auto* status = ort::output(api_, context_, i, dims.data(), dims.size(), &value))
        return status;
      if (!value) return fail(std::string("the output ") + tensor.name + " is missing");
      if (auto* status = ort::tensor_data(api_, value, target)) return status;
    }
    // A mask that is too short would make any past look like a buffer: a caller who means one
    // binds it on both sides.
    for (const State* state : {&p_.latent, &p_.residual})
      if (signature_.kind != Operator::kCross && state->past && state->past_length != p_.P &&
          !state->in_place())
        return fail(std::string(signature_.inputs[2].name) + " has " +
                    std::to_string(state->past_length) +
                    " rows, where S - T = " + std::to_string(p_.P) +
                    " by cos or bias; expected as many, or one buffer of "
                    "at least S = " +
                    std::to_string(p_.S) + " bound as past and present");
    set_strides();
    return nullptr;
  }

  void set_strides() {
    // Where anything is empty, nothing is computed; and numbers may be too large to multiply.
    if (p_.empty()) return;
    if (cos_rows_ == p_.B && p_.B > 1) p_.angle_stride = p_.S * p_.R / 2;
    const Argument* bias = find("bias");
    if (!bias) return;
    std::int64_t stride = 1;
    for (std::size_t i = 0; i < bias->dims.size(); ++i) {
      const std::int64_t dim = bias->dims[bias->dims.size() - 1 - i];
      p_.bias_strides[3 - i] = dim == 1 ? 0 : stride;
      stride *= dim;
    }
  }

  const ort::Api* api_;
  ort::KernelContext* context_;
  const Signature& signature_;
  Problem& p_;
  Letters letters_;
  std::array<Argument, kMostInputs> inputs_;
  std::array<bool, kMostInputs> present_{};
  std::int64_t cos_rows_ = 0;
};

constexpr bool kCached = true, kOptional = true;

}  // namespace

// clang-format off
const std::array<Signature, 3> kSignatures = {{
    {Operator::kSlim, "SlimAttention",
     13, {{{"query", "BHTK"}, {"key", "BGTK"}, {"past_key", "BGCK", kCached},
           {"value_weight", "GDV"}, {"cos", "bSA", false, kOptional},
           {"sin", "bSA", false, kOptional}, {"bias", "*", false, kOptional},
           {"residual", "BTr", false, kOptional}, {"past_residual", "BCr", kCached, kOptional},
           {"key_bias", "G1K", false, kOptional}, {"value_bias", "H1V", false, kOptional},
           {"key_gain", "G1K", false, kOptional}, {"key_shift", "G1K", false, kOptional}}},
     3, {{{"output", "BT+"}, {"present_key", "BGLK", kCached},
          {"present_residual", "BLr", kCached, kOptional}}}},
    {Operator::kHidden, "SlimHiddenAttention",
     7, {{{"query", "BHTK"}, {"hidden", "BTD"}, {"past_hidden", "BCD", kCached},
          {"key_weight", "GKD"}, {"value_weight", "GDV"}, {"bias", "*", false, kOptional},
          {"value_bias", "H1V", false, kOptional}}},
     2, {{{"output", "BT+"}, {"present_hidden", "BLD", kCached}}}},
    {Operator::kCross, "SlimCrossAttention",
     6, {{{"query", "BHTK"}, {"hidden", "BSD", kCached}, {"key_weight", "GKD"},
          {"value_weight", "GDV"}, {"bias", "*", false, kOptional},
          {"value_bias", "H1V", false, kOptional}}},
     1, {{{"output", "BT+"}}}},
}};
// clang-format on

ort::Status* read_arguments(const ort::Api* api, ort::KernelContext* context,
                            const Signature& signature, Problem& problem) {
  return Reader(api, context, signature, problem).read();
}

ort::Status* infer_shapes(const ort::Api* api, ort::ShapeContext* context,
                          const Signature& signature) {
  std::array<std::int64_t, 128> numbers;
  std::array<std::string, 128> symbols;
  int types[2] = {};  // of what is not cached, and of what is
  numbers.fill(kUnknown);
  for (std::size_t i = 0; i < signature.input_count; ++i) {
    const Tensor& tensor = signature.inputs[i];
    if (tensor.optional && std::strchr(tensor.dims, 'r') == nullptr) continue;
    ort::TensorInfo* info = nullptr;
    if (auto* status = ort::shape_input(api, context, i, &info)) {
      ort::release_status(api, status);  // an input that the node does not have
      continue;
    }
    if (!info) continue;
    if (auto* status = ort::element_type(api, info, &types[tensor.cached])) return status;
    Dims dims;
    if (auto* status = shape_of(api, info, dims)) return status;
    if (dims.size() != std::strlen(tensor.dims)) continue;
    std::vector<const char*> names(dims.size());
    if (auto* status = ort::symbols(api, info, names.data(), names.size())) return status;
    for (std::size_t axis = 0; axis < dims.size(); ++axis) {
      const auto letter = static_cast<std::size_t>(tensor.dims[axis]);
      if (dims[axis] >= 0) numbers[letter] = dims[axis];
      if (names[axis] && *names[axis]) symbols[letter] = names[axis];
    }
  }
  if (numbers['H'] >= 0 && numbers['V'] >= 0) numbers['+'] = numbers['H'] * numbers['V'];
  for (std::size_t i = 0; i < signature.output_count; ++i) {
    const char* letters = signature.outputs[i].dims;
    Dims dims;
    std::vector<const char*> names;
    bool known = true;
    for (const char* letter = letters; *letter; ++letter) {
      dims.push_back(numbers[static_cast<std::size_t>(*letter)]);
      names.push_back(dims.back() < 0 ? symbols[static_cast<std::size_t>(*letter)].c_str() : "");
      known = known && (dims.back() >= 0 || *names.back());
    }
    // A dimension that has neither number nor name cannot be told.
    if (!known) continue;
    ort::TensorInfo* info = nullptr;
    if (auto* status = ort::create_tensor_info(api, &info)) return status;
    const std::int64_t* sizes = dims.data();
    // Whichever types the operator was registered with that is asked, the node's own count.
    ort::Status* status = ort::set_element_type(api, info, types[signature.outputs[i].cached]);
    if (!status) status = ort::set_dims(api, info, sizes, dims.size());
    if (!status) status = ort::set_symbols(api, info, names.data(), names.size());
    const ort::TensorInfo* made = info;
    if (!status) status = ort::shape_output(api, context, i, made);
    ort::release_tensor_info(api, info);
    if (status) return status;
  }
  return nullptr;
}

}  // namespace onnx_tricks

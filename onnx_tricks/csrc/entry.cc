// What ONNX Runtime calls: the registration of one operator for each name, pair of types and
// execution provider, and its kernels.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "arguments.h"
#include "attention.h"
#include "cpu/attend.h"
#include "ort_api.h"
#ifdef ONNX_TRICKS_CUDA
#include "cuda/attend.h"
#endif

namespace onnx_tricks {
namespace {

// Of the process: every session has the same.
const ort::Api* runtime = nullptr;

// ONNX Runtime before 1.24 looks at the shape of every input before it asks for those of outputs,
// and falls over one that is left out.
bool infers_shapes(const char* version) {
  int major = 0, minor = 0;
  return std::sscanf(version, "%d.%d", &major, &minor) == 2 &&
         (major > 1 || (major == 1 && minor >= 24));
}

enum class Provider { kCpu, kCuda };

struct Registered : ort::CustomOp {
  const Signature* signature;
  Type type, cache;
  Provider provider;
};

const Registered& registered(const ort::CustomOp* op) {
  return *static_cast<const Registered*>(op);
}

struct Kernel {
  const ort::Api* api;
  const Registered* op;
  Problem attributes;  // types and attributes; the rest belongs to a call
  cpu::Attend* attend;
  ort::Allocator* allocator;  // of the provider's memory
};

class Pool final : public cpu::Parallel {
 public:
  Pool(const ort::Api* api, const ort::KernelContext* context) : api_(api), context_(context) {
    // The pool's own size is not to be had; with fewer threads there is a little more to combine.
    static const int processors = static_cast<int>(std::thread::hardware_concurrency());
    threads = processors;
  }

  void run(std::size_t count, void (*task)(void*, std::size_t), void* data) const override {
    Work work{task, data, {}};
    if (count <= 1 || !parallel(count, work))
      for (std::size_t i = 0; i < count; ++i) Work::step(&work, i);
    if (work.failed) throw std::bad_alloc();
  }

 private:
  // No exception may leave a thread of the runtime's; memory is all that a task can lack.
  struct Work {
    void (*task)(void*, std::size_t);
    void* data;
    std::atomic<bool> failed;

    static void step(void* self, std::size_t i) {
      auto& work = *static_cast<Work*>(self);
      try {
        work.task(work.data, i);
      } catch (const std::bad_alloc&) {
        work.failed = true;
      }
    }
  };

  bool parallel(std::size_t count, Work& work) const {
    // No number of batches: one task after the other is handed to whichever thread is free.
    void* data = &work;
    ort::Status* status =
        ort::parallel_for(api_, context_, &Work::step, count, std::size_t{0}, data);
    if (status) ort::release_status(api_, status);
    return !status;
  }

  const ort::Api* api_;
  const ort::KernelContext* context_;
};

void read_attribute(const ort::Api* api, const ort::KernelInfo* info, const char* name,
                    float& value) {
  // An attribute that the node does not have keeps its default.
  if (auto* status = ort::float_attribute(api, info, name, &value))
    ort::release_status(api, status);
}

template <class Number>
void read_attribute(const ort::Api* api, const ort::KernelInfo* info, const char* name,
                    Number& value) {
  auto number = static_cast<std::int64_t>(value);
  if (auto* status = ort::int_attribute(api, info, name, &number)) ort::release_status(api, status);
  value = static_cast<Number>(number);
}

ort::Status* create(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info,
                    void** made) {
  auto kernel = std::make_unique<Kernel>(Kernel{api, &registered(op), {}, nullptr, nullptr});
  kernel->attend = cpu::choose(kernel->op->type);
  Problem& attributes = kernel->attributes;
  attributes.type = kernel->op->type;
  attributes.cache = kernel->op->cache;
  read_attribute(api, info, "scale", attributes.scale);
  read_attribute(api, info, "softcap", attributes.softcap);
  read_attribute(api, info, "interleaved", attributes.interleaved);
  read_attribute(api, info, "safe", attributes.safe);
  read_attribute(api, info, "key_norm", attributes.key_norm);
  read_attribute(api, info, "key_centered", attributes.key_centered);
  read_attribute(api, info, "key_epsilon", attributes.key_epsilon);
  if (auto* status = ort::kernel_allocator(api, info, int{ort::kDefaultMemory}, &kernel->allocator))
    return status;
  *made = kernel.release();
  return nullptr;
}

void destroy(void* made) {
  auto* kernel = static_cast<Kernel*>(made);
  if (kernel->allocator) ort::release_allocator(kernel->api, kernel->allocator);
  delete kernel;
}

#ifdef ONNX_TRICKS_CUDA
ort::Status* launch(const Kernel& kernel, const ort::KernelContext* context,
                    const Problem& problem) {
  void *stream = nullptr, *scratch = nullptr;
  if (auto* status = ort::gpu_stream(kernel.api, context, &stream)) return status;
  if (const std::size_t size = cuda::scratch_size(problem))
    if (auto* status = ort::allocate(kernel.api, kernel.allocator, size, &scratch)) return status;
  const char* error = cuda::attend(problem, stream, scratch);
  // The allocator hands it out again in the order of the stream.
  if (scratch)
    if (auto* status = ort::deallocate(kernel.api, kernel.allocator, scratch)) return status;
  return error ? ort::create_status(kernel.api, int{ort::kFail}, error) : nullptr;
}
#endif

ort::Status* run(const Kernel& kernel, ort::KernelContext* context) {
  Problem problem = kernel.attributes;
  if (auto* status = read_arguments(kernel.api, context, *kernel.op->signature, problem))
    return status;
#ifdef ONNX_TRICKS_CUDA
  if (kernel.op->provider == Provider::kCuda) return launch(kernel, context, problem);
#endif
  kernel.attend(problem, Pool(kernel.api, context));
  return nullptr;
}

ort::Status* compute(void* made, ort::KernelContext* context) {
  const auto& kernel = *static_cast<Kernel*>(made);
  // No exception may reach the runtime, which is C to us.
  try {
    return run(kernel, context);
  } catch (const std::exception& error) {
    return ort::create_status(kernel.api, int{ort::kFail}, error.what());
  }
}

Registered make(const Signature& signature, Type type, Type cache, Provider provider, bool infers) {
  Registered op{};
  op.signature = &signature;
  op.type = type;
  op.cache = cache;
  op.provider = provider;
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp* self) { return registered(self).signature->name; };
  op.GetExecutionProviderType = [](const ort::CustomOp* self) {
    return registered(self).provider == Provider::kCuda ? "CUDAExecutionProvider"
                                                        : "CPUExecutionProvider";
  };
  op.GetInputTypeCount = [](const ort::CustomOp* self) {
    return registered(self).signature->input_count;
  };
  op.GetOutputTypeCount = [](const ort::CustomOp* self) {
    return registered(self).signature->output_count;
  };
  op.GetInputType = [](const ort::CustomOp* self, std::size_t i) {
    const Registered& r = registered(self);
    return static_cast<int>(r.signature->inputs[i].cached ? r.cache : r.type);
  };
  op.GetOutputType = [](const ort::CustomOp* self, std::size_t i) {
    const Registered& r = registered(self);
    return static_cast<int>(r.signature->outputs[i].cached ? r.cache : r.type);
  };
  op.GetInputCharacteristic = [](const ort::CustomOp* self, std::size_t i) -> int {
    return registered(self).signature->inputs[i].optional ? ort::kOptional : ort::kRequired;
  };
  op.GetOutputCharacteristic = [](const ort::CustomOp* self, std::size_t i) -> int {
    return registered(self).signature->outputs[i].optional ? ort::kOptional : ort::kRequired;
  };
  op.GetInputMemoryType = [](const ort::CustomOp*, std::size_t) -> int {
    return ort::kDefaultMemory;
  };
  // Not variadic, but asked for all the same.
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = destroy;
  if (infers)
    op.InferOutputShapeFn = [](const ort::CustomOp* self, ort::ShapeContext* context) {
      return infer_shapes(runtime, context, *registered(self).signature);
    };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return 0x7fffffff; };
  return op;
}

std::vector<Registered> make_all(bool infers) {
  constexpr std::pair<Type, Type> kTypes[] = {
      {Type::kFloat, Type::kFloat}, {Type::kFloat, Type::kHalf},  {Type::kFloat, Type::kBrief},
      {Type::kHalf, Type::kHalf},   {Type::kBrief, Type::kBrief}, {Type::kDouble, Type::kDouble},
  };
  std::vector<Registered> all;
  for (const Signature& signature : kSignatures)
    for (const auto& [type, cache] : kTypes) {
      all.push_back(make(signature, type, cache, Provider::kCpu, infers));
#ifdef ONNX_TRICKS_CUDA
      if (type != Type::kDouble)
        all.push_back(make(signature, type, cache, Provider::kCuda, infers));
#endif
    }
  return all;
}

}  // namespace
}  // namespace onnx_tricks

// The one function that a runtime looks for.
extern "C" __attribute__((visibility("default"))) onnx_tricks::ort::Status* RegisterCustomOps(
    onnx_tricks::ort::SessionOptions* options, const onnx_tricks::ort::ApiBase* base) {
  using namespace onnx_tricks;
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (!api) {
    // Without the table there is no way to make a Status.
    std::fprintf(stderr, "onnx_tricks needs ONNX Runtime 1.%u or newer; this is %s\n",
                 ort::kApiVersion, base->GetVersionString());
    std::abort();
  }
  runtime = api;
  // Sessions keep pointers to both for as long as they live: they are never destroyed.
  static const auto& operators =
      *new std::vector<Registered>(make_all(infers_shapes(base->GetVersionString())));
  ort::CustomOpDomain* domain = nullptr;
  if (auto* status = ort::create_domain(api, "onnx_tricks", &domain)) return status;
  for (const Registered& op : operators)
    if (auto* status = ort::add_operator(api, domain, static_cast<const ort::CustomOp*>(&op)))
      return status;
  return ort::add_domain(api, options, domain);
}

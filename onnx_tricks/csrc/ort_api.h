// The part of ONNX Runtime's C interface that this library uses.
//
// The interface is a table of functions that only ever grows, and its wheels carry no headers: a
// few lines of our own serve every version from 1.18 on, and spare a build dependency. Slots and
// layouts are compared with the official headers by check_offsets.cc, where those are installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnx_tricks::ort {

// The oldest version that has every slot below. Later runtimes serve it unchanged.
constexpr std::uint32_t kApiVersion = 18;

struct Allocator;
struct CustomOpDomain;
struct KernelContext;
struct KernelInfo;
struct SessionOptions;
struct ShapeContext;
struct Status;
struct TensorInfo;
struct Value;

enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kDefaultMemory = 0 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

struct Api {
  void* slots[1];  // as many as the version has
};

struct ApiBase {
  const Api* (*GetApi)(std::uint32_t version);
  const char* (*GetVersionString)();
};

struct CustomOp {
  std::uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, std::size_t);
  std::size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, std::size_t);
  std::size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, std::size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, std::size_t);
  int (*GetInputMemoryType)(const CustomOp*, std::size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  std::size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  std::size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

// Our name, the official name, the slot, the result, the arguments.
#define ONNX_TRICKS_ORT_FUNCTIONS(X)                                                              \
  X(create_status, CreateStatus, 0, Status*, int, const char*)                                    \
  X(create_domain, CreateCustomOpDomain, 26, Status*, const char*, CustomOpDomain**)              \
  X(add_operator, CustomOpDomain_Add, 27, Status*, CustomOpDomain*, const CustomOp*)              \
  X(add_domain, AddCustomOpDomain, 28, Status*, SessionOptions*, CustomOpDomain*)                 \
  X(tensor_data, GetTensorMutableData, 51, Status*, Value*, void**)                               \
  X(create_tensor_info, CreateTensorTypeAndShapeInfo, 57, Status*, TensorInfo**)                  \
  X(set_element_type, SetTensorElementType, 58, Status*, TensorInfo*, int)                        \
  X(set_dims, SetDimensions, 59, Status*, TensorInfo*, const std::int64_t*, std::size_t)          \
  X(element_type, GetTensorElementType, 60, Status*, const TensorInfo*, int*)                     \
  X(rank, GetDimensionsCount, 61, Status*, const TensorInfo*, std::size_t*)                       \
  X(dims, GetDimensions, 62, Status*, const TensorInfo*, std::int64_t*, std::size_t)              \
  X(symbols, GetSymbolicDimensions, 63, Status*, const TensorInfo*, const char**, std::size_t)    \
  X(tensor_info, GetTensorTypeAndShape, 65, Status*, const Value*, TensorInfo**)                  \
  X(allocate, AllocatorAlloc, 75, Status*, Allocator*, std::size_t, void**)                       \
  X(deallocate, AllocatorFree, 76, Status*, Allocator*, void*)                                    \
  X(float_attribute, KernelInfoGetAttribute_float, 85, Status*, const KernelInfo*, const char*,   \
    float*)                                                                                       \
  X(int_attribute, KernelInfoGetAttribute_int64, 86, Status*, const KernelInfo*, const char*,     \
    std::int64_t*)                                                                                \
  X(input_count, KernelContext_GetInputCount, 88, Status*, const KernelContext*, std::size_t*)    \
  X(output_count, KernelContext_GetOutputCount, 89, Status*, const KernelContext*, std::size_t*)  \
  X(input, KernelContext_GetInput, 90, Status*, const KernelContext*, std::size_t, const Value**) \
  X(output, KernelContext_GetOutput, 91, Status*, KernelContext*, std::size_t,                    \
    const std::int64_t*, std::size_t, Value**)                                                    \
  X(release_status, ReleaseStatus, 93, void, Status*)                                             \
  X(release_tensor_info, ReleaseTensorTypeAndShapeInfo, 99, void, TensorInfo*)                    \
  X(release_allocator, ReleaseAllocator, 132, void, Allocator*)                                   \
  X(gpu_stream, KernelContext_GetGPUComputeStream, 193, Status*, const KernelContext*, void**)    \
  X(shape_input, ShapeInferContext_GetInputTypeShape, 268, Status*, const ShapeContext*,          \
    std::size_t, TensorInfo**)                                                                    \
  X(shape_output, ShapeInferContext_SetOutputTypeShape, 270, Status*, const ShapeContext*,        \
    std::size_t, const TensorInfo*)                                                               \
  X(set_symbols, SetSymbolicDimensions, 271, Status*, TensorInfo*, const char**, std::size_t)     \
  X(parallel_for, KernelContext_ParallelFor, 274, Status*, const KernelContext*,                  \
    void (*)(void*, std::size_t), std::size_t, std::size_t, void*)                                \
  X(kernel_allocator, KernelInfoGetAllocator, 278, Status*, const KernelInfo*, int, Allocator**)

#define ONNX_TRICKS_ORT_DEFINE(name, official, slot, result, ...)                     \
  template <class... Arguments>                                                       \
  inline result name(const Api* api, Arguments... arguments) {                        \
    return reinterpret_cast<result (*)(__VA_ARGS__)>(api->slots[slot])(arguments...); \
  }
ONNX_TRICKS_ORT_FUNCTIONS(ONNX_TRICKS_ORT_DEFINE)
#undef ONNX_TRICKS_ORT_DEFINE

}  // namespace onnx_tricks::ort

// Compares ort_api.h with the official headers. Never linked; tests/native compiles it where the
// headers are installed (libonnxruntime-dev of Debian 13).

#include <cstddef>
#if __has_include(<onnxruntime/onnxruntime_c_api.h>)
#include <onnxruntime/onnxruntime_c_api.h>
#else
#include <onnxruntime_c_api.h>
#endif

#include "attention.h"
#include "ort_api.h"

using namespace onnx_tricks;

#define CHECK_SLOT(name, official, slot, ...) \
  static_assert(offsetof(OrtApi, official) == (slot) * sizeof(void*), #official);
ONNX_TRICKS_ORT_FUNCTIONS(CHECK_SLOT)

#define CHECK_MEMBER(member) \
  static_assert(offsetof(OrtCustomOp, member) == offsetof(ort::CustomOp, member), #member);
CHECK_MEMBER(version)
CHECK_MEMBER(CreateKernel)
CHECK_MEMBER(GetName)
CHECK_MEMBER(GetExecutionProviderType)
CHECK_MEMBER(GetInputType)
CHECK_MEMBER(GetInputTypeCount)
CHECK_MEMBER(GetOutputType)
CHECK_MEMBER(GetOutputTypeCount)
CHECK_MEMBER(KernelCompute)
CHECK_MEMBER(KernelDestroy)
CHECK_MEMBER(GetInputCharacteristic)
CHECK_MEMBER(GetOutputCharacteristic)
CHECK_MEMBER(GetInputMemoryType)
CHECK_MEMBER(GetVariadicInputMinArity)
CHECK_MEMBER(GetVariadicInputHomogeneity)
CHECK_MEMBER(GetVariadicOutputMinArity)
CHECK_MEMBER(GetVariadicOutputHomogeneity)
CHECK_MEMBER(CreateKernelV2)
CHECK_MEMBER(KernelComputeV2)
CHECK_MEMBER(InferOutputShapeFn)
CHECK_MEMBER(GetStartVersion)
CHECK_MEMBER(GetEndVersion)
CHECK_MEMBER(GetMayInplace)
CHECK_MEMBER(ReleaseMayInplace)
CHECK_MEMBER(GetAliasMap)
CHECK_MEMBER(ReleaseAliasMap)

static_assert(sizeof(ort::CustomOp) <= sizeof(OrtCustomOp));
static_assert(static_cast<int>(Type::kFloat) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(static_cast<int>(Type::kHalf) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
static_assert(static_cast<int>(Type::kDouble) == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE);
static_assert(static_cast<int>(Type::kBrief) == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
static_assert(int{ort::kRequired} == INPUT_OUTPUT_REQUIRED);
static_assert(int{ort::kOptional} == INPUT_OUTPUT_OPTIONAL);
static_assert(int{ort::kDefaultMemory} == OrtMemTypeDefault);
static_assert(int{ort::kFail} == ORT_FAIL);
static_assert(int{ort::kInvalidArgument} == ORT_INVALID_ARGUMENT);

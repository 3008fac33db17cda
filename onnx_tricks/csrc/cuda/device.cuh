// Whatever a kernel asks of the machine beyond plain CUDA C++.
//
// tests/native/emulator.h puts a machine of its own in place of this file's second half, so that
// the same kernels run without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef ONNX_TRICKS_EMULATED
#include "emulator.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace onnx_tricks::cuda {

#if __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

using Half = __half;
using Brief = __nv_bfloat16;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(Half value) { return __half2float(value); }
__device__ inline float widen(Brief value) { return __bfloat162float(value); }

template <class T>
__device__ inline T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) { return value; }
template <>
__device__ inline Half narrow<Half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline Brief narrow<Brief>(float value) { return __float2bfloat16_rn(value); }

// The memory that a block was launched with.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Starts to copy 16 bytes to shared memory; zeros where there is nothing to copy.
__device__ inline void copy_async(void* to, const void* from, bool exists) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
#endif
}

// What was started since the last commit becomes one group.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kGroups` groups of this thread are under way.
template <int kGroups>
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// Brings what lies there nearer.
__device__ inline void prefetch(const void* place) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(place));
}

// Four matrices of 8 x 8 numbers of 16 bits. Lane i gives the address of row i % 8 of matrix i / 8,
// and gets numbers (i / 4, i % 4 * 2) and the next of each; those of the transposed if so asked.
template <bool kTransposed>
__device__ inline void load_matrices(std::uint32_t (&to)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
#endif
}

// sums [16, 8] += a [16, 16] b [16, 8], all of it spread over the lanes of a warp.
template <class T>
__device__ inline void multiply(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>)
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Waits for all threads of all blocks of the cluster, and makes what they wrote visible.
__device__ inline void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ inline T* of_block(T* place, int block) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(place, block);
#else
  return place;
#endif
}

// Puts a kernel of one-dimensional blocks on a stream (clusters of as many blocks); null if all is
// well.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads,
                   std::size_t memory, int cluster, void* stream, const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  const auto wanted = static_cast<int>(memory);
  cudaError_t error = cudaSuccess;
  if (memory > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, wanted);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = memory;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The processor that the calling thread has chosen.
struct Device {
  int capability = 0;  // 90 for 9.0
  int processors = 0;
  int shared_memory = 0;  // bytes, the most that a block can have

  Device() {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    capability = 10 * major + minor;
  }
};

}  // namespace onnx_tricks::cuda
#endif

namespace onnx_tricks::cuda {

__device__ inline float most_of_warp(float value) {
  for (int step = 16; step; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

__device__ inline float sum_of_warp(float value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Two numbers of 16 bits in one.
template <class T>
__device__ inline std::uint32_t pack(float low, float high) {
  const T two[2] = {narrow<T>(low), narrow<T>(high)};
  std::uint32_t bits;
  memcpy(&bits, two, sizeof bits);
  return bits;
}

// What `multiply` takes as a: rows [row, row + 16) and columns [k, k + 16) of a matrix in shared memory.
template <class T>
__device__ inline void load_left(std::uint32_t (&to)[4], const T* tile, int stride, int row, int k) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  load_matrices<false>(to, tile + (row + lane % 16) * stride + k + lane / 16 * 8);
}

// What `multiply` takes as b from rows [k, k + 16) and columns [n, n + 8) of a matrix in shared
// memory, then from the next eight columns. `kAcross`: the tile has the columns as its rows.
template <bool kAcross, class T>
__device__ inline void load_pair(std::uint32_t (&to)[4], const T* tile, int stride, int k, int n) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  if constexpr (kAcross)
    load_matrices<false>(to, tile + (n + lane / 16 * 8 + lane % 8) * stride + k + lane / 8 % 2 * 8);
  else
    load_matrices<true>(to, tile + (k + lane % 16) * stride + n + lane / 16 * 8);
}

}  // namespace onnx_tricks::cuda

// A machine that runs the CUDA kernels without a GPU, one thread at a time, to see whether they are
// right: what csrc/cuda/device.cuh has from CUDA otherwise.
//
// Every thread of a cluster of blocks is a fiber, which runs until it has to wait for others; whose
// turn is next is drawn at random. So what is missing a barrier reads what is not there yet, as
// memory is full of NaN before it is written: shared memory when a block starts, and the target of
// an asynchronous copy until the copy was waited for. Addresses are checked where the hardware does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "cpu/number.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace emulated {

struct Place {
  Index thread, block, threads, blocks;
};

extern Place place;  // of the thread that runs

// Gives up the launch, with an error.
[[noreturn]] void fail(const char* what);

void sync_block();
void sync_cluster();

// All lanes of a warp come here, each with data of its own; the last one works for all.
void together(void* mine, void (*work)(void** lanes));

char* shared_memory();
void check_shared(const void* place, std::size_t size, std::size_t alignment);
void* of_block(void* place, int block);

void copy_async(void* to, const void* from, bool exists);
void commit_copies();
void wait_for_copies(int groups);

const char* run(const std::function<void()>& kernel, std::int64_t blocks, int threads,
                std::size_t memory, int cluster, const char* name);

}  // namespace emulated

#define threadIdx (emulated::place.thread)
#define blockIdx (emulated::place.block)
#define blockDim (emulated::place.threads)
#define gridDim (emulated::place.blocks)

inline void __syncthreads() { emulated::sync_block(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  struct Lane {
    float value, result;
    int mask;
  } lane{value, 0, mask};
  emulated::together(&lane, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      auto& one = *static_cast<Lane*>(lanes[i]);
      one.result = static_cast<Lane*>(lanes[i ^ one.mask])->value;
    }
  });
  return lane.result;
}

namespace onnx_tricks::cuda {

constexpr bool kHasClusters = true;

using Half = cpu::Half;
using Brief = cpu::Brief;

inline float widen(float value) { return value; }
inline float widen(Half value) { return static_cast<float>(value); }
inline float widen(Brief value) { return static_cast<float>(value); }

template <class T>
T narrow(float value) {
  return T(value);
}

using emulated::commit_copies;
using emulated::copy_async;
using emulated::shared_memory;
using emulated::sync_cluster;
using std::max;
using std::min;

template <int kGroups>
void wait_for_copies() {
  emulated::wait_for_copies(kGroups);
}

inline void prefetch(const void*) {}

template <class T>
T* of_block(T* place, int block) {
  return static_cast<T*>(emulated::of_block(place, block));
}

template <bool kTransposed>
void load_matrices(std::uint32_t (&to)[4], const void* row) {
  struct Lane {
    std::uint32_t* to;
    const void* row;
  } lane{to, row};
  emulated::check_shared(row, 16, 16);
  emulated::together(&lane, [](void** lanes) {
    for (int i = 0; i < 32; ++i)
      for (int matrix = 0; matrix < 4; ++matrix) {
        std::uint16_t two[2];
        for (int j = 0; j < 2; ++j) {
          const int one = i / 4, other = i % 4 * 2 + j;
          const auto* lane = static_cast<Lane*>(lanes[8 * matrix + (kTransposed ? other : one)]);
          two[j] = static_cast<const std::uint16_t*>(lane->row)[kTransposed ? one : other];
        }
        std::memcpy(&static_cast<Lane*>(lanes[i])->to[matrix], two, 4);
      }
  });
}

// As the PTX manual spreads the numbers over the lanes.
template <class T>
void multiply(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Lane {
    float* sums;
    std::uint32_t a[4], b[2];
  } lane{sums, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::together(&lane, [](void** lanes) {
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; ++i) {
      const auto& one = *static_cast<Lane*>(lanes[i]);
      const int row = i / 4, column = i % 4 * 2;
      T two[2];
      for (int n = 0; n < 4; ++n) {
        std::memcpy(two, &one.a[n], 4);
        for (int j = 0; j < 2; ++j) a[row + n % 2 * 8][column + n / 2 * 8 + j] = widen(two[j]);
      }
      for (int n = 0; n < 2; ++n) {
        std::memcpy(two, &one.b[n], 4);
        for (int j = 0; j < 2; ++j) b[column + n * 8 + j][row] = widen(two[j]);
      }
    }
    for (int i = 0; i < 32; ++i)
      for (int n = 0; n < 4; ++n) {
        const int row = i / 4 + n / 2 * 8, column = i % 4 * 2 + n % 2;
        float& sum = static_cast<Lane*>(lanes[i])->sums[n];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      }
  });
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads,
                   std::size_t memory, int cluster, void*, const Arguments&... arguments) {
  return emulated::run([=] { kernel(Parameters(arguments)...); }, blocks, threads, memory, cluster,
                       __PRETTY_FUNCTION__);
}

struct Device {
  int capability, processors, shared_memory;
  Device();
};

}  // namespace onnx_tricks::cuda

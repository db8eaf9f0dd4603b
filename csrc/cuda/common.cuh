// What the CUDA kernels share: runs of elements in registers, sums over a warp and a block, checked launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifndef VADIT_EMULATED  // tests/simt compiles these files for the CPU
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

#include "launch.h"

namespace vadit::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Elements per thread of the vectorised kernels: one 128-bit access in bfloat16, two in float32.
constexpr int kRun = 8;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whether runs may be loaded from all these pointers and at all these offsets (in elements).
inline bool takes_runs(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> offsets) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  for (int64_t offset : offsets)
    if (offset % kRun) return false;
  return true;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// A run of W elements as float32: W = 8 from a 16-byte aligned address, or W = 1 from any.
template <int W>
__device__ __forceinline__ void load(float (&x)[W], const float* from) {
  if constexpr (W == kRun) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
    x[0] = *from;
  }
}

template <int W>
__device__ __forceinline__ void load(float (&x)[W], const __nv_bfloat16* from) {
  if constexpr (W == kRun) {
    const uint4 packed = *reinterpret_cast<const uint4*>(from);
    const unsigned word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a bfloat16 is the upper half of a float32
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  } else {
    x[0] = to_float(*from);
  }
}

template <int W>
__device__ __forceinline__ void store(float* to, const float (&x)[W]) {
  if constexpr (W == kRun) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    *to = x[0];
  }
}

__device__ __forceinline__ unsigned pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

template <int W>
__device__ __forceinline__ void store(__nv_bfloat16* to, const float (&x)[W]) {
  if constexpr (W == kRun) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
  } else {
    store(to, x[0]);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Sums over the block, the same in every thread. Calls in a row must take turns between two `slots`: a thread may enter
// the next call while others still read the slots of this one.
template <int kSums, int kWarps>
__device__ __forceinline__ void block_sums(float (&x)[kSums], float (&slots)[kSums][kWarps]) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    x[k] = warp_sum(x[k]);
    if (threadIdx.x % kWarp == 0) slots[k][threadIdx.x / kWarp] = x[k];
    x[k] = 0.0f;
  }
  __syncthreads();
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) x[k] += slots[k][i];
  }
}

// s(x) and 1 - s(x), each to a few ulp: as a difference 1 - s would lose its digits where s is near 1. |x| keeps exp
// from overflowing.
__device__ __forceinline__ void sigmoid(float x, float& s, float& one_minus_s) {
  const float e = expf(-fabsf(x));
  const float large = __fdividef(1.0f, 1.0f + e), small = e * large;
  s = x >= 0.0f ? large : small;
  one_minus_s = x >= 0.0f ? small : large;
}

template <class... Parameters, class... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), int64_t blocks, dim3 threads, void* stream,
    Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string(name) + ": too large for one launch");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  // What the launch leaves behind is taken too: otherwise the next user of CUDA would be blamed for it.
  const cudaError_t last = cudaGetLastError();
  if (error == cudaSuccess) error = last;
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// Calls f with a null pointer of the element type.
template <class F>
void with_type(Type type, F f) {
  if (type == Type::kBFloat16)
    f(static_cast<__nv_bfloat16*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

}  // namespace vadit::cuda

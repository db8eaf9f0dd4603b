// SwiGLU:  y = silu(x1) x2,  [x1 | x2] one row.  With s = 1 / (1 + exp(-x1)):
// dx1 = dy x2 s (1 + x1 (1 - s)),  dx2 = dy x1 s.
// Bytes moved: forward reads x12 and writes y; backward reads x12 and dy and writes dx12: each once.
//
// A block takes a row at a time, a thread W columns of it: runs where the halves are aligned, else single elements.

#include "common.cuh"

namespace vadit::cuda {
namespace {

constexpr int kMaxThreads = 128;

// s(x) and 1 - s(x), each to a few ulp: as a difference 1 - s would lose its digits where s is near 1. |x| keeps exp
// from overflowing.
__device__ __forceinline__ void sigmoid(float x, float& s, float& one_minus_s) {
  const float e = expf(-fabsf(x));
  const float large = __fdividef(1.0f, 1.0f + e), small = e * large;
  s = x >= 0.0f ? large : small;
  one_minus_s = x >= 0.0f ? small : large;
}

template <class T, int W>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(int64_t rows, int64_t width, const T* x12, T* y) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x_row = x12 + row * 2 * width;
#pragma unroll 2
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * W; column < width; column += blockDim.x * W) {
      float x1[W], x2[W];
      load(x1, x_row + column);
      load(x2, x_row + width + column);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        float s, one_minus_s;
        sigmoid(x1[i], s, one_minus_s);
        x1[i] = x1[i] * s * x2[i];
      }
      store(y + row * width + column, x1);
    }
  }
}

template <class T, int W>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(int64_t rows, int64_t width, const T* dy_all, const T* x12, T* dx12) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x_row = x12 + row * 2 * width;
    T* dx_row = dx12 + row * 2 * width;
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * W; column < width; column += blockDim.x * W) {
      float x1[W], x2[W], dy[W];
      load(x1, x_row + column);
      load(x2, x_row + width + column);
      load(dy, dy_all + row * width + column);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        float s, one_minus_s;
        sigmoid(x1[i], s, one_minus_s);
        const float dx1 = dy[i] * x2[i] * (s * (1.0f + x1[i] * one_minus_s));
        x2[i] = dy[i] * (x1[i] * s);
        x1[i] = dx1;
      }
      store(dx_row + column, x1);
      store(dx_row + width + column, x2);
    }
  }
}

int64_t blocks_for(int64_t rows) { return rows < 0x7fffffff ? rows : 0x7fffffff; }

unsigned threads_for(int64_t columns) {
  return static_cast<unsigned>(columns < kMaxThreads ? round_up(columns, kWarp) : kMaxThreads);
}

}  // namespace

void swiglu(Type type, int64_t rows, int64_t width, const void* x12, void* y, void* stream) {
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool runs = takes_runs({x12, y}, {width});
    launch(
        "swiglu", runs ? forward_kernel<T, kRun> : forward_kernel<T, 1>, blocks_for(rows),
        dim3(threads_for(runs ? width / kRun : width)), stream, rows, width, static_cast<const T*>(x12),
        static_cast<T*>(y));
  });
}

void swiglu_backward(
    Type type, int64_t rows, int64_t width, const void* dy, const void* x12, void* dx12, void* stream) {
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool runs = takes_runs({dy, x12, dx12}, {width});
    launch(
        "swiglu_backward", runs ? backward_kernel<T, kRun> : backward_kernel<T, 1>, blocks_for(rows),
        dim3(threads_for(runs ? width / kRun : width)), stream, rows, width, static_cast<const T*>(dy),
        static_cast<const T*>(x12), static_cast<T*>(dx12));
  });
}

}  // namespace vadit::cuda

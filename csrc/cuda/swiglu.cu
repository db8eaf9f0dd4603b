// SwiGLU:  y = silu(x1) x2,  [x1 | x2] one row plus the bias, if any.  With s = 1 / (1 + exp(-x1)):
// dx1 = dy x2 s (1 + x1 (1 - s)),  dx2 = dy x1 s,  dbias = column sums of [dx1 | dx2].
// Bytes moved: forward reads x12 and writes y; backward reads x12 and dy and writes dx12: each once.
//
// Forward, a block takes a row at a time, a thread W columns of it: runs where the halves are aligned, else single
// elements. Backward, a thread keeps its W columns for all rows of a chunk, with their bias and sums in registers.

#include "column_sums.cuh"

namespace vadit::cuda {
namespace {

constexpr int kMaxThreads = 128;

template <class T, int W>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(int64_t rows, int64_t width, const T* x12, const float* bias, T* y) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x_row = x12 + row * 2 * width;
#pragma unroll 2
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * W; column < width; column += blockDim.x * W) {
      float x1[W], x2[W];
      load(x1, x_row + column);
      load(x2, x_row + width + column);
      if (bias) {
        float b1[W], b2[W];
        load(b1, bias + column);
        load(b2, bias + width + column);
#pragma unroll
        for (int i = 0; i < W; ++i) x1[i] += b1[i], x2[i] += b2[i];
      }
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

// Blocks: chunks of rows, for each of them `groups` groups of columns. partial (chunks, 2 width): sums of the chunks.
template <class T, int W>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(
    int64_t rows, int64_t width, int64_t chunk, int64_t groups, const T* dy_all, const T* x12, const float* bias,
    T* dx12, float* partial) {
  const int64_t column = (blockIdx.x % groups * blockDim.x + threadIdx.x) * W;
  if (column >= width) return;
  const int64_t begin = blockIdx.x / groups * chunk, end = begin + chunk < rows ? begin + chunk : rows;
  float b1[W] = {}, b2[W] = {}, sum1[W] = {}, sum2[W] = {};
  if (bias) load(b1, bias + column), load(b2, bias + width + column);
#pragma unroll 2
  for (int64_t row = begin; row < end; ++row) {
    float x1[W], x2[W], dy[W];
    load(x1, x12 + row * 2 * width + column);
    load(x2, x12 + row * 2 * width + width + column);
    load(dy, dy_all + row * width + column);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      float s, one_minus_s;
      x1[i] += b1[i], x2[i] += b2[i];
      sigmoid(x1[i], s, one_minus_s);
      const float dx1 = dy[i] * x2[i] * (s * (1.0f + x1[i] * one_minus_s));
      x2[i] = dy[i] * (x1[i] * s);
      x1[i] = dx1;
      sum1[i] += x1[i], sum2[i] += x2[i];
    }
    store(dx12 + row * 2 * width + column, x1);
    store(dx12 + row * 2 * width + width + column, x2);
  }
  if (bias == nullptr) return;
  float* sums = partial + blockIdx.x / groups * 2 * width;
  store(sums + column, sum1);
  store(sums + width + column, sum2);
}

int64_t blocks_for(int64_t rows) { return rows < 0x7fffffff ? rows : 0x7fffffff; }

unsigned threads_for(int64_t columns) {
  return static_cast<unsigned>(columns < kMaxThreads ? round_up(columns, kWarp) : kMaxThreads);
}

}  // namespace

void swiglu(Type type, int64_t rows, int64_t width, const void* x12, const float* bias, void* y, void* stream) {
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool runs = takes_runs({x12, bias, y}, {width});
    launch(
        "swiglu", runs ? forward_kernel<T, kRun> : forward_kernel<T, 1>, blocks_for(rows),
        dim3(threads_for(runs ? width / kRun : width)), stream, rows, width, static_cast<const T*>(x12), bias,
        static_cast<T*>(y));
  });
}

void swiglu_backward(
    Type type, int64_t rows, int64_t width, const void* dy, const void* x12, const float* bias, void* dx12,
    float* dbias, float* partial, void* stream) {
  const int64_t chunks = swiglu_partial_rows(rows);
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool runs = takes_runs({dy, x12, bias, dx12, partial}, {width});
    const int64_t columns = runs ? width / kRun : width, groups = ceil_div(columns, threads_for(columns));
    launch(
        "swiglu_backward", runs ? backward_kernel<T, kRun> : backward_kernel<T, 1>, chunks * groups,
        dim3(threads_for(columns)), stream, rows, width, swiglu_chunk(rows), groups, static_cast<const T*>(dy),
        static_cast<const T*>(x12), bias, static_cast<T*>(dx12), partial);
  });
  if (bias) column_sums("swiglu_backward (dbias)", partial, chunks, 2 * width, 2 * width, dbias, stream);
}

}  // namespace vadit::cuda

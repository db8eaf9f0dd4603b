// Sums down the columns of a float32 matrix, in an order that depends on its shape alone: the second pass of the weight
// gradients, after each block of the first pass has left one row of partial sums.
#pragma once

#include "common.cuh"

namespace vadit::cuda {

// A block sums kWarp columns; thread row i takes rows i, i + kSumRows, ...
constexpr int kSumRows = 16;

// The sum of column `column` of in (rows, width), valid in the threads with threadIdx.y == 0. All threads must call it.
__device__ __forceinline__ float column_sum(
    const float* in, int64_t rows, int64_t row_stride, int64_t column, int64_t width, float (&slots)[kSumRows][kWarp]) {
  float sum = 0.0f;
  if (column < width) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kSumRows) sum += in[row * row_stride + column];
  }
  __syncthreads();  // the slots may still be read from the call before
  slots[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = 0.0f;
  if (threadIdx.y == 0)
    for (int i = 0; i < kSumRows; ++i) sum += slots[i][threadIdx.x];
  return sum;
}

// Does nothing where there is nothing to write to.
__device__ __forceinline__ void store_at(Output to, int64_t at, float x) {
  if (to.data == nullptr) return;
  if (to.type == Type::kFloat32)
    store(static_cast<float*>(to.data) + at, x);
  else
    store(static_cast<__nv_bfloat16*>(to.data) + at, x);
}

// A template only so that including it where it is not launched costs nothing.
template <int kColumns>
__global__ void __launch_bounds__(kColumns* kSumRows)
    column_sums_kernel(const float* in, int64_t rows, int64_t row_stride, int64_t width, Output out) {
  __shared__ float slots[kSumRows][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const float sum = column_sum(in, rows, row_stride, column, width, slots);
  if (threadIdx.y == 0 && column < width) store_at(out, column, sum);
}

inline void column_sums(
    const char* name, const float* in, int64_t rows, int64_t row_stride, int64_t width, Output out, void* stream) {
  launch(
      name, column_sums_kernel<kWarp>, ceil_div(width, kWarp), dim3(kWarp, kSumRows), stream, in, rows, row_stride,
      width, out);
}

}  // namespace vadit::cuda

// SwiGLU, float32:  y = silu(x1) x2,  [x1 | x2] one row.  With s = 1 / (1 + exp(-x1)):
// dx1 = dy x2 s (1 + x1 (1 - s)),  dx2 = dy x1 s.

#include <vector>

#include <torch/csrc/stable/library.h>

#include "vec.h"

namespace vadit {
namespace {

VADIT_INLINE void forward_row(float* y, const float* x1, const float* x2, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float e = exp_minus_abs(x1[i]);
    const float s = (x1[i] >= 0.0f ? 1.0f : e) / (1.0f + e);
    y[i] = x1[i] * s * x2[i];
  }
}

VADIT_INLINE void backward_row(
    float* dx1, float* dx2, const float* dy, const float* x1, const float* x2, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float e = exp_minus_abs(x1[i]);
    const float small = e / (1.0f + e), large = 1.0f / (1.0f + e);
    const float s = x1[i] >= 0.0f ? large : small;
    const float one_minus_s = x1[i] >= 0.0f ? small : large;  // 1 - s would lose its digits where s is near 1
    dx1[i] = dy[i] * x2[i] * (s * (1.0f + x1[i] * one_minus_s));
    dx2[i] = dy[i] * (x1[i] * s);
  }
}

int64_t check_x12(const Tensor& x12) {
  check_float(x12, "x12");
  STD_TORCH_CHECK(x12.dim() > 0 && x12.size(x12.dim() - 1) % 2 == 0, "x12 must have an even last axis");
  return x12.size(x12.dim() - 1) / 2;
}

}  // namespace

Tensor swiglu(const Tensor& x12_in) {
  const int64_t width = check_x12(x12_in);
  const Tensor x12 = torch::stable::contiguous(x12_in);
  std::vector<int64_t> sizes(x12.sizes().begin(), x12.sizes().end());
  sizes.back() = width;
  Tensor y = torch::stable::new_empty(x12, sizes);
  const float* x12_data = data(x12);
  float* y_data = mutable_data(y);
  const int64_t rows = width > 0 ? x12.numel() / (2 * width) : 0;
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x1 = x12_data + row * 2 * width;
      run<forward_row>(y_data + row * width, x1, x1 + width, width);
    }
  });
  return y;
}

Tensor swiglu_backward(const Tensor& dy_in, const Tensor& x12_in) {
  const int64_t width = check_x12(x12_in);
  check_float(dy_in, "dy");
  STD_TORCH_CHECK(dy_in.numel() * 2 == x12_in.numel(), "dy must have half the elements of x12");
  const Tensor dy = torch::stable::contiguous(dy_in), x12 = torch::stable::contiguous(x12_in);
  Tensor dx12 = torch::stable::new_empty(x12, x12.sizes());
  const float *dy_data = data(dy), *x12_data = data(x12);
  float* dx12_data = mutable_data(dx12);
  const int64_t rows = width > 0 ? x12.numel() / (2 * width) : 0;
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x1 = x12_data + row * 2 * width;
      float* dx1 = dx12_data + row * 2 * width;
      run<backward_row>(dx1, dx1 + width, dy_data + row * width, x1, x1 + width, width);
    }
  });
  return dx12;
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace vadit

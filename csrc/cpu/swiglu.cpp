// SwiGLU, float32 or bfloat16:  y = silu(x1) x2,  [x1 | x2] one row plus the bias, if any.  With s = 1 / (1 + exp(-x1)):
// dx1 = dy x2 s (1 + x1 (1 - s)),  dx2 = dy x1 s,  dbias = column sums of [dx1 | dx2].
// Bytes moved per row of x12 (2H): forward read 2H, write H elements; backward read 3H, write 2H. Bias and sums stay in
// cache.

#ifdef VADIT_ISA

#include "sigmoid.h"

namespace vadit::VADIT_ISA {
namespace {

template <class T, bool kBias>
VADIT_INLINE void forward_rows(T* y, const T* x12, const float* bias, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x12 += 2 * width, y += width) {
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      Vec x1 = load(x12 + i, n), x2 = load(x12 + width + i, n);
      if (kBias) x1 += load(bias + i, n), x2 += load(bias + width + i, n);
      store(y + i, x1 * sigmoid<T>(x1).s * x2, n);
    });
  }
}

// `bias` may be null.
template <class T>
void forward(T* y, const T* x12, const float* bias, int64_t rows, int64_t width) {
  if (bias) {
    forward_rows<T, true>(y, x12, bias, rows, width);
  } else {
    forward_rows<T, false>(y, x12, bias, rows, width);
  }
}

template <class T, bool kBias>
VADIT_INLINE void backward_rows(
    T* dx12, float* sums, const T* dy, const T* x12, const float* bias, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x12 += 2 * width, dx12 += 2 * width, dy += width) {
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      Vec x1 = load(x12 + i, n), x2 = load(x12 + width + i, n);
      if (kBias) x1 += load(bias + i, n), x2 += load(bias + width + i, n);
      const Sigmoid gate = sigmoid<T>(x1);
      const Vec scaled = load(dy + i, n) * gate.s;
      const Vec dx1 = scaled * x2 * (x1 * gate.one_minus_s + 1.0f), dx2 = scaled * x1;
      store(dx12 + i, dx1, n);
      store(dx12 + width + i, dx2, n);
      if (kBias) {
        store(sums + i, load(sums + i, n) + dx1, n);
        store(sums + width + i, load(sums + width + i, n) + dx2, n);
      }
    });
  }
}

// Where there is a bias, the rows' dx12 is added to `sums`.
template <class T>
void backward(T* dx12, float* sums, const T* dy, const T* x12, const float* bias, int64_t rows, int64_t width) {
  if (bias) {
    backward_rows<T, true>(dx12, sums, dy, x12, bias, rows, width);
  } else {
    backward_rows<T, false>(dx12, sums, dy, x12, bias, rows, width);
  }
}

}  // namespace
}  // namespace vadit::VADIT_ISA

#else

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#define VADIT_KERNELS "swiglu.cpp"
#include "vec.h"

namespace vadit {
namespace {

// Rows that one task sums up. Fixed, so that the bias's gradient does not depend on the number of threads.
constexpr int64_t kRowsPerChunk = 32;

int64_t check_x12(const Tensor& x12, const std::optional<Tensor>& bias) {
  check_element(x12, "x12");
  STD_TORCH_CHECK(x12.dim() > 0 && x12.size(x12.dim() - 1) % 2 == 0, "x12 must have an even last axis");
  const int64_t both = x12.size(x12.dim() - 1);
  if (bias) check_float(*bias, "bias");
  STD_TORCH_CHECK(!bias || bias->numel() == both, "bias must have the width of x12");
  return both / 2;
}

std::vector<int64_t> output_sizes(const Tensor& x12, int64_t width) {
  std::vector<int64_t> sizes(x12.sizes().begin(), x12.sizes().end());
  sizes.back() = width;
  return sizes;
}

}  // namespace

Tensor swiglu(const Tensor& x12_in, const std::optional<Tensor>& bias_in) {
  const int64_t width = check_x12(x12_in, bias_in);
  const Tensor x12 = torch::stable::contiguous(x12_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor y = new_large(x12, output_sizes(x12, width));
  with_element(x12, [&](auto element) {
    using T = decltype(element);
    const T* from = data<T>(x12);
    T* to = mutable_data<T>(y);
    const int64_t rows = width > 0 ? x12.numel() / (2 * width) : 0;
    torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
      const float* b = data<float>(bias);
      VADIT_CALL(forward<T>, to + begin * width, from + begin * 2 * width, b, end - begin, width);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(
    const Tensor& dy_in, const Tensor& x12_in, const std::optional<Tensor>& bias_in) {
  const int64_t width = check_x12(x12_in, bias_in);
  const std::vector<int64_t> sizes = output_sizes(x12_in, width);
  STD_TORCH_CHECK(
      dy_in.is_cpu() && dy_in.scalar_type() == x12_in.scalar_type() &&
          std::vector<int64_t>(dy_in.sizes().begin(), dy_in.sizes().end()) == sizes,
      "dy must have the dtype of x12 and half its last axis");
  const Tensor dy = torch::stable::contiguous(dy_in), x12 = torch::stable::contiguous(x12_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor dx12 = new_large(x12, x12.sizes());
  const int64_t both = 2 * width, rows = width > 0 ? x12.numel() / both : 0, chunks = ceil_div(rows, kRowsPerChunk);
  std::vector<float> sums(bias ? chunks * both : 0);
  with_element(x12, [&](auto element) {
    using T = decltype(element);
    const T *dy_data = data<T>(dy), *x12_data = data<T>(x12);
    T* dx12_data = mutable_data<T>(dx12);
    torch::stable::parallel_for(0, chunks, ceil_div(row_grain(width), kRowsPerChunk), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kRowsPerChunk, count = std::min(kRowsPerChunk, rows - first);
        const float* b = data<float>(bias);
        float* part = sums.data() + (bias ? chunk * both : 0);
        const T *dy_at = dy_data + first * width, *x12_at = x12_data + first * both;
        VADIT_CALL(backward<T>, dx12_data + first * both, part, dy_at, x12_at, b, count, width);
      }
    });
  });
  Tensor dbias = torch::stable::new_zeros(x12, {bias ? both : 0}, ScalarType::Float);
  float* total = mutable_data<float>(dbias);
  for (int64_t chunk = 0; bias && chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < both; ++i) total[i] += sums[chunk * both + i];
  }
  return {dx12, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace vadit

#endif

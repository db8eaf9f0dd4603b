// RMSNorm with modulation, float32:  y = x r w (1 + scale) + shift,  r = 1 / sqrt(mean(x^2) + eps).
//
// Backward, with g = dy w (1 + scale):  dx = r (g - x r^2 mean(g x)),  and per image  P = sum_n dy x r,
// dscale = w P,  dshift = sum_n dy,  dweight = sum_images (1 + scale) P.
// r is computed again in the backward pass: the row is read there anyway, so saving it would save nothing.

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "vec.h"

namespace vadit {
namespace {

// Rows whose column sums one task adds up. Fixed, so that the result does not depend on the number of threads.
constexpr int64_t kRowsPerChunk = 32;

VADIT_INLINE void forward_row(
    float* y, const float* x, const float* weight, const float* scale, const float* shift, int64_t width, float eps) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += x[i] * x[i];
  const float r = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  if (scale && shift) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * r * weight[i] * (1.0f + scale[i]) + shift[i];
  } else if (scale) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * r * weight[i] * (1.0f + scale[i]);
  } else if (shift) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * r * weight[i] + shift[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * r * weight[i];
  }
}

// `factor` is weight * (1 + scale) of the row's image; the row's dy x r and dy are added to the two column sums.
VADIT_INLINE void backward_row(
    float* dx, float* sum_dyxr, float* sum_dy, const float* dy, const float* x, const float* factor, int64_t width,
    float eps) {
  float squares = 0.0f;
  float dot = 0.0f;
#pragma omp simd reduction(+ : squares, dot)
  for (int64_t i = 0; i < width; ++i) {
    squares += x[i] * x[i];
    dot += dy[i] * factor[i] * x[i];
  }
  const float r = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  const float pull = dot / static_cast<float>(width) * r * r;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    dx[i] = r * (dy[i] * factor[i] - x[i] * pull);
    sum_dyxr[i] += dy[i] * (x[i] * r);
    sum_dy[i] += dy[i];
  }
}

struct Layout {
  int64_t images, rows_per_image, width;
};

// Rows are grouped by image where there is a modulation; otherwise all rows are one group.
Layout layout_of(const Tensor& x, bool modulated) {
  const int64_t width = x.size(x.dim() - 1);
  const int64_t rows = width > 0 ? x.numel() / width : 0;
  const int64_t images = modulated ? x.size(0) : 1;
  return {images, images > 0 ? rows / images : 0, width};
}

void check_modulation(const Tensor& t, const Layout& layout, const char* name) {
  check_float(t, name);
  STD_TORCH_CHECK(t.numel() == layout.images * layout.width, name, " must have one row per image");
}

}  // namespace

Tensor rms_norm(
    const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& scale_in,
    const std::optional<Tensor>& shift_in, double eps) {
  check_float(x_in, "x");
  check_float(weight_in, "weight");
  const Layout layout = layout_of(x_in, scale_in || shift_in);
  STD_TORCH_CHECK(weight_in.numel() == layout.width, "weight must have the width of x");
  if (scale_in) check_modulation(*scale_in, layout, "scale");
  if (shift_in) check_modulation(*shift_in, layout, "shift");

  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  std::optional<Tensor> scale, shift;
  if (scale_in) scale = torch::stable::contiguous(*scale_in);
  if (shift_in) shift = torch::stable::contiguous(*shift_in);
  Tensor y = torch::stable::new_empty(x, x.sizes());

  const float *x_data = data(x), *weight_data = data(weight);
  const float* scale_data = scale ? data(*scale) : nullptr;
  const float* shift_data = shift ? data(*shift) : nullptr;
  float* y_data = mutable_data(y);
  torch::stable::parallel_for(
      0, layout.images * layout.rows_per_image, row_grain(layout.width), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t modulation = row / layout.rows_per_image * layout.width;
          run<forward_row>(
              y_data + row * layout.width, x_data + row * layout.width, weight_data,
              scale_data ? scale_data + modulation : nullptr, shift_data ? shift_data + modulation : nullptr,
              layout.width, static_cast<float>(eps));
        }
      });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& scale_in,
    bool modulated, double eps) {
  check_float(dy_in, "dy");
  check_float(x_in, "x");
  check_float(weight_in, "weight");
  const Layout layout = layout_of(x_in, modulated);
  STD_TORCH_CHECK(dy_in.numel() == x_in.numel(), "dy must have the shape of x");
  STD_TORCH_CHECK(weight_in.numel() == layout.width, "weight must have the width of x");
  if (scale_in) check_modulation(*scale_in, layout, "scale");

  const Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  std::optional<Tensor> scale;
  if (scale_in) scale = torch::stable::contiguous(*scale_in);
  const int64_t width = layout.width, modulation_rows = modulated ? layout.images : 0;
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_zeros(weight, {width});
  Tensor dscale = torch::stable::new_zeros(weight, {modulation_rows, width});
  Tensor dshift = torch::stable::new_zeros(weight, {modulation_rows, width});

  const float *dy_data = data(dy), *x_data = data(x), *weight_data = data(weight);
  const float* scale_data = scale ? data(*scale) : nullptr;
  float* dx_data = mutable_data(dx);

  // Pass 1: dx, and the two column sums of every chunk of rows of one image.
  const int64_t chunks_per_image = ceil_div(layout.rows_per_image, kRowsPerChunk);
  const int64_t chunks = layout.images * chunks_per_image;
  std::vector<float> sums(chunks * 2 * width, 0.0f);
  torch::stable::parallel_for(
      0, chunks, ceil_div(row_grain(width), kRowsPerChunk), [&](int64_t begin, int64_t end) {
        std::vector<float> factor(width);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t image = chunk / chunks_per_image;
          const int64_t first = chunk % chunks_per_image * kRowsPerChunk;
          const int64_t last = std::min(first + kRowsPerChunk, layout.rows_per_image);
          for (int64_t i = 0; i < width; ++i) {
            factor[i] = scale_data ? weight_data[i] * (1.0f + scale_data[image * width + i]) : weight_data[i];
          }
          float* sum_dyxr = sums.data() + chunk * 2 * width;
          for (int64_t row = first; row < last; ++row) {
            const int64_t at = (image * layout.rows_per_image + row) * width;
            run<backward_row>(
                dx_data + at, sum_dyxr, sum_dyxr + width, dy_data + at, x_data + at, factor.data(), width,
                static_cast<float>(eps));
          }
        }
      });

  // Pass 2, small: add the chunks up in a fixed order.
  float *dweight_data = mutable_data(dweight), *dscale_data = mutable_data(dscale), *dshift_data = mutable_data(dshift);
  std::vector<float> total(2 * width);
  for (int64_t image = 0; image < layout.images; ++image) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t chunk = 0; chunk < chunks_per_image; ++chunk) {
      const float* part = sums.data() + (image * chunks_per_image + chunk) * 2 * width;
      for (int64_t i = 0; i < 2 * width; ++i) total[i] += part[i];
    }
    for (int64_t i = 0; i < width; ++i) {
      dweight_data[i] += scale_data ? (1.0f + scale_data[image * width + i]) * total[i] : total[i];
    }
    if (!modulated) continue;
    for (int64_t i = 0; i < width; ++i) {
      dscale_data[image * width + i] = weight_data[i] * total[i];
      dshift_data[image * width + i] = total[width + i];
    }
  }
  return {dx, dweight, dscale, dshift};
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace vadit

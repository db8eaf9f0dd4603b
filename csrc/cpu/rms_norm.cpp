// RMSNorm with modulation, float32 or bfloat16 rows:  y = x r w (1 + scale) + shift,  r = 1 / sqrt(mean(x^2) + eps).
//
// Backward, with g = dy w (1 + scale):  dx = r (g - x r^2 mean(g x)),  and per image  P = sum_n dy x r,
// dscale = w P,  dshift = sum_n dy,  dweight = sum_images (1 + scale) P.
// Bytes moved: forward read x, write y; backward read dy and x, write dx (a row is still in L1 at its second reading).
// r is computed again in the backward pass: the row is read there anyway, so saving it would save nothing.

#ifdef VADIT_ISA

namespace vadit::VADIT_ISA {
namespace {

// Sums this many vectors at once: one sum alone would wait for each addition to end before the next.
constexpr int64_t kSums = 4;

// `factor` is weight * (1 + scale) of the rows' image.
template <class T, bool kShift>
VADIT_INLINE void forward_rows(
    T* y, const T* x, const float* factor, const float* shift, int64_t rows, int64_t width, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    Vec squares[kSums] = {};
    int64_t begin = 0;
    for (; begin + kSums * kLanes <= width; begin += kSums * kLanes) {
      for (int64_t s = 0; s < kSums; ++s) {
        const Vec value = load(x + begin + s * kLanes);
        squares[s] += value * value;
      }
    }
    each_vector(begin, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec value = load(x + i, n);
      squares[0] += value * value;
    });
    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const float r = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + eps);
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec value = load(x + i, n) * r * load(factor + i, n);
      store(y + i, kShift ? value + load(shift + i, n) : value, n);
    });
  }
}

// `shift` may be null.
template <class T>
void forward(T* y, const T* x, const float* factor, const float* shift, int64_t rows, int64_t width, float eps) {
  if (shift) {
    forward_rows<T, true>(y, x, factor, shift, rows, width, eps);
  } else {
    forward_rows<T, false>(y, x, factor, shift, rows, width, eps);
  }
}

// `rows` rows at once, so that the column sums are read and written once for all of them.
template <class T, bool kModulated, int rows>
VADIT_INLINE void backward_group(
    T* dx, float* sum_dyxr, float* sum_dy, const T* dy, const T* x, const float* factor, int64_t width, float eps) {
  float r[rows], pull[rows];
  for (int row = 0; row < rows; ++row) {
    Vec squares[2] = {}, dot[2] = {};
    int64_t begin = 0;
    for (; begin + 2 * kLanes <= width; begin += 2 * kLanes) {
      for (int64_t s = 0; s < 2; ++s) {
        const int64_t i = begin + s * kLanes;
        const Vec value = load(x + row * width + i);
        squares[s] += value * value;
        dot[s] += load(dy + row * width + i) * load(factor + i) * value;
      }
    }
    each_vector(begin, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec value = load(x + row * width + i, n);
      squares[0] += value * value;
      dot[0] += load(dy + row * width + i, n) * load(factor + i, n) * value;
    });
    r[row] = 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / static_cast<float>(width) + eps);
    pull[row] = sum(dot[0] + dot[1]) / static_cast<float>(width) * r[row] * r[row];
  }
  each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
    const Vec f = load(factor + i, n);
    Vec dyxr = load(sum_dyxr + i, n);
    Vec plain = kModulated ? load(sum_dy + i, n) : Vec{};
    for (int row = 0; row < rows; ++row) {
      const Vec value = load(x + row * width + i, n), gradient = load(dy + row * width + i, n);
      store(dx + row * width + i, (gradient * f - value * pull[row]) * r[row], n);
      dyxr += gradient * (value * r[row]);
      plain += gradient;
    }
    store(sum_dyxr + i, dyxr, n);
    if (kModulated) store(sum_dy + i, plain, n);
  });
}

template <class T, bool kModulated>
VADIT_INLINE void backward_rows(
    T* dx, float* sum_dyxr, float* sum_dy, const T* dy, const T* x, const float* factor, int64_t rows, int64_t width,
    float eps) {
  constexpr int kGroup = 4;
  int64_t at = 0;
  for (; rows >= kGroup; rows -= kGroup, at += kGroup * width) {
    backward_group<T, kModulated, kGroup>(dx + at, sum_dyxr, sum_dy, dy + at, x + at, factor, width, eps);
  }
  for (; rows > 0; --rows, at += width) {
    backward_group<T, kModulated, 1>(dx + at, sum_dyxr, sum_dy, dy + at, x + at, factor, width, eps);
  }
}

// The rows' dy x r and dy are added to the two column sums; sum_dy may be null.
template <class T>
void backward(
    T* dx, float* sum_dyxr, float* sum_dy, const T* dy, const T* x, const float* factor, int64_t rows, int64_t width,
    float eps) {
  if (sum_dy) {
    backward_rows<T, true>(dx, sum_dyxr, sum_dy, dy, x, factor, rows, width, eps);
  } else {
    backward_rows<T, false>(dx, sum_dyxr, sum_dy, dy, x, factor, rows, width, eps);
  }
}

}  // namespace
}  // namespace vadit::VADIT_ISA

#else

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#define VADIT_KERNELS "rms_norm.cpp"
#include "vec.h"

namespace vadit {
namespace {

// Rows of one image that one task takes. Fixed, so that no sum depends on the number of threads.
constexpr int64_t kRowsPerChunk = 32;

// Rows are grouped by image where there is a modulation; otherwise all rows are one group.
struct Layout {
  int64_t images, rows_per_image, width, chunks_per_image;

  Layout(const Tensor& x, bool modulated) {
    STD_TORCH_CHECK(x.dim() >= (modulated ? 2 : 1), "x must have rows");
    width = x.size(x.dim() - 1);
    images = modulated ? x.size(0) : 1;
    rows_per_image = width > 0 && images > 0 ? x.numel() / width / images : 0;
    chunks_per_image = ceil_div(rows_per_image, kRowsPerChunk);
  }

  // f(chunk, image, first row, number of rows) for every chunk, in parallel.
  template <class F>
  void each_chunk(const F& f) const {
    const int64_t grain = ceil_div(row_grain(width), kRowsPerChunk);
    torch::stable::parallel_for(0, images * chunks_per_image, grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t image = chunk / chunks_per_image, first = chunk % chunks_per_image * kRowsPerChunk;
        f(chunk, image, image * rows_per_image + first, std::min(kRowsPerChunk, rows_per_image - first));
      }
    });
  }
};

void check_row(const Tensor& t, int64_t numel, const char* name) {
  check_float(t, name);
  STD_TORCH_CHECK(t.numel() == numel, name, " must have the width of x (and a row per image, if it is a modulation)");
}

// weight * (1 + scale), one row per image, or one row in all where there is no scale.
std::vector<float> factors(const Tensor& weight, const std::optional<Tensor>& scale, const Layout& layout) {
  const float *w = data<float>(weight), *s = data<float>(scale);
  std::vector<float> result(w, w + layout.width);
  if (!scale) return result;
  result.resize(layout.images * layout.width);
  for (int64_t at = 0; at < layout.images * layout.width; at += layout.width) {
    for (int64_t i = 0; i < layout.width; ++i) result[at + i] = w[i] * (1.0f + s[at + i]);
  }
  return result;
}

}  // namespace

Tensor rms_norm(
    const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& scale_in,
    const std::optional<Tensor>& shift_in, double eps) {
  check_element(x_in, "x");
  const Layout layout(x_in, scale_in || shift_in);
  const int64_t width = layout.width;
  check_row(weight_in, width, "weight");
  if (scale_in) check_row(*scale_in, layout.images * width, "scale");
  if (shift_in) check_row(*shift_in, layout.images * width, "shift");

  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> scale = contiguous(scale_in), shift = contiguous(shift_in);
  Tensor y = new_large(x, x.sizes());
  const std::vector<float> factor = factors(weight, scale, layout);
  with_element(x, [&](auto element) {
    using T = decltype(element);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    const float* shift_data = data<float>(shift);
    layout.each_chunk([&](int64_t, int64_t image, int64_t first, int64_t rows) {
      const float* f = factor.data() + (scale ? image * width : 0);
      const int64_t at = first * width;
      const float* shift_row = shift ? shift_data + image * width : nullptr;
      VADIT_CALL(forward<T>, to + at, from + at, f, shift_row, rows, width, eps);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& scale_in,
    bool modulated, double eps) {
  check_element(x_in, "x");
  check_like(dy_in, x_in, "dy");
  STD_TORCH_CHECK(modulated || !scale_in, "a scale is a modulation");
  const Layout layout(x_in, modulated);
  const int64_t width = layout.width;
  check_row(weight_in, width, "weight");
  if (scale_in) check_row(*scale_in, layout.images * width, "scale");

  const Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> scale = contiguous(scale_in);
  const int64_t modulation_rows = modulated ? layout.images : 0;
  Tensor dx = new_large(x, x.sizes());
  Tensor dweight = torch::stable::new_zeros(weight, {width});
  Tensor dscale = torch::stable::new_zeros(weight, {modulation_rows, width});
  Tensor dshift = torch::stable::new_zeros(weight, {modulation_rows, width});
  const std::vector<float> factor = factors(weight, scale, layout);

  // Pass 1: dx, and the column sums of every chunk: dy x r, and dy where it is needed.
  const int64_t sums_per_chunk = (modulated ? 2 : 1) * width;
  std::vector<float> sums(layout.images * layout.chunks_per_image * sums_per_chunk);
  with_element(x, [&](auto element) {
    using T = decltype(element);
    const T *dy_data = data<T>(dy), *x_data = data<T>(x);
    T* dx_data = mutable_data<T>(dx);
    layout.each_chunk([&](int64_t chunk, int64_t image, int64_t first, int64_t rows) {
      const float* f = factor.data() + (scale ? image * width : 0);
      float* part = sums.data() + chunk * sums_per_chunk;
      const int64_t at = first * width;
      float* sum_dy = modulated ? part + width : nullptr;
      VADIT_CALL(backward<T>, dx_data + at, part, sum_dy, dy_data + at, x_data + at, f, rows, width, eps);
    });
  });

  // Pass 2, small: add the chunks up in a fixed order.
  const float *weight_data = data<float>(weight), *scale_data = data<float>(scale);
  float* dweight_data = mutable_data<float>(dweight);
  float *dscale_data = mutable_data<float>(dscale), *dshift_data = mutable_data<float>(dshift);
  std::vector<float> total(sums_per_chunk);
  for (int64_t image = 0; image < layout.images; ++image) {
    std::fill(total.begin(), total.end(), 0.0f);
    const float* part = sums.data() + image * layout.chunks_per_image * sums_per_chunk;
    for (int64_t chunk = 0; chunk < layout.chunks_per_image; ++chunk, part += sums_per_chunk) {
      for (int64_t i = 0; i < sums_per_chunk; ++i) total[i] += part[i];
    }
    const int64_t at = image * width;
    for (int64_t i = 0; i < width; ++i) dweight_data[i] += scale ? (1.0f + scale_data[at + i]) * total[i] : total[i];
    for (int64_t i = 0; modulated && i < width; ++i) {
      dscale_data[at + i] = weight_data[i] * total[i];
      dshift_data[at + i] = total[width + i];
    }
  }
  return {dx, dweight, dscale, dshift};
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace vadit

#endif

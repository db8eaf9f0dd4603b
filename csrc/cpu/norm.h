// RMSNorm with modulation of float32 or bfloat16 rows, where kGated behind a gated residual sum:
//   s = x + gate (h + bias)  (x alone where not gated),  y = s r w (1 + scale) + shift,  r = 1 / sqrt(mean(s^2) + eps).
//
// Backward, with g = dy w (1 + scale):  dx = r (g - s r^2 mean(g s)) + dsum,  dh = gate dx,  and per image
// P = sum_n dy s r,  dscale = w P,  dshift = sum_n dy,  dgate = sum_n dx (h + bias),  dweight = sum_images (1 + scale) P,
// dbias = sum_images gate sum_n dx.
// Bytes moved: forward reads x (and h) and writes y (and s); backward reads dy, s (dsum and h) and writes dx (and dh): a
// row is still in L1 at its second reading, so r is computed again instead of kept.
//
// Included once by rms_norm.cpp and by gated_norm.cpp, and by vec.h for each instruction set.

#ifdef VADIT_ISA

namespace vadit::VADIT_ISA {
namespace {

// Sums this many vectors at once: one sum alone would wait for each addition to end before the next.
constexpr int64_t kSums = 4;

template <class To, class From>
void convert(To* to, const From* from, int64_t size) {
  each_vector(0, size, [&](int64_t i, int64_t n) VADIT_LAMBDA { store(to + i, load(from + i, n), n); });
}

template <bool kGated, bool kShift, class T, class Y>
VADIT_INLINE void forward_rows(
    Y* y, T* total, const T* x, const Y* h, ImageRow image, int64_t rows, int64_t width, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    Vec squares[kSums] = {};
    const auto add = [&](int64_t i, int64_t n, int64_t sum) VADIT_LAMBDA {
      Vec value = load(x + i, n);
      if constexpr (kGated) {
        value += load(image.gate + i, n) * (load(h + i, n) + load(image.bias + i, n));
        store(total + i, value, n);
        if (sizeof(T) < sizeof(float)) value = load(total + i, n);  // rounded, as the backward pass finds it
      }
      squares[sum] += value * value;
    };
    int64_t begin = 0;
    for (; begin + kSums * kLanes <= width; begin += kSums * kLanes) {
      for (int64_t sum = 0; sum < kSums; ++sum) add(begin + sum * kLanes, kLanes, sum);
    }
    each_vector(begin, width, [&](int64_t i, int64_t n) VADIT_LAMBDA { add(i, n, 0); });
    const float all = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const float r = 1.0f / __builtin_sqrtf(all / static_cast<float>(width) + eps);
    const T* normed = kGated ? total : x;
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec value = load(normed + i, n) * r * load(image.factor + i, n);
      store(y + i, kShift ? value + load(image.shift + i, n) : value, n);
    });
    if constexpr (kGated) total += width, h += width;
  }
}

// total and h are null where not gated.
template <bool kGated, class T, class Y>
void forward(Y* y, T* total, const T* x, const Y* h, ImageRow image, int64_t rows, int64_t width, float eps) {
  if (image.shift) {
    forward_rows<kGated, true>(y, total, x, h, image, rows, width, eps);
  } else {
    forward_rows<kGated, false>(y, total, x, h, image, rows, width, eps);
  }
}

// `rows` rows at once, so that the column sums are read and written once for all of them.
template <bool kGated, bool kShift, int rows, class T, class Y>
VADIT_INLINE void backward_group(
    T* dx, Y* dh, float* sums, const Y* dy, const T* dtotal, const T* x, const Y* h, ImageRow image, int64_t width,
    float eps) {
  float r[rows], pull[rows];
  for (int row = 0; row < rows; ++row) {
    Vec squares[2] = {}, dot[2] = {};
    const auto add = [&](int64_t i, int64_t n, int64_t sum) VADIT_LAMBDA {
      const Vec value = load(x + row * width + i, n);
      squares[sum] += value * value;
      dot[sum] += load(dy + row * width + i, n) * load(image.factor + i, n) * value;
    };
    int64_t begin = 0;
    for (; begin + 2 * kLanes <= width; begin += 2 * kLanes) {
      add(begin, kLanes, 0);
      add(begin + kLanes, kLanes, 1);
    }
    each_vector(begin, width, [&](int64_t i, int64_t n) VADIT_LAMBDA { add(i, n, 0); });
    r[row] = 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / static_cast<float>(width) + eps);
    pull[row] = sum(dot[0] + dot[1]) / static_cast<float>(width) * r[row] * r[row];
  }
  float *sum_dyxr = sums, *sum_dy = sums + width, *sum_dxh = sums + 2 * width, *sum_dx = sums + 3 * width;
  each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
    const Vec f = load(image.factor + i, n), gate = kGated ? load(image.gate + i, n) : Vec{};
    Vec dyxr = load(sum_dyxr + i, n), plain = kShift ? load(sum_dy + i, n) : Vec{};
    Vec dxh = kGated ? load(sum_dxh + i, n) : Vec{}, all = kGated ? load(sum_dx + i, n) : Vec{};
    for (int row = 0; row < rows; ++row) {
      const int64_t at = row * width + i;
      const Vec value = load(x + at, n), gradient = load(dy + at, n);
      Vec d = (gradient * f - value * pull[row]) * r[row];
      if constexpr (kGated) {
        d += load(dtotal + at, n);
        store(dh + at, d * gate, n);
        dxh += d * load(h + at, n);
        all += d;
      }
      store(dx + at, d, n);
      dyxr += gradient * (value * r[row]);
      plain += gradient;
    }
    store(sum_dyxr + i, dyxr, n);
    if (kShift) store(sum_dy + i, plain, n);
    if (kGated) store(sum_dxh + i, dxh, n), store(sum_dx + i, all, n);
  });
}

template <bool kGated, bool kShift, class T, class Y>
VADIT_INLINE void backward_rows(
    T* dx, Y* dh, float* sums, const Y* dy, const T* dtotal, const T* x, const Y* h, ImageRow image, int64_t rows,
    int64_t width, float eps) {
  constexpr int kGroup = 4;
  int64_t at = 0, gated_at = 0;
  const auto group = [&](auto size) VADIT_LAMBDA {
    backward_group<kGated, kShift, decltype(size)::value>(
        dx + at, dh + gated_at, sums, dy + at, dtotal + gated_at, x + at, h + gated_at, image, width, eps);
    rows -= size, at += size * width;
    if (kGated) gated_at = at;
  };
  while (rows >= kGroup) group(Constant<kGroup>{});
  while (rows > 0) group(Constant<1>{});
}

// The rows' dy x r, dy (with a shift), dx h and dx are added to the column sums. dh, dtotal and h are null where not gated.
template <bool kGated, class T, class Y>
void backward(
    T* dx, Y* dh, float* sums, const Y* dy, const T* dtotal, const T* x, const Y* h, ImageRow image, bool shifted,
    int64_t rows, int64_t width, float eps) {
  if (shifted) {
    backward_rows<kGated, true>(dx, dh, sums, dy, dtotal, x, h, image, rows, width, eps);
  } else {
    backward_rows<kGated, false>(dx, dh, sums, dy, dtotal, x, h, image, rows, width, eps);
  }
}

}  // namespace
}  // namespace vadit::VADIT_ISA

#else

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

namespace vadit {
namespace {

// Floats that the rows of an image share; shift is null where there is none, gate and bias where not gated.
struct ImageRow {
  const float *factor, *shift, *gate, *bias;  // factor: weight * (1 + scale)
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  constexpr operator int64_t() const { return kValue; }
};

}  // namespace
}  // namespace vadit

#define VADIT_KERNELS "norm.h"
#include "vec.h"

namespace vadit {
namespace {

using OptionalTensor = std::optional<Tensor>;

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

// A weight (a single row) or a modulation as floats, whatever its dtype and strides; nothing where there is none.
std::vector<float> floats(const OptionalTensor& t_in, int64_t rows, int64_t width, const char* name) {
  if (!t_in) return {};
  check_element(*t_in, name);
  STD_TORCH_CHECK(
      t_in->numel() == rows * width && t_in->dim() > 0 && t_in->dim() <= 2, name,
      " must have the width of x (and a row per image, if it is a modulation)");
  const bool dense = width <= 1 || t_in->stride(t_in->dim() - 1) == 1;
  const Tensor t = dense ? *t_in : torch::stable::contiguous(*t_in);
  const int64_t stride = t.dim() == 2 ? t.stride(0) : 0;
  std::vector<float> result(rows * width);
  with_element(t, [&](auto element) {
    const auto* from = data<decltype(element)>(t);
    for (int64_t row = 0; row < rows; ++row) VADIT_CALL(convert, &result[row * width], from + row * stride, width);
  });
  return result;
}

// A gradient in the dtype of its tensor; without rows where there is none.
Tensor gradient_of(const OptionalTensor& t, const Tensor& x, const std::vector<float>& values, int64_t width) {
  if (!t) return torch::stable::new_empty(x, {0, width});
  Tensor result = torch::stable::new_empty(*t, t->sizes());
  with_element(result, [&](auto element) {
    VADIT_CALL(convert, mutable_data<decltype(element)>(result), values.data(), static_cast<int64_t>(values.size()));
  });
  return result;
}

// Calls f with values of the element types of what is normed and of its norm.
template <class F>
void with_elements(const Tensor& x, const Tensor& y, const F& f) {
  check_element(x, "x");
  check_element(y, "y");
  if (y.scalar_type() == ScalarType::Float) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "a norm in float32 needs float32");
    f(float{}, float{});
  } else if (x.scalar_type() == ScalarType::Float) {
    f(float{}, bfloat16{});
  } else {
    f(bfloat16{}, bfloat16{});
  }
}

void check_sizes(const Tensor& t, const Tensor& like, const char* name) {
  bool same = t.dim() == like.dim();
  for (int64_t axis = 0; same && axis < t.dim(); ++axis) same = t.size(axis) == like.size(axis);
  STD_TORCH_CHECK(same, name, " has another shape than the op expects");
}

// What weights every row of the norm and, where gated, of the sum; null where there is none.
struct Weights {
  OptionalTensor gate, bias, weight, scale, shift;
};

// The same as floats, and the rows that they belong to.
struct Call {
  Layout layout;
  std::vector<float> gate, bias, weight, scale, shift, factor;

  Call(const Tensor& x, const Weights& w)
      : layout(x, w.gate || w.scale || w.shift), gate(floats(w.gate, layout.images, layout.width, "gate")),
        bias(floats(w.bias, 1, layout.width, "bias")), weight(floats(w.weight, 1, layout.width, "weight")),
        scale(floats(w.scale, layout.images, layout.width, "scale")),
        shift(floats(w.shift, layout.images, layout.width, "shift")), factor(weight) {
    if (bias.empty()) bias.resize(layout.width);
    factor.resize(std::max(weight.size(), scale.size()));
    for (size_t i = 0; i < scale.size(); ++i) factor[i] = weight[i % layout.width] * (1.0f + scale[i]);
  }

  ImageRow image(int64_t index) const {
    const int64_t at = index * layout.width;
    const auto row = [&](const std::vector<float>& all) { return all.empty() ? nullptr : all.data() + at; };
    return {scale.empty() ? factor.data() : factor.data() + at, row(shift), row(gate), bias.data()};
  }
};

// The sum (of no elements where not gated) and the norm, of type `type`.
template <bool kGated>
std::tuple<Tensor, Tensor> norm(
    const Tensor& x_in, const OptionalTensor& h_in, const Weights& weights, ScalarType type, double eps) {
  const Call call(x_in, weights);
  const int64_t width = call.layout.width;
  const Tensor x = torch::stable::contiguous(x_in), h = kGated ? torch::stable::contiguous(*h_in) : x;
  if (kGated) check_sizes(h, x, "h");
  Tensor total = kGated ? new_large(x, x.sizes()) : x;
  Tensor y = new_large(x, x.sizes(), type);
  with_elements(x, y, [&](auto element, auto low) {
    using T = decltype(element);
    using Y = decltype(low);
    call.layout.each_chunk([&](int64_t, int64_t image, int64_t first, int64_t rows) {
      const int64_t at = first * width;
      VADIT_CALL(
          forward<kGated>, mutable_data<Y>(y) + at, kGated ? mutable_data<T>(total) + at : nullptr, data<T>(x) + at,
          kGated ? data<Y>(h) + at : nullptr, call.image(image), rows, width, eps);
    });
  });
  return {total, y};
}

// The gradients of x, h (of no elements where not gated), gate, bias, weight, scale and shift.
template <bool kGated>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward(
    const OptionalTensor& dtotal_in, const Tensor& dy_in, const Tensor& x_in, const OptionalTensor& h_in,
    const Weights& weights, double eps) {
  const Call call(x_in, weights);
  const Layout& layout = call.layout;
  const int64_t width = layout.width, kinds = kGated ? 4 : 2;
  const bool shifted = weights.shift.has_value();
  const Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
  check_sizes(dy, x, "dy");
  const Tensor h = kGated ? torch::stable::contiguous(*h_in) : dy;
  const Tensor dtotal = kGated ? torch::stable::contiguous(*dtotal_in) : x;
  if (kGated) {
    check_like(h, dy, "h");
    check_like(dtotal, x, "dsum");
  }
  Tensor dx = new_large(x, x.sizes()), dh = kGated ? new_large(h, h.sizes()) : dx;

  // Pass 1: dx, dh, and the column sums of every chunk.
  std::vector<float> sums(layout.images * layout.chunks_per_image * kinds * width);
  with_elements(x, dy, [&](auto element, auto low) {
    using T = decltype(element);
    using Y = decltype(low);
    layout.each_chunk([&](int64_t chunk, int64_t image, int64_t first, int64_t rows) {
      const int64_t at = first * width;
      VADIT_CALL(
          backward<kGated>, mutable_data<T>(dx) + at, kGated ? mutable_data<Y>(dh) + at : nullptr,
          &sums[chunk * kinds * width], data<Y>(dy) + at, kGated ? data<T>(dtotal) + at : nullptr, data<T>(x) + at,
          kGated ? data<Y>(h) + at : nullptr, call.image(image), shifted, rows, width, eps);
    });
  });

  // Pass 2, small: add the chunks up in a fixed order.
  std::vector<float> dgate(call.gate.size()), dbias(width), dweight(width);
  std::vector<float> dscale(call.scale.size()), dshift(call.shift.size()), all(kinds * width);
  for (int64_t image = 0; image < layout.images; ++image) {
    std::fill(all.begin(), all.end(), 0.0f);
    const float* part = sums.data() + image * layout.chunks_per_image * kinds * width;
    for (int64_t chunk = 0; chunk < layout.chunks_per_image; ++chunk, part += kinds * width) {
      for (int64_t i = 0; i < kinds * width; ++i) all[i] += part[i];
    }
    const float *dyxr = all.data(), *plain = dyxr + width, *dxh = plain + width, *total = dxh + width;
    for (int64_t i = 0, at = image * width; i < width; ++i, ++at) {
      dweight[i] += dscale.empty() ? dyxr[i] : (1.0f + call.scale[at]) * dyxr[i];
      if (!dscale.empty()) dscale[at] = call.weight[i] * dyxr[i];
      if (shifted) dshift[at] = plain[i];
      if (kGated) {
        dgate[at] = dxh[i] + call.bias[i] * total[i];
        dbias[i] += call.gate[at] * total[i];
      }
    }
  }
  return {dx,
          dh,
          gradient_of(weights.gate, x, dgate, width),
          gradient_of(weights.bias, x, dbias, width),
          gradient_of(weights.weight, x, dweight, width),
          gradient_of(weights.scale, x, dscale, width),
          gradient_of(weights.shift, x, dshift, width)};
}

}  // namespace
}  // namespace vadit

#endif

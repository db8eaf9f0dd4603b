// GroupNorm and SiLU on rows of channels, float32 or bfloat16:  h = (x - mean) rstd,  z = h w + b,  y = z s(z) or z.
//
// Backward, with dz = dy s (1 + z (1 - s)) or dy, and n numbers in a group:
// dx = rstd (dz w - mean(dz w) - h mean(dz w h)),  dweight = sum dz h,  dbias = sum dz.
// Bytes moved: forward read x twice, write y; backward read dy and x twice, write dx.

#ifdef VADIT_ISA

#include "sigmoid.h"

namespace vadit::VADIT_ISA {
namespace {

constexpr int kGroup = 4;  // rows at once, so that the sums are read and written once for all of them

// Calls f(rows, first row), with a constant for `rows`: kGroup, and 1 for what is left.
template <class F>
VADIT_INLINE void each_group(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + kGroup <= rows; row += kGroup) f(std::integral_constant<int, kGroup>{}, row);
  for (; row < rows; ++row) f(std::integral_constant<int, 1>{}, row);
}

// Per channel the mean and the squared deviations from it of some rows. Sums are of differences to the first row:
// nothing cancels where a mean is large. Both must hold zeros.
template <class T>
void moments(float* mean, float* squares, const T* x, int64_t rows, int64_t width) {
  each_group(rows, [&](auto count, int64_t row) VADIT_LAMBDA {
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec first = load(x + i, n);
      Vec sum = load(mean + i, n), square = load(squares + i, n);
      for (int k = 0; k < count; ++k) {
        const Vec difference = load(x + (row + k) * width + i, n) - first;
        sum += difference;
        square += difference * difference;
      }
      store(mean + i, sum, n);
      store(squares + i, square, n);
    });
  });
  each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
    const Vec sum = load(mean + i, n), part = sum / static_cast<float>(rows);
    store(squares + i, load(squares + i, n) - sum * part, n);
    store(mean + i, load(x + i, n) + part, n);
  });
}

template <class T, bool kSilu>
VADIT_INLINE void forward_rows(T* y, const T* x, const Channels& c, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec h = (load(x + i, n) - load(c.mean + i, n)) * load(c.rstd + i, n);
      const Vec z = h * load(c.weight + i, n) + load(c.bias + i, n);
      store(y + i, kSilu ? z * sigmoid<T>(z).s : z, n);
    });
  }
}

template <class T>
void forward(bool silu, T* y, const T* x, const Channels& c, int64_t rows, int64_t width) {
  if (silu) {
    forward_rows<T, true>(y, x, c, rows, width);
  } else {
    forward_rows<T, false>(y, x, c, rows, width);
  }
}

// dL/dz, where h is known.
template <class T, bool kSilu>
VADIT_INLINE Vec dz_of(Vec dy, Vec h, const Channels& c, int64_t i, int64_t n) {
  if (!kSilu) return dy;
  const Vec z = h * load(c.weight + i, n) + load(c.bias + i, n);
  const Sigmoid gate = sigmoid<T>(z);
  return dy * gate.s * (z * gate.one_minus_s + 1.0f);
}

// Adds the rows' dz h and dz to the two sums.
template <class T, bool kSilu>
VADIT_INLINE void sum_rows(
    float* sum_dzh, float* sum_dz, const T* dy, const T* x, const Channels& c, int64_t rows, int64_t width) {
  each_group(rows, [&](auto count, int64_t row) VADIT_LAMBDA {
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      Vec dzh = load(sum_dzh + i, n), plain = load(sum_dz + i, n);
      for (int k = 0; k < count; ++k) {
        const int64_t at = (row + k) * width + i;
        const Vec h = (load(x + at, n) - load(c.mean + i, n)) * load(c.rstd + i, n);
        const Vec dz = dz_of<T, kSilu>(load(dy + at, n), h, c, i, n);
        dzh += dz * h;
        plain += dz;
      }
      store(sum_dzh + i, dzh, n);
      store(sum_dz + i, plain, n);
    });
  });
}

template <class T>
void sums(
    bool silu, float* sum_dzh, float* sum_dz, const T* dy, const T* x, const Channels& c, int64_t rows, int64_t width) {
  if (silu) {
    sum_rows<T, true>(sum_dzh, sum_dz, dy, x, c, rows, width);
  } else {
    sum_rows<T, false>(sum_dzh, sum_dz, dy, x, c, rows, width);
  }
}

template <class T, bool kSilu>
VADIT_INLINE void backward_rows(T* dx, const T* dy, const T* x, const Channels& c, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width, dx += width) {
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec rstd = load(c.rstd + i, n), h = (load(x + i, n) - load(c.mean + i, n)) * rstd;
      const Vec g = dz_of<T, kSilu>(load(dy + i, n), h, c, i, n) * load(c.weight + i, n);
      store(dx + i, rstd * (g - load(c.pull + i, n) - h * load(c.slope + i, n)), n);
    });
  }
}

template <class T>
void backward(bool silu, T* dx, const T* dy, const T* x, const Channels& c, int64_t rows, int64_t width) {
  if (silu) {
    backward_rows<T, true>(dx, dy, x, c, rows, width);
  } else {
    backward_rows<T, false>(dx, dy, x, c, rows, width);
  }
}

}  // namespace
}  // namespace vadit::VADIT_ISA

#else

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

namespace vadit {
namespace {
// One number per channel of an image; the last two are mean(dz w) and mean(dz w h) of its group.
struct Channels {
  const float *mean, *rstd, *weight, *bias, *pull, *slope;
};
}  // namespace
}  // namespace vadit

#define VADIT_KERNELS "group_norm_silu.cpp"
#include "vec.h"

namespace vadit {
namespace {

// Rows that one task takes. Fixed, so that no sum depends on the number of threads.
constexpr int64_t kRows = 64;

struct Layout {
  int64_t images, rows, width, groups, chunks;

  Layout(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups_) {
    check_element(x, "x");
    check_float(weight, "weight");
    check_float(bias, "bias");
    STD_TORCH_CHECK(x.dim() == 3, "x must be (B, N, C)");
    images = x.size(0), rows = x.size(1), width = x.size(2), groups = groups_;
    STD_TORCH_CHECK(groups > 0 && width % groups == 0, "the groups must divide the channels of x");
    STD_TORCH_CHECK(weight.numel() == width && bias.numel() == width, "weight and bias must have a number per channel");
    chunks = ceil_div(rows, kRows);
  }
  int64_t group_width() const { return width / groups; }

  // f(chunk, image, offset of its first element, its rows), in parallel.
  template <class F>
  void each_chunk(const F& f) const {
    const int64_t grain = ceil_div(row_grain(width), kRows);
    torch::stable::parallel_for(0, images * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t image = chunk / chunks, first = chunk % chunks * kRows;
        f(chunk, image, (image * rows + first) * width, std::min(kRows, rows - first));
      }
    });
  }
};

// A number per group to each of its channels, all images.
std::vector<float> per_channel(const Layout& layout, const float* values) {
  std::vector<float> found(layout.images * layout.width);
  for (size_t i = 0; i < found.size(); ++i) found[i] = values[i / layout.group_width()];
  return found;
}

// Mean and rstd per group of the chunks' means and squares (each a row of `width`), by Chan et al. (1979).
void combine(const Layout& layout, const float* means, const float* squares, double eps, float* mean, float* rstd) {
  const int64_t each = layout.group_width();
  const double count = static_cast<double>(layout.rows * each);
  const auto rows_of = [&](int64_t chunk) { return std::min(kRows, layout.rows - chunk * kRows); };
  for (int64_t group = 0; group < layout.images * layout.groups; ++group) {
    const int64_t first = group / layout.groups * layout.chunks * layout.width + group % layout.groups * each;
    double sum = 0.0, deviation = 0.0;
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
      const float* row = means + first + chunk * layout.width;
      for (int64_t i = 0; i < each; ++i) sum += row[i] * static_cast<double>(rows_of(chunk));
    }
    const double center = sum / count;
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
      const int64_t at = first + chunk * layout.width;
      for (int64_t i = 0; i < each; ++i) {
        const double off = means[at + i] - center;
        deviation += squares[at + i] + off * off * static_cast<double>(rows_of(chunk));
      }
    }
    mean[group] = static_cast<float>(center);
    rstd[group] = static_cast<float>(1.0 / std::sqrt(deviation / count + eps));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(
    const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, int64_t groups, double eps, bool silu) {
  const Layout layout(x_in, weight_in, bias_in, groups);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  const Tensor bias = torch::stable::contiguous(bias_in);
  Tensor y = new_large(x, x.sizes());
  Tensor mean = torch::stable::new_zeros(weight, {layout.images, groups});
  Tensor rstd = torch::stable::new_zeros(weight, {layout.images, groups});
  if (x.numel() == 0) return {y, mean, rstd};
  with_element(x, [&](auto element) {
    using T = decltype(element);
    const T* from = data<T>(x);
    const int64_t width = layout.width;
    std::vector<float> means(layout.images * layout.chunks * width), squares(means.size());
    layout.each_chunk([&](int64_t chunk, int64_t, int64_t at, int64_t rows) {
      VADIT_CALL(moments<T>, means.data() + chunk * width, squares.data() + chunk * width, from + at, rows, width);
    });
    combine(layout, means.data(), squares.data(), eps, mutable_data<float>(mean), mutable_data<float>(rstd));
    const std::vector<float> m = per_channel(layout, data<float>(mean)), r = per_channel(layout, data<float>(rstd));
    T* to = mutable_data<T>(y);
    layout.each_chunk([&](int64_t, int64_t image, int64_t at, int64_t rows) {
      const int64_t i = image * width;
      const Channels c{m.data() + i, r.data() + i, data<float>(weight), data<float>(bias), nullptr, nullptr};
      VADIT_CALL(forward<T>, silu, to + at, from + at, c, rows, width);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, const Tensor& mean_in,
    const Tensor& rstd_in, bool silu) {
  check_float(mean_in, "mean");
  check_float(rstd_in, "rstd");
  STD_TORCH_CHECK(mean_in.dim() == 2 && rstd_in.numel() == mean_in.numel(), "mean and rstd must be (B, G)");
  const Layout layout(x_in, weight_in, bias_in, mean_in.size(1));
  STD_TORCH_CHECK(mean_in.size(0) == layout.images, "mean must have a row per image");
  check_like(dy_in, x_in, "dy");
  const Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in), bias = torch::stable::contiguous(bias_in);
  const Tensor mean = torch::stable::contiguous(mean_in), rstd = torch::stable::contiguous(rstd_in);
  const int64_t width = layout.width, images = layout.images, each = layout.group_width();
  Tensor dx = new_large(x, x.sizes());
  Tensor dweight = torch::stable::new_zeros(weight, {width}), dbias = torch::stable::new_zeros(weight, {width});
  if (x.numel() == 0) return {dx, dweight, dbias};
  const std::vector<float> m = per_channel(layout, data<float>(mean)), r = per_channel(layout, data<float>(rstd));
  std::vector<float> pull(images * width), slope(images * width);
  const float* w = data<float>(weight);
  const auto channels = [&](int64_t image) {
    const int64_t i = image * width;
    return Channels{m.data() + i, r.data() + i, w, data<float>(bias), pull.data() + i, slope.data() + i};
  };
  with_element(x, [&](auto element) {
    using T = decltype(element);
    const T *dy_data = data<T>(dy), *x_data = data<T>(x);
    // Pass 1: the sums of dz h and of dz per chunk and channel.
    std::vector<float> part(2 * images * layout.chunks * width);
    layout.each_chunk([&](int64_t chunk, int64_t image, int64_t at, int64_t rows) {
      float* sum = part.data() + 2 * chunk * width;
      VADIT_CALL(sums<T>, silu, sum, sum + width, dy_data + at, x_data + at, channels(image), rows, width);
    });
    // Between, small: the chunks in their order, then the channels of a group.
    std::vector<double> total(2 * width);
    const double count = static_cast<double>(layout.rows * each);
    float *dweight_data = mutable_data<float>(dweight), *dbias_data = mutable_data<float>(dbias);
    for (int64_t image = 0; image < images; ++image) {
      std::fill(total.begin(), total.end(), 0.0);
      const float* sum = part.data() + 2 * image * layout.chunks * width;
      for (int64_t chunk = 0; chunk < layout.chunks; ++chunk, sum += 2 * width) {
        for (int64_t i = 0; i < 2 * width; ++i) total[i] += sum[i];
      }
      for (int64_t first = 0; first < width; first += each) {
        double dzh = 0.0, dz = 0.0;
        for (int64_t i = first; i < first + each; ++i) dzh += total[i] * w[i], dz += total[width + i] * w[i];
        for (int64_t i = image * width + first; i < image * width + first + each; ++i) {
          pull[i] = static_cast<float>(dz / count);
          slope[i] = static_cast<float>(dzh / count);
        }
      }
      for (int64_t i = 0; i < width; ++i) {
        dweight_data[i] += static_cast<float>(total[i]);
        dbias_data[i] += static_cast<float>(total[width + i]);
      }
    }
    // Pass 2: dx.
    T* dx_data = mutable_data<T>(dx);
    layout.each_chunk([&](int64_t, int64_t image, int64_t at, int64_t rows) {
      VADIT_CALL(backward<T>, silu, dx_data + at, dy_data + at, x_data + at, channels(image), rows, width);
    });
  });
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace vadit

#endif

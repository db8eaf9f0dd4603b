// The two matrix products of the vision-foundation loss, float32 inside; features in float32 or bfloat16.
//
//   vf_gram:     cosines[i,j] = <f_i, f_j> / (|f_i| |f_j|),  inverse_norm[i] = 1 / |f_i|      f_i: column of (D, N)
//   vf_distmat:  gap = u^T v - cosines,  loss = mean relu(|gap| - margin),  sign = sign(gap) or 0 where |gap| <= margin
//
// Both matrices are symmetric: only tiles on or above the diagonal are computed, and mirrored at the store.
// Arithmetic, not bytes, is the bound: D N^2 multiply-adds per image for D N + N^2 elements moved. Columns are packed
// into panels as wide as the micro kernel's tile, so that it reads memory in one stream, with its sums in registers.

#ifdef VADIT_ISA

namespace vadit::VADIT_ISA {
namespace {

constexpr int64_t kVectors = 3;                           // in a row of a tile
constexpr int64_t kPanel = kVectors * kLanes;             // columns of a tile
constexpr int64_t kTileRows = VADIT_LANES == 16 ? 8 : 4;  // its sums fill three quarters of the registers

// (depth, columns) with row stride `stride` -> panels of (depth, kPanel), zeros beyond the last column.
template <class T>
void pack(float* to, const T* from, int64_t stride, int64_t depth, int64_t columns) {
  constexpr int64_t kRowsAtOnce = 8;  // few enough to stay in L1 while the panels take their parts of them
  for (int64_t first = 0; first < depth; first += kRowsAtOnce) {
    const int64_t end = first + kRowsAtOnce < depth ? first + kRowsAtOnce : depth;
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int64_t left = columns - column;
      for (int64_t k = first; k < end; ++k) {
        float* row = to + column * depth + k * kPanel;
        const T* source = from + k * stride + column;
        for (int64_t v = 0; v < kPanel; v += kLanes) {
          store(row + v, left >= kPanel ? load(source + v) : left > v ? load(source + v, left - v) : Vec{});
        }
      }
    }
  }
}

// The tile of sums over depth of a[k, row] b[k, column], added to `to`.
VADIT_INLINE void add_tile(float* to, int64_t stride, const float* a, const float* b, int64_t depth) {
  Vec sums[kTileRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += kPanel, b += kPanel) {
    Vec columns[kVectors];
#pragma GCC unroll 3
    for (int64_t v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int64_t row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) sums[row][v] += a[row] * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t row = 0; row < kTileRows; ++row, to += stride) {
#pragma GCC unroll 3
    for (int64_t v = 0; v < kVectors; ++v) store(to + v * kLanes, load(to + v * kLanes) + sums[row][v]);
  }
}

// to += a^T b for packed a and b, to (rows, stride); with `upper` only tiles that hold an element with column >= row.
void add_product(
    float* to, int64_t stride, const float* a, const float* b, int64_t depth, int64_t rows, int64_t columns,
    bool upper) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t last = column + kPanel;
    const int64_t end = upper && last < rows ? last : rows;
    for (int64_t row = 0; row < end; row += kTileRows) {
      const float* tile_a = a + row / kPanel * kPanel * depth + row % kPanel;
      add_tile(to + row * stride + column, stride, tile_a, b + column * depth, depth);
    }
  }
}

VADIT_INLINE float compare(int8_t* sign, float gap, float margin) {
  const float excess = __builtin_fabsf(gap) - margin;
  *sign = gap > margin ? 1 : gap < -margin ? -1 : 0;
  return excess < 0.0f ? 0.0f : excess;  // a NaN stays
}

// One row of gaps from column `begin` on: writes the signs, returns the sum of what exceeds the margin.
float compare_row(
    int8_t* sign, const float* product, const float* cosines, float margin, int64_t begin, int64_t columns) {
  typedef int8_t Bytes __attribute__((vector_size(VADIT_LANES)));
  float rest = 0.0f;
  Vec sums = {};
  for (; begin < columns && (begin % kLanes != 0 || columns - begin < kLanes); ++begin) {
    rest += compare(sign + begin, product[begin] - cosines[begin], margin);
  }
  for (; begin + kLanes <= columns; begin += kLanes) {
    const Vec gap = load(product + begin) - load(cosines + begin);
    const Ints above = gap > margin, below = gap < -margin;  // -1 where true
    const Vec excess = (Vec)((Bits)gap & 0x7fffffff) - margin;
    sums += excess < 0.0f ? Vec{} : excess;
    const Bytes signs = __builtin_convertvector(below - above, Bytes);
    __builtin_memcpy(sign + begin, &signs, sizeof signs);
  }
  for (; begin < columns; ++begin) rest += compare(sign + begin, product[begin] - cosines[begin], margin);
  return rest + sum(sums);
}

}  // namespace
}  // namespace vadit::VADIT_ISA

#else

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#define VADIT_KERNELS "vf_loss.cpp"
#include "vec.h"

namespace vadit {
namespace {

constexpr int64_t kDepth = 128;             // rows of the features at a time: the panels of a block stay in L2
constexpr int64_t kWidestPanel = 48;        // of all instruction sets
constexpr float kMinSquaredNorm = 1e-24f;  // a shorter vector has no direction

int64_t padded(int64_t columns) { return ceil_div(columns, kWidestPanel) * kWidestPanel; }

// Pairs of column blocks (I <= J) of every image, numbered one after the other.
struct Blocks {
  int64_t images, columns, size, per_image;

  Blocks(int64_t images_in, int64_t columns_in, int64_t size_in)
      : images(images_in), columns(columns_in), size(std::min(size_in, columns_in)) {
    const int64_t blocks = size > 0 ? ceil_div(columns, size) : 0;
    per_image = blocks * (blocks + 1) / 2;
  }

  int64_t count() const { return images * per_image; }

  // f(task, image, first row, rows, first column, columns) for every pair, in parallel.
  template <class F>
  void each(const F& f) const {
    torch::stable::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t j = 0, i = task % per_image;
        for (; i > j; ++j) i -= j + 1;
        const int64_t row = i * size, column = j * size;
        f(task, task / per_image, row, std::min(size, columns - row), column, std::min(size, columns - column));
      }
    });
  }
};

// The raw products of the columns of `features`, on and above the diagonal.
template <class T>
void raw_gram(float* to, const Tensor& features) {
  const int64_t images = features.size(0), depth = features.size(1), columns = features.size(2);
  // Large blocks are packed less often; small ones give every thread a share of few images. The sums are the same.
  const bool few = images < static_cast<int64_t>(torch::stable::get_num_threads());
  const T* from = data<T>(features);
  const int64_t stride_b = features.stride(0), stride_d = features.stride(1);
  Blocks(images, columns, few ? 96 : 288).each([&](int64_t, int64_t image, int64_t row, int64_t rows, int64_t column,
                                                   int64_t block_columns) {
    const bool diagonal = row == column;
    const int64_t stride = padded(block_columns);
    std::vector<float> product(padded(rows) * stride), a(padded(rows) * kDepth);
    std::vector<float> b(diagonal ? 0 : stride * kDepth);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k);
      const T* source = from + image * stride_b + k * stride_d;
      VADIT_CALL(pack<T>, a.data(), source + row, stride_d, part, rows);
      if (!diagonal) VADIT_CALL(pack<T>, b.data(), source + column, stride_d, part, block_columns);
      const float* right = diagonal ? a.data() : b.data();
      VADIT_CALL(add_product, product.data(), stride, a.data(), right, part, rows, block_columns, diagonal);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t skip = diagonal ? i : 0;
      const float* result = product.data() + i * stride;
      std::copy(result + skip, result + block_columns, to + (image * columns + row + i) * columns + column + skip);
    }
  });
}

// Raw products above the diagonal -> cosines, mirrored.
void normalise(float* cosines, const float* inverse_norm, int64_t images, int64_t columns) {
  Blocks(images, columns, 64).each([&](int64_t, int64_t image, int64_t row, int64_t rows, int64_t column,
                                       int64_t block_columns) {
    float* c = cosines + image * columns * columns;
    const float* inverse = inverse_norm + image * columns;
    for (int64_t i = row; i < row + rows; ++i) {
      for (int64_t j = std::max(i, column); j < column + block_columns; ++j) {
        const float cosine = c[i * columns + j] * inverse[i] * inverse[j];
        c[i * columns + j] = cosine;
        c[j * columns + i] = cosine;
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> vf_gram(const Tensor& features_in) {
  check_element(features_in, "features");
  STD_TORCH_CHECK(features_in.dim() == 3, "features must be (B, D, N)");
  const Tensor features = features_in.stride(2) == 1 ? features_in : torch::stable::contiguous(features_in);
  const int64_t images = features.size(0), columns = features.size(2);
  Tensor cosines = torch::stable::new_empty(features, {images, columns, columns}, ScalarType::Float);
  Tensor inverse_norm = torch::stable::new_empty(features, {images, columns}, ScalarType::Float);
  float *c = mutable_data<float>(cosines), *inverse = mutable_data<float>(inverse_norm);
  with_element(features, [&](auto element) { raw_gram<decltype(element)>(c, features); });
  for (int64_t i = 0; i < images * columns; ++i) {
    const float squared = c[i * columns + i % columns];
    inverse[i] = squared <= kMinSquaredNorm ? 0.0f : 1.0f / std::sqrt(squared);
  }
  normalise(c, inverse, images, columns);
  return {cosines, inverse_norm};
}

std::tuple<Tensor, Tensor> vf_distmat(
    const Tensor& u_in, const Tensor& v_in, const Tensor& cosines_in, double margin) {
  check_float(u_in, "u");
  STD_TORCH_CHECK(u_in.dim() == 3, "u must be (B, d, N)");
  check_like(v_in, u_in, "v");
  check_float(cosines_in, "cosines");
  const int64_t images = u_in.size(0), depth = u_in.size(1), columns = u_in.size(2);
  STD_TORCH_CHECK(
      cosines_in.dim() == 3 && cosines_in.size(0) == images && cosines_in.size(1) == columns &&
          cosines_in.size(2) == columns,
      "cosines must be (B, N, N) for u (B, d, N)");
  const Tensor u = torch::stable::contiguous(u_in), v = torch::stable::contiguous(v_in);
  const Tensor cosines = torch::stable::contiguous(cosines_in);
  Tensor loss = torch::stable::new_empty(u, {});
  Tensor sign = torch::stable::new_empty(u, {images, columns, columns}, ScalarType::Char);
  const float *u_data = data<float>(u), *v_data = data<float>(v), *c_data = data<float>(cosines);
  int8_t* sign_data = mutable_data<int8_t>(sign);

  constexpr int64_t kBlock = 96;  // fixed, so that the loss does not depend on the number of threads
  const Blocks blocks(images, columns, kBlock);
  std::vector<double> sums(blocks.count());
  blocks.each([&](int64_t task, int64_t image, int64_t row, int64_t rows, int64_t column, int64_t block_columns) {
    const bool diagonal = row == column;
    std::vector<float> a(kBlock * depth), b(kBlock * depth), product(kBlock * kBlock);
    int8_t signs[kBlock];
    VADIT_CALL(pack<float>, a.data(), u_data + image * depth * columns + row, columns, depth, rows);
    VADIT_CALL(pack<float>, b.data(), v_data + image * depth * columns + column, columns, depth, block_columns);
    VADIT_CALL(add_product, product.data(), kBlock, a.data(), b.data(), depth, rows, block_columns, diagonal);
    int8_t* s = sign_data + image * columns * columns;
    for (int64_t i = 0; i < rows; ++i) {
      const float* p = product.data() + i * kBlock;
      const float* c = c_data + (image * columns + row + i) * columns + column;
      if (diagonal) sums[task] += VADIT_CALL(compare_row, signs, p, c, margin, i, i + 1);
      const int64_t begin = diagonal ? i + 1 : 0;
      sums[task] += 2.0 * VADIT_CALL(compare_row, signs, p, c, margin, begin, block_columns);
      for (int64_t j = diagonal ? i : 0; j < block_columns; ++j) {
        s[(row + i) * columns + column + j] = signs[j];
        s[(column + j) * columns + row + i] = signs[j];
      }
    }
  });

  double total = 0.0;
  for (const double part : sums) total += part;
  const double count = static_cast<double>(images) * columns * columns;
  *mutable_data<float>(loss) = static_cast<float>(total / count);  // NaN where there is nothing: 0 / 0
  return {loss, sign};
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("vf_gram", TORCH_BOX(&vf_gram));
  m.impl("vf_distmat", TORCH_BOX(&vf_distmat));
}

}  // namespace vadit

#endif

// RMSNorm with modulation, where kGated behind a gated residual sum:
//   s = x + gate (h + bias)  (x alone where not gated),  y = s r w (1 + scale) + shift,  r = 1 / sqrt(mean(s^2) + eps).
//
// Backward, with g = dy w (1 + scale):  dx = r (g - s r^2 mean(g s)) + dsum,  dh = gate dx,  and per image
// P = sum_n dy s r,  dscale = w P,  dshift = sum_n dy,  dgate = sum_n dx (h + bias),  dweight = sum_images (1 + scale) P,
// dbias = sum_images gate sum_n dx.
// Bytes moved: forward reads x (and h) and writes y (and s); backward reads dy, s (dsum and h) and writes dx (and dh):
// each once. x, s, dx and dsum are of type T, the others of type Y.
//
// A block walks rows of one image. Each thread owns kRun columns and holds their factor w (1 + scale), their shift, gate
// and bias and, backward, their column sums in registers; a row costs one sum over the block. Rows that are too wide or
// not aligned go through a slower loop over the columns, whose column sums lie in the partial buffer instead.
#pragma once

#include "column_sums.cuh"

namespace vadit::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kLoopThreads = 128;

// What a block has to do: rows [first, last) of the (images * rows) in all, which belong to one image.
struct Walk {
  int64_t image, first, last;
};

__device__ __forceinline__ Walk walk_of_block(NormShape shape, int64_t chunk, int64_t chunks) {
  const int64_t image = blockIdx.x / chunks, begin = blockIdx.x % chunks * chunk;
  const int64_t end = begin + chunk < shape.rows ? begin + chunk : shape.rows;
  return {image, image * shape.rows + begin, image * shape.rows + end};
}

// W columns of an image's row; zeros where there is no row.
template <int W>
__device__ __forceinline__ void load_row(float (&to)[W], Row row, int64_t image, int64_t column) {
  const int64_t at = image * row.stride + column;
  if (row.data == nullptr) {
#pragma unroll
    for (int i = 0; i < W; ++i) to[i] = 0.0f;
  } else if (row.type == Type::kFloat32) {
    load(to, static_cast<const float*>(row.data) + at);
  } else {
    load(to, static_cast<const __nv_bfloat16*>(row.data) + at);
  }
}

// weight * (1 + scale).
template <int W>
__device__ __forceinline__ void load_factor(float (&factor)[W], NormInput input, int64_t image, int64_t column) {
  float scale[W];
  load_row(factor, input.weight, 0, column);
  load_row(scale, input.scale, image, column);
#pragma unroll
  for (int i = 0; i < W; ++i) factor[i] *= 1.0f + scale[i];
}

// Calls f(column) for the first column of each run of W that this thread owns in a row. W = kRun: a single run in
// registers; W = 1: a loop.
template <int W, class F>
__device__ __forceinline__ void for_columns(int64_t width, F f) {
  if constexpr (W == kRun) {
    if (threadIdx.x * kRun < width) f(static_cast<int64_t>(threadIdx.x) * kRun);
  } else {
    for (int64_t column = threadIdx.x; column < width; column += blockDim.x) f(column);
  }
}

// x becomes x + gate (h + bias), as it is stored in T.
template <int W, class T, class Y>
__device__ __forceinline__ void add_branch(
    float (&x)[W], T* total, const Y* h, const float (&gate)[W], const float (&bias)[W]) {
  float branch[W];
  load(branch, h);
#pragma unroll
  for (int i = 0; i < W; ++i) x[i] += gate[i] * (branch[i] + bias[i]);
  store(total, x);
  if constexpr (sizeof(T) < sizeof(float)) {
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = to_float(__float2bfloat16_rn(x[i]));
  }
}

template <bool kGated, class T, class Y>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(NormShape shape, NormInput input, T* total, Y* y, int64_t chunk, int64_t chunks) {
  __shared__ float slots[2][1][kMaxWarps];
  const Walk walk = walk_of_block(shape, chunk, chunks);
  const float width = static_cast<float>(shape.width);
  float factor[kRun] = {}, shift[kRun] = {}, gate[kRun] = {}, bias[kRun] = {};
  for_columns<kRun>(shape.width, [&](int64_t column) {
    load_factor(factor, input, walk.image, column);
    load_row(shift, input.shift, walk.image, column);
    if constexpr (kGated) {
      load_row(gate, input.gate, walk.image, column);
      load_row(bias, input.bias, 0, column);
    }
  });
  for (int64_t row = walk.first; row < walk.last; ++row) {
    float x[kRun] = {}, sums[1] = {};
    for_columns<kRun>(shape.width, [&](int64_t column) {
      const int64_t at = row * shape.width + column;
      load(x, static_cast<const T*>(input.x) + at);
      if constexpr (kGated) add_branch(x, total + at, static_cast<const Y*>(input.h) + at, gate, bias);
#pragma unroll
      for (int i = 0; i < kRun; ++i) sums[0] += x[i] * x[i];
    });
    block_sums(sums, slots[row & 1]);
    const float r = rsqrtf(sums[0] / width + input.eps);
    for_columns<kRun>(shape.width, [&](int64_t column) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) x[i] = x[i] * r * factor[i] + shift[i];
      store(y + row * shape.width + column, x);
    });
  }
}

template <bool kGated, class T, class Y>
__global__ void __launch_bounds__(kLoopThreads, 8)
    forward_loop_kernel(NormShape shape, NormInput input, T* total, Y* y, int64_t chunk, int64_t chunks) {
  __shared__ float slots[2][1][kLoopThreads / kWarp];
  const Walk walk = walk_of_block(shape, chunk, chunks);
  const T* normed = kGated ? total : static_cast<const T*>(input.x);
  for (int64_t row = walk.first; row < walk.last; ++row) {
    float sums[1] = {};
    for_columns<1>(shape.width, [&](int64_t column) {
      const int64_t at = row * shape.width + column;
      float x[1];
      load(x, static_cast<const T*>(input.x) + at);
      if constexpr (kGated) {
        float gate[1], bias[1];
        load_row(gate, input.gate, walk.image, column);
        load_row(bias, input.bias, 0, column);
        add_branch(x, total + at, static_cast<const Y*>(input.h) + at, gate, bias);
      }
      sums[0] += x[0] * x[0];
    });
    block_sums(sums, slots[row & 1]);
    const float r = rsqrtf(sums[0] / static_cast<float>(shape.width) + input.eps);
    for_columns<1>(shape.width, [&](int64_t column) {  // always the same thread's column: it reads what it wrote
      const int64_t at = row * shape.width + column;
      float factor[1], shift[1];
      load_factor(factor, input, walk.image, column);
      load_row(shift, input.shift, walk.image, column);
      store(y + at, to_float(normed[at]) * r * factor[0] + shift[0]);
    });
  }
}

// partial: (2 or, gated, 4, blocks, width): the sums of dy x r, dy, dx h and dx over the rows of each block.
template <bool kGated, class T, class Y>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(
    NormShape shape, NormInput input, NormSlopes slopes, T* dx_all, Y* dh_all, float* partial, int64_t chunk,
    int64_t chunks) {
  __shared__ float slots[2][2][kMaxWarps];
  constexpr int kGatedRun = kGated ? kRun : 1;
  const Walk walk = walk_of_block(shape, chunk, chunks);
  const float width = static_cast<float>(shape.width);
  float factor[kRun] = {}, sum_dyxr[kRun] = {}, sum_dy[kRun] = {};
  float gate[kGatedRun] = {}, sum_dxh[kGatedRun] = {}, sum_dx[kGatedRun] = {};
  for_columns<kRun>(shape.width, [&](int64_t column) {
    load_factor(factor, input, walk.image, column);
    if constexpr (kGated) load_row(gate, input.gate, walk.image, column);
  });
  for (int64_t row = walk.first; row < walk.last; ++row) {
    float x[kRun] = {}, dy[kRun] = {}, sums[2] = {};
    for_columns<kRun>(shape.width, [&](int64_t column) {
      load(x, static_cast<const T*>(input.x) + row * shape.width + column);
      load(dy, static_cast<const Y*>(slopes.dy) + row * shape.width + column);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        sums[0] += x[i] * x[i];
        sums[1] += dy[i] * factor[i] * x[i];
      }
    });
    block_sums(sums, slots[row & 1]);
    const float r = rsqrtf(sums[0] / width + input.eps);
    const float pull = sums[1] / width * r * r;
    for_columns<kRun>(shape.width, [&](int64_t column) {
      const int64_t at = row * shape.width + column;
      float dx[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        dx[i] = r * (dy[i] * factor[i] - x[i] * pull);
        sum_dyxr[i] += dy[i] * (x[i] * r);
        sum_dy[i] += dy[i];
      }
      if constexpr (kGated) {
        float dtotal[kRun], h[kRun], dh[kRun];
        load(dtotal, static_cast<const T*>(slopes.dtotal) + at);
        load(h, static_cast<const Y*>(input.h) + at);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          dx[i] += dtotal[i];
          dh[i] = dx[i] * gate[i];
          sum_dxh[i] += dx[i] * h[i];
          sum_dx[i] += dx[i];
        }
        store(dh_all + at, dh);
      }
      store(dx_all + at, dx);
    });
  }
  const int64_t kind = gridDim.x * shape.width;
  for_columns<kRun>(shape.width, [&](int64_t column) {
    float* sums = partial + blockIdx.x * shape.width + column;
    store(sums, sum_dyxr);
    store(sums + kind, sum_dy);
    if constexpr (kGated) {
      store(sums + 2 * kind, sum_dxh);
      store(sums + 3 * kind, sum_dx);
    }
  });
}

template <bool kGated, class T, class Y>
__global__ void __launch_bounds__(kLoopThreads, 8) backward_loop_kernel(
    NormShape shape, NormInput input, NormSlopes slopes, T* dx_all, Y* dh_all, float* partial, int64_t chunk,
    int64_t chunks) {
  __shared__ float slots[2][2][kLoopThreads / kWarp];
  const Walk walk = walk_of_block(shape, chunk, chunks);
  const float width = static_cast<float>(shape.width);
  const int64_t kind = gridDim.x * shape.width;
  float* partial_row = partial + blockIdx.x * shape.width;
  for_columns<1>(shape.width, [&](int64_t column) {
    for (int i = 0; i < (kGated ? 4 : 2); ++i) partial_row[i * kind + column] = 0.0f;
  });
  for (int64_t row = walk.first; row < walk.last; ++row) {
    const T* x_row = static_cast<const T*>(input.x) + row * shape.width;
    const Y* dy_row = static_cast<const Y*>(slopes.dy) + row * shape.width;
    float sums[2] = {};
    for_columns<1>(shape.width, [&](int64_t column) {
      float factor[1];
      load_factor(factor, input, walk.image, column);
      const float x = to_float(x_row[column]);
      sums[0] += x * x;
      sums[1] += to_float(dy_row[column]) * factor[0] * x;
    });
    block_sums(sums, slots[row & 1]);
    const float r = rsqrtf(sums[0] / width + input.eps);
    const float pull = sums[1] / width * r * r;
    for_columns<1>(shape.width, [&](int64_t column) {
      const int64_t at = row * shape.width + column;
      float factor[1], *kinds = partial_row + column;  // always the same thread's column: no race
      load_factor(factor, input, walk.image, column);
      const float x = to_float(x_row[column]), dy = to_float(dy_row[column]);
      float dx = r * (dy * factor[0] - x * pull);
      if constexpr (kGated) {
        float gate[1];
        load_row(gate, input.gate, walk.image, column);
        dx += to_float(static_cast<const T*>(slopes.dtotal)[at]);
        store(dh_all + at, dx * gate[0]);
        kinds[2 * kind] += dx * to_float(static_cast<const Y*>(input.h)[at]);
        kinds[3 * kind] += dx;
      }
      store(dx_all + at, dx);
      kinds[0] += dy * (x * r);
      kinds[kind] += dy;
    });
  }
}

// Per image and kWarp columns the gradients of its modulation; (1 + scale) P and gate sum_n dx are left in the image's
// first row of partial for the sums over images.
template <bool kGated>
__global__ void __launch_bounds__(kWarp* kSumRows) image_sums_kernel(
    NormShape shape, NormInput input, NormGradients gradients, int64_t chunks) {
  __shared__ float slots[kSumRows][kWarp];
  const int64_t groups = (shape.width + kWarp - 1) / kWarp, kind = shape.images * chunks * shape.width;
  const int64_t image = blockIdx.x / groups, column = blockIdx.x % groups * kWarp + threadIdx.x;
  float* first = gradients.partial + image * chunks * shape.width;
  float sums[kGated ? 4 : 2];
  for (int i = 0; i < (kGated ? 4 : 2); ++i)
    sums[i] = column_sum(first + i * kind, chunks, shape.width, column, shape.width, slots);
  if (threadIdx.y != 0 || column >= shape.width) return;
  const int64_t at = image * shape.width + column;
  float weight[1], scale[1];
  load_row(weight, input.weight, 0, column);
  load_row(scale, input.scale, image, column);
  store_at(gradients.dscale, at, weight[0] * sums[0]);
  store_at(gradients.dshift, at, sums[1]);
  first[column] = sums[0] * (1.0f + scale[0]);
  if constexpr (kGated) {
    float gate[1], bias[1];
    load_row(gate, input.gate, image, column);
    load_row(bias, input.bias, 0, column);
    store_at(gradients.dgate, at, sums[2] + bias[0] * sums[3]);
    first[3 * kind + column] = gate[0] * sums[3];
  }
}

bool takes_runs(NormShape shape, NormInput input, std::initializer_list<const void*> tensors) {
  bool takes = shape.width <= kMaxThreads * kRun && cuda::takes_runs(tensors, {shape.width});
  for (Row row : {input.gate, input.bias, input.weight, input.scale, input.shift})
    takes = takes && cuda::takes_runs({row.data}, {row.stride});
  return takes;
}

unsigned threads_for(int64_t width) { return static_cast<unsigned>(round_up(ceil_div(width, kRun), kWarp)); }

// Calls f with null pointers of the types of the residual stream and of the norm: alike, or float32 and bfloat16.
template <class F>
void with_types(NormTypes types, F f) {
  with_type(types.x, [&](auto* x) {
    if (types.x == types.y) return f(x, x);
    if constexpr (std::is_same_v<decltype(x), float*>) f(x, static_cast<__nv_bfloat16*>(nullptr));
  });
}

template <bool kGated>
void norm(const char* name, NormTypes types, NormShape shape, NormInput input, void* total, void* y, void* stream) {
  // No sums to leave behind: short walks, only long enough to spread the loads of factor and shift over some rows.
  const int64_t chunk = rows_per_block(shape.images * shape.rows, 8), chunks = ceil_div(shape.rows, chunk);
  with_types(types, [&](auto* wide, auto* low) {
    using T = std::remove_pointer_t<decltype(wide)>;
    using Y = std::remove_pointer_t<decltype(low)>;
    const bool runs = takes_runs(shape, input, {input.x, input.h, total, y});
    launch(
        name, runs ? forward_kernel<kGated, T, Y> : forward_loop_kernel<kGated, T, Y>, shape.images * chunks,
        dim3(runs ? threads_for(shape.width) : kLoopThreads), stream, shape, input, static_cast<T*>(total),
        static_cast<Y*>(y), chunk, chunks);
  });
}

template <bool kGated>
void norm_backward(
    const char* name, NormTypes types, NormShape shape, NormInput input, NormSlopes slopes, NormGradients gradients,
    void* stream) {
  const int64_t chunk = shape.backward_chunk(), chunks = shape.backward_chunks();
  with_types(types, [&](auto* wide, auto* low) {
    using T = std::remove_pointer_t<decltype(wide)>;
    using Y = std::remove_pointer_t<decltype(low)>;
    const bool runs =
        takes_runs(shape, input, {input.x, input.h, slopes.dy, slopes.dtotal, gradients.dx, gradients.dh});
    launch(
        name, runs ? backward_kernel<kGated, T, Y> : backward_loop_kernel<kGated, T, Y>, shape.images * chunks,
        dim3(runs ? threads_for(shape.width) : kLoopThreads), stream, shape, input, slopes,
        static_cast<T*>(gradients.dx), static_cast<Y*>(gradients.dh), gradients.partial, chunk, chunks);
  });
  int64_t rows = shape.images * chunks, stride = shape.width;
  if (kGated || gradients.dscale.data || gradients.dshift.data) {
    launch(
        name, image_sums_kernel<kGated>, shape.images * ceil_div(shape.width, kWarp), dim3(kWarp, kSumRows), stream,
        shape, input, gradients, chunks);
    rows = shape.images;
    stride = chunks * shape.width;
  }
  column_sums(name, gradients.partial, rows, stride, shape.width, gradients.dweight, stream);
  if (gradients.dbias.data) {
    const float* totals = gradients.partial + 3 * shape.images * chunks * shape.width;
    column_sums(name, totals, rows, stride, shape.width, gradients.dbias, stream);
  }
}

}  // namespace
}  // namespace vadit::cuda

// RMSNorm with modulation:  y = x r w (1 + scale) + shift,  r = 1 / sqrt(mean(x^2) + eps).
//
// Backward, with g = dy w (1 + scale):  dx = r (g - x r^2 mean(g x)),  and per image  P = sum_n dy x r,
// dscale = w P,  dshift = sum_n dy,  dweight = sum_images (1 + scale) P.
// Bytes moved: forward reads x and writes y; backward reads x and dy and writes dx: each once.
//
// A block walks rows of one image. Each thread owns kRun columns and holds their factor w (1 + scale), their shift and,
// backward, their column sums in registers; a row costs one sum over the block. Rows that are too wide or not aligned
// go through a slower loop over the columns, whose column sums lie in the partial buffer instead.

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

// One column's weight * (1 + scale) in an image; then the same for a run.
__device__ __forceinline__ float factor_at(NormInput input, int64_t image, int64_t width, int64_t column) {
  const float weight = input.weight[column];
  return input.scale ? weight * (1.0f + input.scale[image * width + column]) : weight;
}

__device__ __forceinline__ void load_factor(
    float (&factor)[kRun], NormInput input, int64_t image, int64_t width, int64_t column) {
  load(factor, input.weight + column);
  if (input.scale == nullptr) return;
  float scale[kRun];
  load(scale, input.scale + image * width + column);
#pragma unroll
  for (int i = 0; i < kRun; ++i) factor[i] *= 1.0f + scale[i];
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

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(NormShape shape, NormInput input, T* y, int64_t chunk, int64_t chunks) {
  __shared__ float slots[2][1][kMaxWarps];
  const Walk walk = walk_of_block(shape, chunk, chunks);
  const float width = static_cast<float>(shape.width);
  float factor[kRun] = {}, shift[kRun] = {};
  for_columns<kRun>(shape.width, [&](int64_t column) {
    load_factor(factor, input, walk.image, shape.width, column);
    if (input.shift) load(shift, input.shift + walk.image * shape.width + column);
  });
  for (int64_t row = walk.first; row < walk.last; ++row) {
    float x[kRun] = {}, sums[1] = {};
    for_columns<kRun>(shape.width, [&](int64_t column) {
      load(x, static_cast<const T*>(input.x) + row * shape.width + column);
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

template <class T>
__global__ void __launch_bounds__(kLoopThreads, 8)
    forward_loop_kernel(NormShape shape, NormInput input, T* y, int64_t chunk, int64_t chunks) {
  __shared__ float slots[2][1][kLoopThreads / kWarp];
  const Walk walk = walk_of_block(shape, chunk, chunks);
  for (int64_t row = walk.first; row < walk.last; ++row) {
    const T* x = static_cast<const T*>(input.x) + row * shape.width;
    float sums[1] = {};
    for_columns<1>(shape.width, [&](int64_t column) { sums[0] += to_float(x[column]) * to_float(x[column]); });
    block_sums(sums, slots[row & 1]);
    const float r = rsqrtf(sums[0] / static_cast<float>(shape.width) + input.eps);
    for_columns<1>(shape.width, [&](int64_t column) {
      const float shift = input.shift ? input.shift[walk.image * shape.width + column] : 0.0f;
      const float factor = factor_at(input, walk.image, shape.width, column);
      store(y + row * shape.width + column, to_float(x[column]) * r * factor + shift);
    });
  }
}

// partial: (2, blocks, width): the sums of dy x r, then those of dy, over the rows of each block.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(
    NormShape shape, NormInput input, const T* dy_all, T* dx_all, float* partial, int64_t chunk, int64_t chunks) {
  __shared__ float slots[2][2][kMaxWarps];
  const Walk walk = walk_of_block(shape, chunk, chunks);
  const float width = static_cast<float>(shape.width);
  float factor[kRun] = {}, sum_dyxr[kRun] = {}, sum_dy[kRun] = {};
  for_columns<kRun>(shape.width, [&](int64_t column) {
    load_factor(factor, input, walk.image, shape.width, column);
  });
  for (int64_t row = walk.first; row < walk.last; ++row) {
    float x[kRun] = {}, dy[kRun] = {}, sums[2] = {};
    for_columns<kRun>(shape.width, [&](int64_t column) {
      load(x, static_cast<const T*>(input.x) + row * shape.width + column);
      load(dy, dy_all + row * shape.width + column);
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
      float dx[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        dx[i] = r * (dy[i] * factor[i] - x[i] * pull);
        sum_dyxr[i] += dy[i] * (x[i] * r);
        sum_dy[i] += dy[i];
      }
      store(dx_all + row * shape.width + column, dx);
    });
  }
  for_columns<kRun>(shape.width, [&](int64_t column) {
    store(partial + blockIdx.x * shape.width + column, sum_dyxr);
    store(partial + (gridDim.x + static_cast<int64_t>(blockIdx.x)) * shape.width + column, sum_dy);
  });
}

template <class T>
__global__ void __launch_bounds__(kLoopThreads, 8) backward_loop_kernel(
    NormShape shape, NormInput input, const T* dy_all, T* dx_all, float* partial, int64_t chunk, int64_t chunks) {
  __shared__ float slots[2][2][kLoopThreads / kWarp];
  const Walk walk = walk_of_block(shape, chunk, chunks);
  const float width = static_cast<float>(shape.width);
  float* sum_dyxr = partial + blockIdx.x * shape.width;
  float* sum_dy = partial + (gridDim.x + static_cast<int64_t>(blockIdx.x)) * shape.width;
  for_columns<1>(shape.width, [&](int64_t column) { sum_dyxr[column] = sum_dy[column] = 0.0f; });
  for (int64_t row = walk.first; row < walk.last; ++row) {
    const T* x_row = static_cast<const T*>(input.x) + row * shape.width;
    const T* dy_row = dy_all + row * shape.width;
    float sums[2] = {};
    for_columns<1>(shape.width, [&](int64_t column) {
      const float x = to_float(x_row[column]);
      sums[0] += x * x;
      sums[1] += to_float(dy_row[column]) * factor_at(input, walk.image, shape.width, column) * x;
    });
    block_sums(sums, slots[row & 1]);
    const float r = rsqrtf(sums[0] / width + input.eps);
    const float pull = sums[1] / width * r * r;
    for_columns<1>(shape.width, [&](int64_t column) {
      const float x = to_float(x_row[column]), dy = to_float(dy_row[column]);
      const float factor = factor_at(input, walk.image, shape.width, column);
      store(dx_all + row * shape.width + column, r * (dy * factor - x * pull));
      sum_dyxr[column] += dy * (x * r);  // always the same thread's column: no race
      sum_dy[column] += dy;
    });
  }
}

// Per image and kWarp columns: dscale = w P, dshift = sum of dy, and (1 + scale) P, left in the image's first row of
// partial for the sum over images.
__global__ void __launch_bounds__(kWarp* kSumRows)
    image_sums_kernel(NormShape shape, NormInput input, float* partial, float* dscale, float* dshift, int64_t chunks) {
  __shared__ float slots[kSumRows][kWarp];
  const int64_t groups = (shape.width + kWarp - 1) / kWarp;
  const int64_t image = blockIdx.x / groups, column = blockIdx.x % groups * kWarp + threadIdx.x;
  float* first = partial + image * chunks * shape.width;
  const float* dy_sums = first + shape.images * chunks * shape.width;
  const float product = column_sum(first, chunks, shape.width, column, shape.width, slots);
  const float shifted = column_sum(dy_sums, chunks, shape.width, column, shape.width, slots);
  if (threadIdx.y == 0 && column < shape.width) {
    const int64_t at = image * shape.width + column;
    dscale[at] = input.weight[column] * product;
    dshift[at] = shifted;
    first[column] = input.scale ? product * (1.0f + input.scale[at]) : product;
  }
}

bool takes_runs(NormShape shape, const void* x, const void* y, const void* dy, NormInput input) {
  return shape.width <= kMaxThreads * kRun &&
         cuda::takes_runs({x, y, dy, input.weight, input.scale, input.shift}, {shape.width});
}

unsigned threads_for(int64_t width) { return static_cast<unsigned>(round_up(ceil_div(width, kRun), kWarp)); }

}  // namespace

void rms_norm(Type type, NormShape shape, NormInput input, void* y, void* stream) {
  // No sums to leave behind: short walks, only long enough to spread the loads of factor and shift over some rows.
  const int64_t chunk = rows_per_block(shape.images * shape.rows, 8), chunks = ceil_div(shape.rows, chunk);
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool runs = takes_runs(shape, input.x, y, nullptr, input);
    launch(
        "rms_norm", runs ? forward_kernel<T> : forward_loop_kernel<T>, shape.images * chunks,
        dim3(runs ? threads_for(shape.width) : kLoopThreads), stream, shape, input, static_cast<T*>(y), chunk, chunks);
  });
}

void rms_norm_backward(
    Type type, NormShape shape, NormInput input, const void* dy, NormGradients gradients, void* stream) {
  const int64_t chunk = shape.backward_chunk(), chunks = shape.backward_chunks();
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool runs = takes_runs(shape, input.x, gradients.dx, dy, input);
    launch(
        "rms_norm_backward", runs ? backward_kernel<T> : backward_loop_kernel<T>, shape.images * chunks,
        dim3(runs ? threads_for(shape.width) : kLoopThreads), stream, shape, input, static_cast<const T*>(dy),
        static_cast<T*>(gradients.dx), gradients.partial, chunk, chunks);
  });
  int64_t rows = shape.images * chunks, stride = shape.width;
  if (gradients.dscale) {
    launch(
        "rms_norm_backward (sums per image)", image_sums_kernel, shape.images * ceil_div(shape.width, kWarp),
        dim3(kWarp, kSumRows), stream, shape, input, gradients.partial, gradients.dscale, gradients.dshift, chunks);
    rows = shape.images;
    stride = chunks * shape.width;
  }
  column_sums("rms_norm_backward (dweight)", gradients.partial, rows, stride, shape.width, gradients.dweight, stream);
}

}  // namespace vadit::cuda

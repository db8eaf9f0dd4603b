// GroupNorm and SiLU on rows of channels:  h = (x - mean) rstd,  z = h w + b,  y = z s(z) or z.
//
// Backward, with dz = dy s (1 + z (1 - s)) or dy:  dx = rstd (dz w - mean(dz w) - h mean(dz w h)),  dweight = sum dz h,
// dbias = sum dz.
// Bytes moved: forward reads x twice and writes y; backward reads dy and x twice and writes dx.
//
// A block takes a chunk of an image's rows; a thread keeps W channels of it, with all that belongs to them in registers.
// Sums are kept per channel, so that groups may have any width; one warp per group adds them up afterwards.

#include "column_sums.cuh"

namespace vadit::cuda {
namespace {

constexpr int kThreadsX = 16, kThreadsY = 16;  // along channels, along rows

struct Place {
  int64_t image, chunk, first, last, column;  // rows count from the first image's
};

template <int W>
__device__ __forceinline__ Place place_of_thread(GroupShape s) {
  // divided as 32 bits: a division of 64 is a call
  const unsigned parts = static_cast<unsigned>(s.width + kThreadsX * W - 1) / (kThreadsX * W);
  const unsigned chunk = blockIdx.x / parts, chunks = static_cast<unsigned>(s.chunks), image = chunk / chunks;
  const int64_t begin = chunk % chunks * s.chunk, end = begin + s.chunk < s.rows ? begin + s.chunk : s.rows;
  return {
      image, chunk, image * s.rows + begin, image * s.rows + end,
      static_cast<int64_t>(blockIdx.x % parts * kThreadsX + threadIdx.x) * W};
}

// The numbers of this thread's channels.
template <int W>
__device__ __forceinline__ void load_per_group(float (&to)[W], const float* from, GroupShape s, Place p) {
  const unsigned each = static_cast<unsigned>(s.width / s.groups), column = static_cast<unsigned>(p.column);
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] = from[p.image * s.groups + (column + i) / each];
}

template <int W>
struct Channels {
  float mean[W], rstd[W], weight[W], bias[W];
  __device__ __forceinline__ Channels(GroupShape s, Place p, GroupInput in) {
    load_per_group(mean, in.mean, s, p);
    load_per_group(rstd, in.rstd, s, p);
    load(weight, in.weight + p.column);
    load(bias, in.bias + p.column);
  }
};

// Sums over the block's rows of threads, valid in the first of them. All threads must call it.
template <int W>
__device__ __forceinline__ void sum_over_rows(float (&x)[W], float (&slots)[kThreadsY][kThreadsX * W]) {
  __syncthreads();  // the slots may still be read from the call before
#pragma unroll
  for (int i = 0; i < W; ++i) slots[threadIdx.y][threadIdx.x * W + i] = x[i];
  __syncthreads();
  if (threadIdx.y != 0) return;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    x[i] = 0.0f;
    for (int row = 0; row < kThreadsY; ++row) x[i] += slots[row][threadIdx.x * W + i];
  }
}

// partial (images * chunks, 2, width): mean and squared deviations from it. Sums are of differences to the first row:
// nothing cancels where a mean is large.
template <class T, int W>
__global__ void __launch_bounds__(kThreadsX* kThreadsY, 4)
    moments_kernel(GroupShape s, const T* x, float* partial) {
  __shared__ float slots[kThreadsY][kThreadsX * W];
  const Place p = place_of_thread<W>(s);
  float origin[W] = {}, sum[W] = {}, square[W] = {};
  if (p.column < s.width) {
    load(origin, x + p.first * s.width + p.column);
    for (int64_t row = p.first + threadIdx.y; row < p.last; row += kThreadsY) {
      float value[W];
      load(value, x + row * s.width + p.column);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float difference = value[i] - origin[i];
        sum[i] += difference;
        square[i] += difference * difference;
      }
    }
  }
  sum_over_rows(sum, slots);
  sum_over_rows(square, slots);
  if (threadIdx.y != 0 || p.column >= s.width) return;
  const float share = __fdividef(1.0f, static_cast<float>(p.last - p.first));
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const float mean = sum[i] * share;
    square[i] -= sum[i] * mean;
    origin[i] += mean;
  }
  store(partial + p.chunk * 2 * s.width + p.column, origin);
  store(partial + (p.chunk * 2 + 1) * s.width + p.column, square);
}

// A warp per group: mean and rstd of its chunks and channels, by Chan et al. (1979).
__global__ void __launch_bounds__(kWarp)
    statistics_kernel(GroupShape s, const float* partial, float eps, float* mean, float* rstd) {
  const int64_t each = s.width / s.groups;
  const float* start = partial + blockIdx.x / s.groups * s.chunks * 2 * s.width + blockIdx.x % s.groups * each;
  const float count = static_cast<float>(s.rows * each);
  float center = 0.0f;
  for (int64_t i = threadIdx.x; i < s.chunks * each; i += kWarp) {
    const int64_t chunk = i / each, left = s.rows - chunk * s.chunk;
    center += static_cast<float>(left < s.chunk ? left : s.chunk) * start[chunk * 2 * s.width + i % each];
  }
  center = warp_sum(center) / count;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < s.chunks * each; i += kWarp) {
    const int64_t chunk = i / each, left = s.rows - chunk * s.chunk;
    const float* at = start + chunk * 2 * s.width + i % each;
    const float off = at[0] - center;
    squares += at[s.width] + static_cast<float>(left < s.chunk ? left : s.chunk) * off * off;
  }
  squares = warp_sum(squares);
  if (threadIdx.x != 0) return;
  mean[blockIdx.x] = center;
  rstd[blockIdx.x] = 1.0f / sqrtf(squares / count + eps);
}

template <class T, int W>
__global__ void __launch_bounds__(kThreadsX* kThreadsY) forward_kernel(GroupShape s, GroupInput in, T* y) {
  const Place p = place_of_thread<W>(s);
  if (p.column >= s.width) return;
  const Channels<W> c(s, p, in);
  for (int64_t row = p.first + threadIdx.y; row < p.last; row += kThreadsY) {
    float z[W];
    load(z, static_cast<const T*>(in.x) + row * s.width + p.column);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      z[i] = (z[i] - c.mean[i]) * c.rstd[i] * c.weight[i] + c.bias[i];
      if (in.silu) {
        float gate, rest;
        sigmoid(z[i], gate, rest);
        z[i] *= gate;
      }
    }
    store(y + row * s.width + p.column, z);
  }
}

// h in place of x, dz in place of dy.
template <class T, int W>
__device__ __forceinline__ void load_gradients(
    float (&h)[W], float (&dz)[W], const GroupInput& in, const T* dy, int64_t at, const Channels<W>& c) {
  load(h, static_cast<const T*>(in.x) + at);
  load(dz, dy + at);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    h[i] = (h[i] - c.mean[i]) * c.rstd[i];
    if (in.silu) {
      const float z = h[i] * c.weight[i] + c.bias[i];
      float gate, rest;
      sigmoid(z, gate, rest);
      dz[i] *= gate * (1.0f + z * rest);
    }
  }
}

// partial (images * chunks, 2, width): the sums of dz h and of dz.
template <class T, int W>
__global__ void __launch_bounds__(kThreadsX* kThreadsY)
    sums_kernel(GroupShape s, GroupInput in, const T* dy, float* partial) {
  __shared__ float slots[kThreadsY][kThreadsX * W];
  const Place p = place_of_thread<W>(s);
  float products[W] = {}, plain[W] = {};
  if (p.column < s.width) {
    const Channels<W> c(s, p, in);
    for (int64_t row = p.first + threadIdx.y; row < p.last; row += kThreadsY) {
      float h[W], dz[W];
      load_gradients(h, dz, in, dy, row * s.width + p.column, c);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        products[i] += dz[i] * h[i];
        plain[i] += dz[i];
      }
    }
  }
  sum_over_rows(products, slots);
  sum_over_rows(plain, slots);
  if (threadIdx.y != 0 || p.column >= s.width) return;
  store(partial + p.chunk * 2 * s.width + p.column, products);
  store(partial + (p.chunk * 2 + 1) * s.width + p.column, plain);
}

// A warp per group: totals (2, images, width) of the chunks, and the means of dz w h and dz w (2, images, groups).
__global__ void __launch_bounds__(kWarp)
    finish_kernel(GroupShape s, const float* partial, const float* weight, float* totals, float* means) {
  const int64_t each = s.width / s.groups, image = blockIdx.x / s.groups, first = blockIdx.x % s.groups * each;
  float slope = 0.0f, pull = 0.0f;
  for (int64_t column = first; column < first + each; ++column) {
    float product = 0.0f, plain = 0.0f;
    for (int64_t chunk = threadIdx.x; chunk < s.chunks; chunk += kWarp) {
      const float* at = partial + (image * s.chunks + chunk) * 2 * s.width + column;
      product += at[0];
      plain += at[s.width];
    }
    product = warp_sum(product);
    plain = warp_sum(plain);
    slope += product * weight[column];
    pull += plain * weight[column];
    if (threadIdx.x == 0) {
      totals[image * s.width + column] = product;
      totals[(s.images + image) * s.width + column] = plain;
    }
  }
  if (threadIdx.x != 0) return;
  const float count = static_cast<float>(s.rows * each);
  means[blockIdx.x] = slope / count;
  means[s.images * s.groups + blockIdx.x] = pull / count;
}

template <class T, int W>
__global__ void __launch_bounds__(kThreadsX* kThreadsY)
    backward_kernel(GroupShape s, GroupInput in, const T* dy, const float* means, T* dx) {
  const Place p = place_of_thread<W>(s);
  if (p.column >= s.width) return;
  const Channels<W> c(s, p, in);
  float slope[W], pull[W];
  load_per_group(slope, means, s, p);
  load_per_group(pull, means + s.images * s.groups, s, p);
  for (int64_t row = p.first + threadIdx.y; row < p.last; row += kThreadsY) {
    float h[W], dz[W];
    load_gradients(h, dz, in, dy, row * s.width + p.column, c);
#pragma unroll
    for (int i = 0; i < W; ++i) dz[i] = c.rstd[i] * (dz[i] * c.weight[i] - pull[i] - h[i] * slope[i]);
    store(dx + row * s.width + p.column, dz);
  }
}

// Blocks of the passes over all elements.
int64_t blocks_for(GroupShape s, bool runs) {
  return s.images * s.chunks * ceil_div(s.width, kThreadsX * (runs ? kRun : 1));
}

}  // namespace

void group_norm_silu(
    Type type, GroupShape s, GroupInput in, float eps, float* mean, float* rstd, float* partial, void* y,
    void* stream) {
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool runs = takes_runs({in.x, y, in.weight, in.bias, partial}, {s.width});
    const dim3 threads(kThreadsX, kThreadsY);
    launch(
        "group_norm_silu (moments)", runs ? moments_kernel<T, kRun> : moments_kernel<T, 1>, blocks_for(s, runs),
        threads, stream, s, static_cast<const T*>(in.x), partial);
    launch(
        "group_norm_silu (statistics)", statistics_kernel, s.images * s.groups, dim3(kWarp), stream, s, partial, eps,
        mean, rstd);
    launch(
        "group_norm_silu", runs ? forward_kernel<T, kRun> : forward_kernel<T, 1>, blocks_for(s, runs), threads, stream,
        s, in, static_cast<T*>(y));
  });
}

void group_norm_silu_backward(
    Type type, GroupShape s, GroupInput in, const void* dy, GroupGradients out, void* stream) {
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool runs = takes_runs({in.x, dy, out.dx, in.weight, in.bias, out.partial}, {s.width});
    const dim3 threads(kThreadsX, kThreadsY);
    const T* gradient = static_cast<const T*>(dy);
    launch(
        "group_norm_silu_backward (sums)", runs ? sums_kernel<T, kRun> : sums_kernel<T, 1>, blocks_for(s, runs),
        threads, stream, s, in, gradient, out.partial);
    launch(
        "group_norm_silu_backward (groups)", finish_kernel, s.images * s.groups, dim3(kWarp), stream, s, out.partial,
        in.weight, out.totals, out.means);
    launch(
        "group_norm_silu_backward", runs ? backward_kernel<T, kRun> : backward_kernel<T, 1>, blocks_for(s, runs),
        threads, stream, s, in, gradient, out.means, static_cast<T*>(out.dx));
  });
  const char* name = "group_norm_silu_backward (images)";
  column_sums(name, out.totals, s.images, s.width, s.width, out.dweight, stream);
  column_sums(name, out.totals + s.images * s.width, s.images, s.width, s.width, out.dbias, stream);
}

}  // namespace vadit::cuda

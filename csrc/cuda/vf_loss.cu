// The two (N, N) steps of the vision-foundation loss, in float32:
// vf_gram     cosines[i, j] = <f_i, f_j> / (|f_i| |f_j|) over the columns of features (D, N);
// vf_distmat  gap = u^T v - cosines;  loss = mean relu(|gap| - margin);  sign = sign(gap) where |gap| > margin, else 0.
// Both matrices are symmetric: only the 64 x 64 tiles of the upper triangle are computed, and stored twice.
// Bytes moved: features (or u, v and cosines' upper triangle) are read once per pair of tiles, from L2 after the first
// time; the results are written once. Arithmetic outweighs them: N^2 D multiply-adds per image.
//
// A product is summed over kDepth channels first, then over these parts: a shorter chain of roundings than D in a row.
// The norms are summed in the very same order, so that the diagonal of the cosines is 1.

#include "common.cuh"

namespace vadit::cuda {
namespace {

constexpr int kTile = kGramTile;
constexpr int kDepth = 16;
constexpr int kOwn = 4;  // a thread owns kOwn x kOwn elements of the tile
constexpr int kSide = kTile / kOwn;
constexpr int kThreads = kSide * kSide;
constexpr float kMinSquaredNorm = 1e-24f;

static_assert(kDepth * kTile == kThreads * kOwn, "each thread fetches kOwn elements of each operand");

// One image's operand: (channels, positions), stride 1 along positions. wide: kOwn positions may be loaded at once.
template <class T>
struct Operand {
  const T* data;
  int64_t channels, positions, stride;
  bool wide;
};

template <class T>
__device__ __forceinline__ Operand<T> operand_of(const T* data, FeatureShape shape, int64_t image, bool wide) {
  return {data + image * shape.stride_image, shape.channels, shape.positions, shape.stride_channel, wide};
}

__device__ __forceinline__ void load_four(float (&x)[kOwn], const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
__device__ __forceinline__ void load_four(float (&x)[kOwn], const __nv_bfloat16* from) {
  const uint2 packed = *reinterpret_cast<const uint2*>(from);
  x[0] = __uint_as_float(packed.x << 16), x[1] = __uint_as_float(packed.x & 0xffff0000u);
  x[2] = __uint_as_float(packed.y << 16), x[3] = __uint_as_float(packed.y & 0xffff0000u);
}
__device__ __forceinline__ void store_four(float* to, const float (&x)[kOwn]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store_four(int8_t* to, const int8_t (&x)[kOwn]) {
  *reinterpret_cast<char4*>(to) = make_char4(x[0], x[1], x[2], x[3]);
}

// Four positions of one channel, zero beyond the edges.
template <class T>
__device__ __forceinline__ void fetch(float (&x)[kOwn], const Operand<T>& f, int64_t channel, int64_t position) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) x[i] = 0.0f;
  if (channel >= f.channels) return;
  const T* from = f.data + channel * f.stride + position;
  if (f.wide) {
    if (position < f.positions) load_four(x, from);
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (position + i < f.positions) x[i] = to_float(from[i]);
  }
}

// Where a block's tile lies in the upper triangle, and which elements of it are this thread's.
struct Place {
  int64_t image, i0, j0;
  __device__ explicit Place(int64_t positions) {
    const int64_t side = (positions + kTile - 1) / kTile, tiles = side * (side + 1) / 2;
    image = blockIdx.x / tiles;
    int64_t tile = blockIdx.x % tiles, row = 0;
    while (tile >= side - row) tile -= side - row++;
    i0 = row * kTile;
    j0 = (row + tile) * kTile;
  }
  __device__ bool diagonal() const { return i0 == j0; }
  __device__ int64_t i() const { return i0 + threadIdx.x / kSide * kOwn; }
  __device__ int64_t j() const { return j0 + threadIdx.x % kSide * kOwn; }
};

// total[p][q] = sum over channels of a[c, i + p] b[c, j + q].
template <class T>
__device__ __forceinline__ void multiply(
    float (&total)[kOwn][kOwn], const Operand<T>& a, const Operand<T>& b, const Place& place) {
  __shared__ __align__(16) float a_tile[2][kDepth][kTile];
  __shared__ __align__(16) float b_tile[2][kDepth][kTile];
  const int depth = threadIdx.x / kSide, column = threadIdx.x % kSide * kOwn;
  const int p0 = threadIdx.x / kSide * kOwn, q0 = column;
  float a_next[kOwn], b_next[kOwn];
  fetch(a_next, a, depth, place.i0 + column);
  fetch(b_next, b, depth, place.j0 + column);
  int turn = 0;  // two buffers: one barrier per step
  for (int64_t first = 0; first < a.channels; first += kDepth, turn ^= 1) {
    store_four(&a_tile[turn][depth][column], a_next);
    store_four(&b_tile[turn][depth][column], b_next);
    __syncthreads();
    fetch(a_next, a, first + kDepth + depth, place.i0 + column);
    fetch(b_next, b, first + kDepth + depth, place.j0 + column);
    float part[kOwn][kOwn] = {};
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float x[kOwn], y[kOwn];
      load_four(x, &a_tile[turn][k][p0]);
      load_four(y, &b_tile[turn][k][q0]);
#pragma unroll
      for (int p = 0; p < kOwn; ++p) {
#pragma unroll
        for (int q = 0; q < kOwn; ++q) part[p][q] = fmaf(x[p], y[q], part[p][q]);
      }
    }
#pragma unroll
    for (int p = 0; p < kOwn; ++p) {
#pragma unroll
      for (int q = 0; q < kOwn; ++q) total[p][q] += part[p][q];
    }
  }
}

// Stores the thread's elements and their mirror images; in a tile on the diagonal only those from above it.
template <class T>
__device__ __forceinline__ void store_twice(T* out, int64_t n, const Place& place, const T (&x)[kOwn][kOwn]) {
  const int64_t i = place.i(), j = place.j();
  if (n % kOwn == 0 && !place.diagonal()) {
    if (j >= n) return;  // i < j0 <= j lies inside whenever j does
#pragma unroll
    for (int p = 0; p < kOwn; ++p) store_four(out + (i + p) * n + j, x[p]);
#pragma unroll
    for (int q = 0; q < kOwn; ++q) {
      const T mirrored[kOwn] = {x[0][q], x[1][q], x[2][q], x[3][q]};
      store_four(out + (j + q) * n + i, mirrored);
    }
    return;
  }
#pragma unroll
  for (int p = 0; p < kOwn; ++p) {
#pragma unroll
    for (int q = 0; q < kOwn; ++q) {
      if (i + p > j + q || j + q >= n) continue;
      out[(i + p) * n + j + q] = x[p][q];
      out[(j + q) * n + i + p] = x[p][q];
    }
  }
}

// inverse_norm (B, N). A block takes kWarp positions; its thread rows sum kDepth channels each, the first adds up.
constexpr int kNormRows = 8;
template <class T>
__global__ void __launch_bounds__(kWarp* kNormRows)
    norm_kernel(const T* features, FeatureShape shape, float* inverse_norm) {
  __shared__ float slots[kNormRows][kWarp];
  const int64_t groups = (shape.positions + kWarp - 1) / kWarp;
  const int64_t image = blockIdx.x / groups, position = blockIdx.x % groups * kWarp + threadIdx.x;
  const T* f = features + image * shape.stride_image + position;
  float total = 0.0f;
  for (int64_t first = 0; first < shape.channels; first += kDepth * kNormRows) {
    float part = 0.0f;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const int64_t channel = first + static_cast<int64_t>(threadIdx.y) * kDepth + k;
      if (channel < shape.channels && position < shape.positions) {
        const float x = to_float(f[channel * shape.stride_channel]);
        part = fmaf(x, x, part);
      }
    }
    __syncthreads();  // the slots of the round before have been read
    slots[threadIdx.y][threadIdx.x] = part;
    __syncthreads();
    if (threadIdx.y == 0)
      for (int row = 0; row < kNormRows; ++row) total += slots[row][threadIdx.x];
  }
  // sqrtf and a division, not rsqrtf: its two ulp would show on the diagonal.
  if (threadIdx.y == 0 && position < shape.positions)
    inverse_norm[image * shape.positions + position] = total > kMinSquaredNorm ? 1.0f / sqrtf(total) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    gram_kernel(const T* features, FeatureShape shape, const float* inverse_norm, float* cosines, bool wide) {
  const Place place(shape.positions);
  const Operand<T> f = operand_of(features, shape, place.image, wide);
  float x[kOwn][kOwn] = {};
  multiply(x, f, f, place);
  float row[kOwn], column[kOwn];
  const int64_t n = shape.positions;
#pragma unroll
  for (int p = 0; p < kOwn; ++p) {
    row[p] = place.i() + p < n ? inverse_norm[place.image * n + place.i() + p] : 0.0f;
    column[p] = place.j() + p < n ? inverse_norm[place.image * n + place.j() + p] : 0.0f;
  }
#pragma unroll
  for (int p = 0; p < kOwn; ++p) {
#pragma unroll
    for (int q = 0; q < kOwn; ++q) x[p][q] *= row[p] * column[q];
  }
  store_twice(cosines + place.image * n * n, n, place, x);
}

// partial: one sum per block.
__global__ void __launch_bounds__(kThreads, 2) distmat_kernel(
    const float* u_all, FeatureShape u_shape, bool u_wide, const float* v_all, FeatureShape v_shape, bool v_wide,
    const float* cosines_all, float margin, float* partial, int8_t* sign) {
  __shared__ float slots[1][kThreads / kWarp];
  const Place place(u_shape.positions);
  const int64_t n = u_shape.positions;
  float gap[kOwn][kOwn] = {};
  multiply(
      gap, operand_of(u_all, u_shape, place.image, u_wide), operand_of(v_all, v_shape, place.image, v_wide), place);
  const float* cosines = cosines_all + place.image * n * n;
  int8_t signs[kOwn][kOwn];
  float sum[1] = {};
#pragma unroll
  for (int p = 0; p < kOwn; ++p) {
#pragma unroll
    for (int q = 0; q < kOwn; ++q) {
      const int64_t i = place.i() + p, j = place.j() + q;
      const bool counts = i <= j && j < n;
      if (counts) gap[p][q] -= cosines[i * n + j];
      const float excess = fabsf(gap[p][q]) - margin;
      const bool outside = excess > 0.0f;
      // Written so that a NaN reaches the loss.
      if (counts && !(excess <= 0.0f)) sum[0] += i == j ? excess : 2.0f * excess;
      signs[p][q] = outside ? (gap[p][q] > 0.0f ? 1 : gap[p][q] < 0.0f ? -1 : 0) : 0;
    }
  }
  store_twice(sign + place.image * n * n, n, place, signs);
  block_sums(sum, slots);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum[0];
}

// One block: loss = sum of partial / elements, in double and in an order that depends on `count` alone.
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const float* partial, int64_t count, int64_t elements, float* loss) {
  __shared__ double sums[kThreads];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss = static_cast<float>(sums[0] / static_cast<double>(elements));
}

template <class T>
bool loads_four(const T* data, FeatureShape shape) {
  return reinterpret_cast<uintptr_t>(data) % (kOwn * sizeof(T)) == 0 && shape.positions % kOwn == 0 &&
         shape.stride_channel % kOwn == 0 && shape.stride_image % kOwn == 0;
}

}  // namespace

void vf_gram(Type type, FeatureShape shape, const void* features, float* cosines, float* inverse_norm, void* stream) {
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* f = static_cast<const T*>(features);
    launch(
        "vf_gram (norms)", norm_kernel<T>, shape.batch * ceil_div(shape.positions, kWarp), dim3(kWarp, kNormRows),
        stream, f, shape, inverse_norm);
    launch(
        "vf_gram", gram_kernel<T>, gram_tiles(shape.batch, shape.positions), dim3(kThreads), stream, f, shape,
        inverse_norm, cosines, loads_four(f, shape));
  });
}

void vf_distmat(
    FeatureShape u_shape, const float* u, FeatureShape v_shape, const float* v, const float* cosines, float margin,
    float* partial, float* loss, int8_t* sign, void* stream) {
  const int64_t tiles = gram_tiles(u_shape.batch, u_shape.positions);
  launch(
      "vf_distmat", distmat_kernel, tiles, dim3(kThreads), stream, u, u_shape, loads_four(u, u_shape), v, v_shape,
      loads_four(v, v_shape), cosines, margin, partial, sign);
  launch(
      "vf_distmat (mean)", mean_kernel, 1, dim3(kThreads), stream, partial, tiles,
      u_shape.batch * u_shape.positions * u_shape.positions, loss);
}

}  // namespace vadit::cuda

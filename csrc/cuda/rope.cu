// Rotary embedding of interleaved pairs, after an optional bias and RMSNorm over the head (QK-norm):
// t <- t r weight,  r = 1 / sqrt(mean(t^2) + eps);  y[2i] = t[2i] cos[2i] - t[2i+1] sin[2i],
// y[2i+1] = t[2i+1] cos[2i+1] + t[2i] sin[2i+1].
//
// Backward: dt[2i] = dy[2i] cos[2i] + dy[2i+1] sin[2i+1], dt[2i+1] = dy[2i+1] cos[2i+1] - dy[2i] sin[2i]; then, with
// n = t r and g = dt weight:  dt_in = r (g - n mean(g n)),  dweight = sum dt n,  dbias = column sums of dt_in and dv.
// Bytes moved: forward reads and writes q and k (with a bias, v) once; backward reads dq, dk (and q, k where they were normalised) and
// writes their gradients; where these are packed with dv into dqkv, dv is copied in the same pass.
//
// Forward, a warp takes one token of one image and all its heads, so that the tables are read once: width / kRun lanes
// per head with kRun elements each, as many heads at a time as fit. Backward, it keeps those heads for several tokens,
// with their sums in registers. Other widths and alignments take the loop kernels: one head at a time, a lane looping
// over its pairs.

#include "column_sums.cuh"

namespace vadit::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxWidth = kWarp * kRun;  // of the vectorised kernels

template <class T>
struct Parts {
  Heads in[3], dy[3];  // q, k, v; the data of v is null where nothing is to be done to it
  MutableHeads out[3];
  const float* weight[3];
  const float* bias;
};

__device__ __forceinline__ int64_t offset_of(const HeadStrides& s, int64_t image, int64_t head, int64_t token) {
  return image * s.image + head * s.head + token * s.token;
}

template <class T>
__device__ __forceinline__ const T* head_of(const Heads& heads, int64_t image, int64_t head, int64_t token) {
  return static_cast<const T*>(heads.data) + offset_of(heads.strides, image, head, token);
}

template <class T>
__device__ __forceinline__ T* head_of(const MutableHeads& heads, int64_t image, int64_t head, int64_t token) {
  return static_cast<T*>(heads.data) + offset_of(heads.strides, image, head, token);
}

// One pair, given its two cosines and sines; rotate_back is the transposed rotation, that of the backward pass.
__device__ __forceinline__ void rotate(float& even, float& odd, const float* cosine, const float* sine) {
  const float e = even;
  even = e * cosine[0] - odd * sine[0];
  odd = odd * cosine[1] + e * sine[1];
}
__device__ __forceinline__ void rotate_back(float& even, float& odd, const float* cosine, const float* sine) {
  const float e = even;
  even = e * cosine[0] + odd * sine[1];
  odd = odd * cosine[1] - e * sine[0];
}

// How the lanes of a warp share out a token's heads, W = kRun: lane = slot * lanes_per_head + column / kRun.
struct Lanes {
  int per_head, slots, slot, column;
  __device__ explicit Lanes(int64_t width)
      : per_head(static_cast<int>(width) / kRun), slots(kWarp / per_head),
        slot(static_cast<int>(threadIdx.x % kWarp) / per_head),
        column(static_cast<int>(threadIdx.x % kWarp) % per_head * kRun) {}
};

// Sum over the lanes of one head, the same in each of them. All lanes of the warp must call it; those beyond the last
// slot get some number.
__device__ __forceinline__ float head_sum(float x, const Lanes& lanes) {
  const int lane = threadIdx.x % kWarp, within = lanes.column / kRun;
  int reach = 1;
  while (reach < lanes.per_head) reach *= 2;
  for (reach /= 2; reach > 0; reach /= 2) {
    const float other = __shfl_down_sync(kAllLanes, x, reach);
    if (within + reach < lanes.per_head) x += other;
  }
  return __shfl_sync(kAllLanes, x, lane - within);
}

__device__ __forceinline__ float squares(const float (&t)[kRun]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kRun; ++i) sum += t[i] * t[i];
  return sum;
}

__device__ __forceinline__ void add_bias(float (&t)[kRun], const float* bias) {
  float b[kRun];
  load(b, bias);
#pragma unroll
  for (int i = 0; i < kRun; ++i) t[i] += b[i];
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) forward_kernel(HeadShape shape, Parts<T> parts, RopeTables tables) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= shape.batch * shape.tokens) return;
  const int64_t image = row / shape.tokens, token = row % shape.tokens;
  const Lanes lanes(shape.width);
  float cosine[kRun], sine[kRun];
  load(cosine, tables.cos + token * shape.width + lanes.column);
  load(sine, tables.sin + token * shape.width + lanes.column);
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    if (parts.in[part].data == nullptr) continue;
    float weight[kRun];
    const bool normed = parts.weight[part] != nullptr;
    if (normed) load(weight, parts.weight[part] + lanes.column);
    for (int64_t first = 0; first < shape.heads; first += lanes.slots) {
      const int64_t head = first + lanes.slot;
      const bool active = lanes.slot < lanes.slots && head < shape.heads;
      float t[kRun] = {};
      if (active) load(t, head_of<T>(parts.in[part], image, head, token) + lanes.column);
      if (active && parts.bias) add_bias(t, parts.bias + (part * shape.heads + head) * shape.width + lanes.column);
      if (normed) {
        const float r = rsqrtf(head_sum(squares(t), lanes) / static_cast<float>(shape.width) + tables.eps);
#pragma unroll
        for (int i = 0; i < kRun; ++i) t[i] *= r * weight[i];
      }
#pragma unroll
      for (int i = 0; part < 2 && i < kRun; i += 2) rotate(t[i], t[i + 1], &cosine[i], &sine[i]);
      if (active) store(head_of<T>(parts.out[part], image, head, token) + lanes.column, t);
    }
  }
}

// One head of one token with its part of the bias, element by element.
template <class T>
struct Biased {
  const T* at;
  const float* bias;
  __device__ Biased(const Parts<T>& parts, int part, const HeadShape& s, int64_t image, int64_t head, int64_t token)
      : at(head_of<T>(parts.in[part], image, head, token)),
        bias(parts.bias ? parts.bias + (part * s.heads + head) * s.width : nullptr) {}
  __device__ float operator[](int64_t i) const { return to_float(at[i]) + (bias ? bias[i] : 0.0f); }
};

template <class T>
__global__ void __launch_bounds__(kWarp) forward_loop_kernel(HeadShape shape, Parts<T> parts, RopeTables tables) {
  const int64_t image = blockIdx.x / shape.tokens, token = blockIdx.x % shape.tokens;
  const float* cosine = tables.cos + token * shape.width;
  const float* sine = tables.sin + token * shape.width;
  for (int part = 0; part < 3; ++part) {
    if (parts.in[part].data == nullptr) continue;
    const float* weight = parts.weight[part];
    for (int64_t head = 0; head < shape.heads; ++head) {
      const Biased<T> in(parts, part, shape, image, head, token);
      T* out = head_of<T>(parts.out[part], image, head, token);
      float r = 1.0f;
      if (weight) {
        float sum = 0.0f;
        for (int64_t i = threadIdx.x; i < shape.width; i += kWarp) sum += in[i] * in[i];
        r = rsqrtf(warp_sum(sum) / static_cast<float>(shape.width) + tables.eps);
      }
      for (int64_t i = threadIdx.x; i < shape.width / 2; i += kWarp) {
        float even = in[2 * i], odd = in[2 * i + 1];
        if (weight) even *= r * weight[2 * i], odd *= r * weight[2 * i + 1];
        if (part < 2) rotate(even, odd, cosine + 2 * i, sine + 2 * i);
        store(out + 2 * i, even);
        store(out + 2 * i + 1, odd);
      }
    }
  }
}

// Of the norm of one part's heads of a token: t in, with its bias; dt in and out; dweight: this lane's sums.
__device__ __forceinline__ void norm_backward(
    float (&dt)[kRun], float (&t)[kRun], const float* weights, const Lanes& lanes, float width, float eps,
    float (&dweight)[kRun]) {
  float weight[kRun], dot = 0.0f;
  load(weight, weights + lanes.column);
  const float r = rsqrtf(head_sum(squares(t), lanes) / width + eps);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    t[i] *= r;
    dweight[i] += dt[i] * t[i];
    dt[i] *= weight[i];
    dot += dt[i] * t[i];
  }
  const float mean = head_sum(dot, lanes) / width;
#pragma unroll
  for (int i = 0; i < kRun; ++i) dt[i] = r * (dt[i] - t[i] * mean);
}

// Adds up what the lanes of a block's warps hold, and calls f(run element of the warp, sum) for the first `count`.
template <class F>
__device__ __forceinline__ void warps_sum(
    const float (&mine)[kRun], float (&slots)[kWarps][kMaxWidth], int64_t count, F f) {
  __syncthreads();  // the slots may still be read from the call before
#pragma unroll
  for (int i = 0; i < kRun; ++i) slots[threadIdx.x / kWarp][threadIdx.x % kWarp * kRun + i] = mine[i];
  __syncthreads();
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += slots[w][j];
    f(j, sum);
  }
}

// Blocks: chunks of tokens, which the warps take one after the other, and for each of them groups of as many heads as a
// warp takes at a time. weight_sums: (blocks, 2, width); bias_sums: (chunks, 3, heads, width).
template <class T, bool kNormed>
__global__ void __launch_bounds__(kWarps* kWarp) backward_kernel(
    HeadShape shape, Parts<T> parts, RopeTables tables, int64_t chunk, int64_t groups, float* weight_sums,
    float* bias_sums) {
  __shared__ float slots[kWarps][kMaxWidth];
  const Lanes lanes(shape.width);
  const int64_t first_head = blockIdx.x % groups * lanes.slots, head = first_head + lanes.slot;
  const bool active = lanes.slot < lanes.slots && head < shape.heads;
  const int64_t begin = blockIdx.x / groups * chunk, rows = shape.batch * shape.tokens;
  const int64_t end = begin + chunk < rows ? begin + chunk : rows;
  float dweight[2][kRun] = {}, dbias[3][kRun] = {};
  for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kWarps) {
    const int64_t image = row / shape.tokens, token = row % shape.tokens;
    float cosine[kRun], sine[kRun];
    load(cosine, tables.cos + token * shape.width + lanes.column);
    load(sine, tables.sin + token * shape.width + lanes.column);
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      if (parts.dy[part].data == nullptr) continue;
      float dt[kRun] = {};
      if (active) load(dt, head_of<T>(parts.dy[part], image, head, token) + lanes.column);
#pragma unroll
      for (int i = 0; part < 2 && i < kRun; i += 2) rotate_back(dt[i], dt[i + 1], &cosine[i], &sine[i]);
      if (kNormed && part < 2 && parts.weight[part]) {
        float t[kRun] = {};
        if (active) load(t, head_of<T>(parts.in[part], image, head, token) + lanes.column);
        if (active && parts.bias) add_bias(t, parts.bias + (part * shape.heads + head) * shape.width + lanes.column);
        const float width = static_cast<float>(shape.width);
        norm_backward(dt, t, parts.weight[part], lanes, width, tables.eps, dweight[part % 2]);
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) dbias[part][i] += dt[i];
      if (active) store(head_of<T>(parts.out[part], image, head, token) + lanes.column, dt);
    }
  }
#pragma unroll
  for (int part = 0; kNormed && part < 2; ++part) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float mine = dweight[part][i];
      for (int slot = 1; slot < lanes.slots; ++slot)
        dweight[part][i] += __shfl_sync(kAllLanes, mine, (threadIdx.x + slot * lanes.per_head) % kWarp);
    }
    warps_sum(dweight[part], slots, shape.width, [&](int column, float sum) {
      weight_sums[(blockIdx.x * 2 + part) * shape.width + column] = sum;
    });
  }
  if (parts.bias == nullptr) return;
  const int64_t left = shape.heads - first_head, heads = left < lanes.slots ? left : lanes.slots;
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    warps_sum(dbias[part], slots, heads * shape.width, [&](int column, float sum) {
      const int64_t row = (blockIdx.x / groups * 3 + part) * shape.heads + first_head;
      bias_sums[row * shape.width + column] = sum;
    });
  }
}

// Each lane adds to the sums for its own pairs alone.
template <class T>
__global__ void __launch_bounds__(kWarp) backward_loop_kernel(
    HeadShape shape, Parts<T> parts, RopeTables tables, int64_t chunk, float* weight_sums, float* bias_sums) {
  const int64_t begin = blockIdx.x * chunk, rows = shape.batch * shape.tokens;
  const int64_t end = begin + chunk < rows ? begin + chunk : rows;
  const float width = static_cast<float>(shape.width);
  for (int part = 0; part < 3; ++part) {
    if (parts.dy[part].data == nullptr) continue;
    const float* weight = parts.weight[part];
    float* dweight = weight ? weight_sums + (blockIdx.x * 2 + part) * shape.width : nullptr;
    for (int64_t i = threadIdx.x; weight && i < shape.width / 2; i += kWarp) dweight[2 * i] = dweight[2 * i + 1] = 0.0f;
    for (int64_t item = begin * shape.heads; item < end * shape.heads; ++item) {
      const int64_t row = item / shape.heads, head = item % shape.heads;
      const int64_t image = row / shape.tokens, token = row % shape.tokens;
      const float* cosine = tables.cos + token * shape.width;
      const float* sine = tables.sin + token * shape.width;
      const T* dy = head_of<T>(parts.dy[part], image, head, token);
      T* out = head_of<T>(parts.out[part], image, head, token);
      const auto gradient = [&](int64_t i, float& even, float& odd) {
        even = to_float(dy[2 * i]), odd = to_float(dy[2 * i + 1]);
        if (part < 2) rotate_back(even, odd, cosine + 2 * i, sine + 2 * i);
      };
      float r = 0.0f, pull = 0.0f;
      const Biased<T> in(parts, part, shape, image, head, token);
      if (weight) {
        float sum = 0.0f, dot = 0.0f;
        for (int64_t i = threadIdx.x; i < shape.width / 2; i += kWarp) {
          const float t0 = in[2 * i], t1 = in[2 * i + 1];
          float even, odd;
          gradient(i, even, odd);
          sum += t0 * t0 + t1 * t1;
          dot += even * weight[2 * i] * t0 + odd * weight[2 * i + 1] * t1;
        }
        r = rsqrtf(warp_sum(sum) / width + tables.eps);
        pull = warp_sum(dot) / width * r * r;
      }
      for (int64_t i = threadIdx.x; i < shape.width / 2; i += kWarp) {
        float even, odd;
        gradient(i, even, odd);
        if (weight) {
          const float t0 = in[2 * i], t1 = in[2 * i + 1];
          dweight[2 * i] += even * (t0 * r);
          dweight[2 * i + 1] += odd * (t1 * r);
          even = r * (even * weight[2 * i] - t0 * pull);
          odd = r * (odd * weight[2 * i + 1] - t1 * pull);
        }
        store(out + 2 * i, even);
        store(out + 2 * i + 1, odd);
        if (parts.bias == nullptr) continue;
        float* dbias = bias_sums + ((blockIdx.x * 3 + part) * shape.heads + head) * shape.width + 2 * i;
        dbias[0] = (row > begin ? dbias[0] : 0.0f) + even;
        dbias[1] = (row > begin ? dbias[1] : 0.0f) + odd;
      }
    }
  }
}

bool aligned(const HeadStrides& s, const void* data) { return takes_runs({data}, {s.image, s.head, s.token}); }

template <class T>
bool takes_runs(HeadShape shape, const Parts<T>& parts, RopeTables tables) {
  bool runs = shape.width <= kMaxWidth && cuda::takes_runs({tables.cos, tables.sin, parts.bias}, {shape.width});
  for (int part = 0; part < 3; ++part) {
    runs = runs && cuda::takes_runs({parts.weight[part]}, {});
    for (const Heads& heads : {parts.in[part], parts.dy[part]}) runs = runs && aligned(heads.strides, heads.data);
    runs = runs && aligned(parts.out[part].strides, parts.out[part].data);
  }
  return runs;
}

}  // namespace

void rope(
    Type type, HeadShape shape, const RopeInput& input, RopeTables tables, const MutableHeads out[3], void* stream) {
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Parts<T> parts{{input.in[0], input.in[1], input.in[2]},
                         {},
                         {out[0], out[1], out[2]},
                         {input.weight[0], input.weight[1], nullptr},
                         input.bias};
    if (takes_runs(shape, parts, tables))
      launch(
          "rope", forward_kernel<T>, ceil_div(shape.rows(), kWarps), dim3(kWarps * kWarp), stream, shape, parts,
          tables);
    else
      launch("rope", forward_loop_kernel<T>, shape.rows(), dim3(kWarp), stream, shape, parts, tables);
  });
}

void rope_backward(
    Type type, HeadShape shape, const RopeInput& input, RopeTables tables, const RopeGradients& gradients,
    void* stream) {
  const int64_t chunk = rope_chunk(shape), chunks = rope_partial_rows(shape);
  const bool normed = input.weight[0] || input.weight[1];
  int64_t blocks = chunks;
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Parts<T> parts{{input.in[0], input.in[1], input.in[2]},
                         {gradients.dy[0], gradients.dy[1], gradients.dy[2]},
                         {gradients.out[0], gradients.out[1], gradients.out[2]},
                         {input.weight[0], input.weight[1], nullptr},
                         input.bias};
    float *weight_sums = gradients.weight_sums, *bias_sums = gradients.bias_sums;
    if (takes_runs(shape, parts, tables)) {
      const int64_t groups = ceil_div(shape.heads, kWarp / (shape.width / kRun));
      blocks = chunks * groups;
      launch(
          "rope_backward", normed ? backward_kernel<T, true> : backward_kernel<T, false>, blocks, dim3(kWarps * kWarp),
          stream, shape, parts, tables, chunk, groups, weight_sums, bias_sums);
    } else {
      launch(
          "rope_backward", backward_loop_kernel<T>, blocks, dim3(kWarp), stream, shape, parts, tables, chunk,
          weight_sums, bias_sums);
    }
  });
  for (int part = 0; part < 2; ++part) {
    if (input.weight[part] == nullptr) continue;
    column_sums(
        "rope_backward (dweight)", gradients.weight_sums + part * shape.width, blocks, 2 * shape.width, shape.width,
        gradients.dweight[part], stream);
  }
  const int64_t row = 3 * shape.heads * shape.width;
  if (input.bias) column_sums("rope_backward (dbias)", gradients.bias_sums, chunks, row, row, gradients.dbias, stream);
}

}  // namespace vadit::cuda

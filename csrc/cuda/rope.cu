// Rotary embedding of interleaved pairs, after an optional RMSNorm over the head (QK-norm):
// t <- t r weight,  r = 1 / sqrt(mean(t^2) + eps);  y[2i] = t[2i] cos[2i] - t[2i+1] sin[2i],
// y[2i+1] = t[2i+1] cos[2i+1] + t[2i] sin[2i+1].
//
// Backward: dt[2i] = dy[2i] cos[2i] + dy[2i+1] sin[2i+1], dt[2i+1] = dy[2i+1] cos[2i+1] - dy[2i] sin[2i]; then, with
// n = t r and g = dt weight:  dt_in = r (g - n mean(g n)),  dweight = sum dt n.
// Bytes moved: forward reads and writes q and k once; backward reads dq, dk (and q, k where they were normalised) and
// writes their gradients; where these are packed with dv into dqkv, dv is copied in the same pass.
//
// A warp takes one token of one image and all its heads, so that the tables are read once: width / kRun lanes per head
// with kRun elements each, as many heads at a time as fit. Other widths and alignments take the loop kernels: one head
// at a time, a lane looping over its pairs.

#include "column_sums.cuh"

namespace vadit::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxWidth = kWarp * kRun;  // of the vectorised kernels

template <class T>
struct Parts {
  Heads in[2], dy[2], dv;
  MutableHeads out[2], dv_out;
  const float* weight[2];
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
  for (int part = 0; part < 2; ++part) {
    float weight[kRun];
    const bool normed = parts.weight[part] != nullptr;
    if (normed) load(weight, parts.weight[part] + lanes.column);
    for (int64_t first = 0; first < shape.heads; first += lanes.slots) {
      const int64_t head = first + lanes.slot;
      const bool active = lanes.slot < lanes.slots && head < shape.heads;
      float t[kRun] = {};
      if (active) load(t, head_of<T>(parts.in[part], image, head, token) + lanes.column);
      if (normed) {
        const float r = rsqrtf(head_sum(squares(t), lanes) / static_cast<float>(shape.width) + tables.eps);
#pragma unroll
        for (int i = 0; i < kRun; ++i) t[i] *= r * weight[i];
      }
#pragma unroll
      for (int i = 0; i < kRun; i += 2) rotate(t[i], t[i + 1], &cosine[i], &sine[i]);
      if (active) store(head_of<T>(parts.out[part], image, head, token) + lanes.column, t);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kWarp) forward_loop_kernel(HeadShape shape, Parts<T> parts, RopeTables tables) {
  const int64_t image = blockIdx.x / shape.tokens, token = blockIdx.x % shape.tokens;
  const float* cosine = tables.cos + token * shape.width;
  const float* sine = tables.sin + token * shape.width;
  for (int part = 0; part < 2; ++part) {
    const float* weight = parts.weight[part];
    for (int64_t head = 0; head < shape.heads; ++head) {
      const T* in = head_of<T>(parts.in[part], image, head, token);
      T* out = head_of<T>(parts.out[part], image, head, token);
      float r = 1.0f;
      if (weight) {
        float sum = 0.0f;
        for (int64_t i = threadIdx.x; i < shape.width; i += kWarp) sum += to_float(in[i]) * to_float(in[i]);
        r = rsqrtf(warp_sum(sum) / static_cast<float>(shape.width) + tables.eps);
      }
      for (int64_t i = threadIdx.x; i < shape.width / 2; i += kWarp) {
        float even = to_float(in[2 * i]), odd = to_float(in[2 * i + 1]);
        if (weight) even *= r * weight[2 * i], odd *= r * weight[2 * i + 1];
        rotate(even, odd, cosine + 2 * i, sine + 2 * i);
        store(out + 2 * i, even);
        store(out + 2 * i + 1, odd);
      }
    }
  }
}

// One part's heads of one token; dweight: this lane's sums for its columns.
template <class T>
__device__ __forceinline__ void backward_part(
    const HeadShape& shape, const Parts<T>& parts, int part, const Lanes& lanes, int64_t image, int64_t token,
    const float (&cosine)[kRun], const float (&sine)[kRun], float eps, float (&dweight)[kRun]) {
  const bool normed = parts.weight[part] != nullptr;
  const float width = static_cast<float>(shape.width);
  float weight[kRun];
  if (normed) load(weight, parts.weight[part] + lanes.column);
  for (int64_t first = 0; first < shape.heads; first += lanes.slots) {
    const int64_t head = first + lanes.slot;
    const bool active = lanes.slot < lanes.slots && head < shape.heads;
    float dt[kRun] = {}, t[kRun] = {};
    if (active) load(dt, head_of<T>(parts.dy[part], image, head, token) + lanes.column);
    if (active && normed) load(t, head_of<T>(parts.in[part], image, head, token) + lanes.column);
#pragma unroll
    for (int i = 0; i < kRun; i += 2) rotate_back(dt[i], dt[i + 1], &cosine[i], &sine[i]);
    if (normed) {
      const float r = rsqrtf(head_sum(squares(t), lanes) / width + eps);
      float dot = 0.0f;
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
    if (active) store(head_of<T>(parts.out[part], image, head, token) + lanes.column, dt);
  }
}

// A block takes `chunk` tokens, its warps one after the other. partial: (blocks, 2, width).
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    backward_kernel(HeadShape shape, Parts<T> parts, RopeTables tables, int64_t chunk, float* partial) {
  __shared__ float slots[kWarps][2][kMaxWidth];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = blockIdx.x * chunk, rows = shape.batch * shape.tokens;
  const int64_t end = begin + chunk < rows ? begin + chunk : rows;
  const Lanes lanes(shape.width);
  float dweight[2][kRun] = {};
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const int64_t image = row / shape.tokens, token = row % shape.tokens;
    float cosine[kRun], sine[kRun];
    load(cosine, tables.cos + token * shape.width + lanes.column);
    load(sine, tables.sin + token * shape.width + lanes.column);
#pragma unroll
    for (int part = 0; part < 2; ++part)
      backward_part(shape, parts, part, lanes, image, token, cosine, sine, tables.eps, dweight[part]);
    if (parts.dv.data == nullptr) continue;
    for (int64_t head = lanes.slot; lanes.slot < lanes.slots && head < shape.heads; head += lanes.slots) {
      float t[kRun];
      load(t, head_of<T>(parts.dv, image, head, token) + lanes.column);
      store(head_of<T>(parts.dv_out, image, head, token) + lanes.column, t);
    }
  }
  if (parts.weight[0] == nullptr && parts.weight[1] == nullptr) return;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float mine = dweight[part][i];
      float sum = mine;
      for (int slot = 1; slot < lanes.slots; ++slot)
        sum += __shfl_sync(kAllLanes, mine, (lane + slot * lanes.per_head) % kWarp);
      if (lane < lanes.per_head) slots[warp][part][lanes.column + i] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * shape.width; i += blockDim.x) {
    const int part = i / static_cast<int>(shape.width), column = i % static_cast<int>(shape.width);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += slots[w][part][column];
    partial[blockIdx.x * 2 * shape.width + i] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kWarp)
    backward_loop_kernel(HeadShape shape, Parts<T> parts, RopeTables tables, int64_t chunk, float* partial) {
  const int64_t begin = blockIdx.x * chunk, rows = shape.batch * shape.tokens;
  const int64_t end = begin + chunk < rows ? begin + chunk : rows;
  const float width = static_cast<float>(shape.width);
  for (int part = 0; part < 2; ++part) {
    const float* weight = parts.weight[part];
    float* dweight = partial + (blockIdx.x * 2 + part) * shape.width;
    // Each lane adds to the columns of its own pairs alone.
    for (int64_t i = threadIdx.x; weight && i < shape.width / 2; i += kWarp) dweight[2 * i] = dweight[2 * i + 1] = 0.0f;
    for (int64_t item = begin * shape.heads; item < end * shape.heads; ++item) {
      const int64_t row = item / shape.heads, head = item % shape.heads;
      const int64_t image = row / shape.tokens, token = row % shape.tokens;
      const float* cosine = tables.cos + token * shape.width;
      const float* sine = tables.sin + token * shape.width;
      const T* dy = head_of<T>(parts.dy[part], image, head, token);
      T* out = head_of<T>(parts.out[part], image, head, token);
      if (weight == nullptr) {
        for (int64_t i = threadIdx.x; i < shape.width / 2; i += kWarp) {
          float even = to_float(dy[2 * i]), odd = to_float(dy[2 * i + 1]);
          rotate_back(even, odd, cosine + 2 * i, sine + 2 * i);
          store(out + 2 * i, even);
          store(out + 2 * i + 1, odd);
        }
        continue;
      }
      const T* in = head_of<T>(parts.in[part], image, head, token);
      float sum = 0.0f, dot = 0.0f;
      for (int64_t i = threadIdx.x; i < shape.width / 2; i += kWarp) {
        const float t0 = to_float(in[2 * i]), t1 = to_float(in[2 * i + 1]);
        float even = to_float(dy[2 * i]), odd = to_float(dy[2 * i + 1]);
        rotate_back(even, odd, cosine + 2 * i, sine + 2 * i);
        sum += t0 * t0 + t1 * t1;
        dot += even * weight[2 * i] * t0 + odd * weight[2 * i + 1] * t1;
      }
      const float r = rsqrtf(warp_sum(sum) / width + tables.eps);
      const float pull = warp_sum(dot) / width * r * r;
      for (int64_t i = threadIdx.x; i < shape.width / 2; i += kWarp) {
        const float t0 = to_float(in[2 * i]), t1 = to_float(in[2 * i + 1]);
        float even = to_float(dy[2 * i]), odd = to_float(dy[2 * i + 1]);
        rotate_back(even, odd, cosine + 2 * i, sine + 2 * i);
        dweight[2 * i] += even * (t0 * r);
        dweight[2 * i + 1] += odd * (t1 * r);
        store(out + 2 * i, r * (even * weight[2 * i] - t0 * pull));
        store(out + 2 * i + 1, r * (odd * weight[2 * i + 1] - t1 * pull));
      }
    }
  }
  if (parts.dv.data == nullptr) return;
  for (int64_t item = begin * shape.heads; item < end * shape.heads; ++item) {
    const int64_t row = item / shape.heads, head = item % shape.heads;
    const T* from = head_of<T>(parts.dv, row / shape.tokens, head, row % shape.tokens);
    T* to = head_of<T>(parts.dv_out, row / shape.tokens, head, row % shape.tokens);
    for (int64_t i = threadIdx.x; i < shape.width; i += kWarp) to[i] = from[i];
  }
}

bool aligned(const HeadStrides& s, const void* data) { return takes_runs({data}, {s.image, s.head, s.token}); }

template <class T>
bool takes_runs(HeadShape shape, const Parts<T>& parts, RopeTables tables) {
  bool runs = shape.width <= kMaxWidth && cuda::takes_runs({tables.cos, tables.sin}, {shape.width}) &&
              aligned(parts.dv.strides, parts.dv.data) && aligned(parts.dv_out.strides, parts.dv_out.data);
  for (int part = 0; part < 2; ++part) {
    runs = runs && cuda::takes_runs({parts.weight[part]}, {});
    for (const Heads& heads : {parts.in[part], parts.dy[part]}) runs = runs && aligned(heads.strides, heads.data);
    runs = runs && aligned(parts.out[part].strides, parts.out[part].data);
  }
  return runs;
}

}  // namespace

void rope(
    Type type, HeadShape shape, const Heads in[2], const float* const weight[2], RopeTables tables,
    const MutableHeads out[2], void* stream) {
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Parts<T> parts{{in[0], in[1]}, {}, {}, {out[0], out[1]}, {}, {weight[0], weight[1]}};
    if (takes_runs(shape, parts, tables))
      launch(
          "rope", forward_kernel<T>, ceil_div(shape.rows(), kWarps), dim3(kWarps * kWarp), stream, shape, parts,
          tables);
    else
      launch("rope", forward_loop_kernel<T>, shape.rows(), dim3(kWarp), stream, shape, parts, tables);
  });
}

void rope_backward(
    Type type, HeadShape shape, const Heads dy[2], const Heads in[2], const float* const weight[2], RopeTables tables,
    const RopeGradients& gradients, void* stream) {
  const int64_t chunk = rope_chunk(shape), blocks = rope_partial_rows(shape);
  with_type(type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Parts<T> parts{{in[0], in[1]},
                         {dy[0], dy[1]},
                         gradients.dv,
                         {gradients.out[0], gradients.out[1]},
                         gradients.dv_out,
                         {weight[0], weight[1]}};
    const bool runs = takes_runs(shape, parts, tables);
    launch(
        "rope_backward", runs ? backward_kernel<T> : backward_loop_kernel<T>, blocks,
        dim3(runs ? kWarps * kWarp : kWarp), stream, shape, parts, tables, chunk, gradients.partial);
  });
  for (int part = 0; part < 2; ++part) {
    if (weight[part] == nullptr) continue;
    column_sums(
        "rope_backward (dweight)", gradients.partial + part * shape.width, blocks, 2 * shape.width, shape.width,
        gradients.dweight[part], stream);
  }
}

}  // namespace vadit::cuda

// Rotary embedding of interleaved pairs, float32:  y = t cos + swap(t) signed_sin,  swap(t)[2i] = t[2i+1] and back.
// signed_sin is (-sin[2i], sin[2i+1]) forward and (sin[2i+1], -sin[2i]) transposed, i.e. in the backward pass; it is
// built once per call, (N, K) beside (B, H, N, K). q and k are read through their strides: they are views of qkv.

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "vec.h"

namespace vadit {
namespace {

typedef float Pairs __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8;

VADIT_INLINE void rotate_row(float* y, const float* t, const float* cosine, const float* signed_sin, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Pairs value, c, s;
    std::memcpy(&value, t + i, sizeof(Pairs));
    std::memcpy(&c, cosine + i, sizeof(Pairs));
    std::memcpy(&s, signed_sin + i, sizeof(Pairs));
    const Pairs swapped = __builtin_shufflevector(value, value, 1, 0, 3, 2, 5, 4, 7, 6);
    const Pairs result = value * c + swapped * s;
    std::memcpy(y + i, &result, sizeof(Pairs));
  }
  for (; i < width; i += 2) {
    const float even = t[i], odd = t[i + 1];
    y[i] = even * cosine[i] + odd * signed_sin[i];
    y[i + 1] = odd * cosine[i + 1] + even * signed_sin[i + 1];
  }
}

std::vector<float> signed_sine(const Tensor& sin, bool transposed) {
  const float* s = data(sin);
  std::vector<float> table(sin.numel());
  for (int64_t i = 0; i + 1 < static_cast<int64_t>(table.size()); i += 2) {
    table[i] = transposed ? s[i + 1] : -s[i];
    table[i + 1] = transposed ? -s[i] : s[i + 1];
  }
  return table;
}

Tensor rotate(const Tensor& t_in, const float* cosine, const float* signed_sin) {
  const int64_t batch = t_in.size(0), heads = t_in.size(1), tokens = t_in.size(2), width = t_in.size(3);
  const Tensor t = t_in.stride(3) == 1 ? t_in : torch::stable::contiguous(t_in);
  Tensor y = torch::stable::new_empty(t, t.sizes());
  const int64_t stride_b = t.stride(0), stride_h = t.stride(1), stride_n = t.stride(2);
  const float* t_data = data(t);
  float* y_data = mutable_data(y);
  torch::stable::parallel_for(0, batch * heads, row_grain(tokens * width), [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const float* from = t_data + head / heads * stride_b + head % heads * stride_h;
      float* to = y_data + head * tokens * width;
      for (int64_t n = 0; n < tokens; ++n) {
        run<rotate_row>(to + n * width, from + n * stride_n, cosine + n * width, signed_sin + n * width, width);
      }
    }
  });
  return y;
}

void check_heads(const Tensor& t, const Tensor& table, const char* name) {
  check_float(t, name);
  STD_TORCH_CHECK(
      t.dim() == 4 && t.size(3) % 2 == 0 && table.numel() == t.size(2) * t.size(3), name,
      " must be (B, H, N, K) with K even, cos and sin (N, K)");
}

}  // namespace

std::tuple<Tensor, Tensor> rope(
    const Tensor& q, const Tensor& k, const Tensor& cos_in, const Tensor& sin_in, bool transposed) {
  check_float(cos_in, "cos");
  check_float(sin_in, "sin");
  for (const Tensor* table : {&cos_in, &sin_in}) {
    check_heads(q, *table, "q");
    check_heads(k, *table, "k");
  }
  const Tensor cos = torch::stable::contiguous(cos_in), sin = torch::stable::contiguous(sin_in);
  const std::vector<float> signed_sin = signed_sine(sin, transposed);
  return {rotate(q, data(cos), signed_sin.data()), rotate(k, data(cos), signed_sin.data())};
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }

}  // namespace vadit

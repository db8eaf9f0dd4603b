// RMS-norm of queries and keys where a weight is given, then rotary embedding of pairs; float32 or bfloat16. Packed, the
// bias of the linear layer before is added first to q, k and v.
//
//   t = x r w,  r = 1 / sqrt(mean(x^2) + eps);   y = t C + swap(t) S,   swap(t)[2i] = t[2i+1] and back,
//   C = cos,  S = (-sin[2i], sin[2i+1]);  transposed, for the backward pass:  S = (sin[2i+1], -sin[2i]).
// Backward, with dt the transposed rotation of dy and g = dt w:  dx = r (g - x r^2 mean(g x)),  dw = sum dt x r,
// dbias = column sums of dx (and dv).
//
// Bytes moved, forward: read q and k (and v where there is a bias), write them; backward: read dq, dk (q, k where normalised, dv where packed),
// write dq, dk (dqkv). The (N, K) tables stay in cache. q, k and gradients are read through their strides (they are
// views of one qkv); results lie in memory as (B, N, H, K), so that a token's heads are read and written in one stream.

#ifdef VADIT_ISA

namespace vadit::VADIT_ISA {
namespace {

VADIT_INLINE Vec swap_pairs(Vec v) {
#if VADIT_LANES == 4
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#elif VADIT_LANES == 8
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#endif
}

template <class T, bool kBias>
VADIT_INLINE Vec load_biased(const T* x, const float* bias, int64_t n) {
  return kBias ? load(x, n) + load(bias, n) : load(x, n);
}

// One token's heads. C and S are the token's rows; with a norm they contain the weight: y = r (x C w + swap(x) S w').
template <class T, bool kNorm, bool kBias>
VADIT_INLINE void rotate_heads(
    T* y, const T* x, const float* bias, int64_t stride, int64_t heads, int64_t width, const float* C, const float* S,
    float eps) {
  for (int64_t head = 0; head < heads; ++head, x += stride, y += width, bias += kBias ? width : 0) {
    float r = 1.0f;
    if (kNorm) {
      Vec squares = {};
      each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
        const Vec value = load_biased<T, kBias>(x + i, bias + i, n);
        squares += value * value;
      });
      r = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
    }
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec value = load_biased<T, kBias>(x + i, bias + i, n);
      const Vec rotated = value * load(C + i, n) + swap_pairs(value) * load(S + i, n);
      store(y + i, kNorm ? rotated * r : rotated, n);
    });
  }
}

// `bias` may be null.
template <class T>
void rotate(
    T* y, const T* x, const float* bias, int64_t stride, int64_t heads, int64_t width, const float* C, const float* S,
    bool norm, float eps) {
  if (bias && norm) {
    rotate_heads<T, true, true>(y, x, bias, stride, heads, width, C, S, eps);
  } else if (bias) {
    rotate_heads<T, false, true>(y, x, bias, stride, heads, width, C, S, eps);
  } else if (norm) {
    rotate_heads<T, true, false>(y, x, bias, stride, heads, width, C, S, eps);
  } else {
    rotate_heads<T, false, false>(y, x, bias, stride, heads, width, C, S, eps);
  }
}

// One token's heads with their bias.
template <class T>
void add_bias(T* y, const T* x, const float* bias, int64_t stride, int64_t heads, int64_t width) {
  for (int64_t head = 0; head < heads; ++head, x += stride, y += width, bias += width) {
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA { store(y + i, load(x + i, n) + load(bias + i, n), n); });
  }
}

// A token's gradient, of which all heads lie in one row, added to the sums for the bias.
template <class T>
void add_to_sums(float* sums, const T* row, int64_t size) {
  each_vector(0, size, [&](int64_t i, int64_t n) VADIT_LAMBDA { store(sums + i, load(sums + i, n) + load(row + i, n), n); });
}

// One token's heads through rotation and norm. `dt` is room for a row; the heads' dt x r are added to `dweight`.
template <class T, bool kBias>
VADIT_INLINE void norm_backward_heads(
    T* dx, const T* dy, int64_t dy_stride, const T* x, const float* bias, int64_t x_stride, int64_t heads,
    int64_t width, const float* C, const float* S, const float* weight, float* dt, float* dweight, float eps) {
  for (int64_t head = 0; head < heads;
       ++head, x += x_stride, dy += dy_stride, dx += width, bias += kBias ? width : 0) {
    Vec squares = {}, dot = {};
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec value = load_biased<T, kBias>(x + i, bias + i, n), gradient = load(dy + i, n);
      const Vec rotated = gradient * load(C + i, n) + swap_pairs(gradient) * load(S + i, n);
      store(dt + i, rotated, n);
      squares += value * value;
      dot += rotated * load(weight + i, n) * value;
    });
    const float r = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
    const float pull = sum(dot) / static_cast<float>(width) * r * r;
    each_vector(0, width, [&](int64_t i, int64_t n) VADIT_LAMBDA {
      const Vec value = load_biased<T, kBias>(x + i, bias + i, n), rotated = load(dt + i, n);
      store(dx + i, (rotated * load(weight + i, n) - value * pull) * r, n);
      store(dweight + i, load(dweight + i, n) + rotated * (value * r), n);
    });
  }
}

// `bias` may be null.
template <class T>
void rotate_norm_backward(
    T* dx, const T* dy, int64_t dy_stride, const T* x, const float* bias, int64_t x_stride, int64_t heads,
    int64_t width, const float* C, const float* S, const float* weight, float* dt, float* dweight, float eps) {
  if (bias) {
    norm_backward_heads<T, true>(
        dx, dy, dy_stride, x, bias, x_stride, heads, width, C, S, weight, dt, dweight, eps);
  } else {
    norm_backward_heads<T, false>(
        dx, dy, dy_stride, x, bias, x_stride, heads, width, C, S, weight, dt, dweight, eps);
  }
}

}  // namespace
}  // namespace vadit::VADIT_ISA

#else

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#define VADIT_KERNELS "rope.cpp"
#include "vec.h"

namespace vadit {
namespace {

// Tokens that one task takes. Fixed, so that the sums for the weights do not depend on the number of threads.
constexpr int64_t kTokensPerChunk = 32;

struct Shape {
  int64_t batch, heads, tokens, width;

  explicit Shape(const Tensor& t)
      : batch(t.size(0)), heads(t.size(1)), tokens(t.size(2)), width(t.size(3)) {}

  int64_t row() const { return heads * width; }  // elements of one token in q
  int64_t chunks() const { return ceil_div(batch * tokens, kTokensPerChunk); }

  // f(chunk, first, end): ranges of the batch * tokens tokens, in parallel.
  template <class F>
  void each_chunk(const F& f) const {
    const int64_t grain = ceil_div(row_grain(row()), kTokensPerChunk);
    torch::stable::parallel_for(0, chunks(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kTokensPerChunk;
        f(chunk, first, std::min(first + kTokensPerChunk, batch * tokens));
      }
    });
  }
};

// A (B, H, N, K) tensor read through its strides; the last one is 1.
template <class T>
struct View {
  const T* at;
  int64_t stride_b, stride_h, stride_n, tokens;

  View(const Tensor& t)
      : at(data<T>(t)), stride_b(t.stride(0)), stride_h(t.stride(1)), stride_n(t.stride(2)), tokens(t.size(2)) {}

  const T* token(int64_t index) const { return at + index / tokens * stride_b + index % tokens * stride_n; }
};

Tensor with_unit_stride(const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

// C and S of the heading as (N, K) rows, times the weight where one is given (forward only).
struct Tables {
  std::vector<float> C, S;

  Tables(const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& weight, bool transposed)
      : C(cos.numel()), S(sin.numel()) {
    const float *c = data<float>(cos), *s = data<float>(sin), *w = data<float>(weight);
    const int64_t width = cos.size(1);
    for (int64_t at = 0; at < cos.numel(); at += width) {
      for (int64_t i = 0; i < width; i += 2) {
        const float even = w ? w[i] : 1.0f, odd = w ? w[i + 1] : 1.0f;
        C[at + i] = c[at + i] * even;
        C[at + i + 1] = c[at + i + 1] * odd;
        S[at + i] = (transposed ? s[at + i + 1] : -s[at + i]) * odd;
        S[at + i + 1] = (transposed ? -s[at + i] : s[at + i + 1]) * even;
      }
    }
  }
};

void check_tables(const Tensor& like, const Tensor& cos, const Tensor& sin) {
  check_element(like, "q");
  STD_TORCH_CHECK(like.dim() == 4 && like.size(3) % 2 == 0, "q must be (B, H, N, K) with K even");
  for (const Tensor* table : {&cos, &sin}) {
    check_float(*table, "cos or sin");
    STD_TORCH_CHECK(
        table->dim() == 2 && table->size(0) == like.size(2) && table->size(1) == like.size(3),
        "cos and sin must be (N, K) for q (B, H, N, K)");
  }
}

void check_weight(const std::optional<Tensor>& weight, int64_t width) {
  if (!weight) return;
  check_float(*weight, "q_weight or k_weight");
  STD_TORCH_CHECK(weight->numel() == width, "q_weight and k_weight must have the head width of q");
}

// What the two backward ops share. `to` holds a token's gradients q, k (and v) beside each other or apart.
struct Backward {
  Tensor cos, sin;
  std::optional<Tensor> weights[2], inputs[2], bias;
  Tensor gradients[2];
  Shape shape;
  double eps;

  Backward(
      const Tensor& dq, const Tensor& dk, const std::optional<Tensor>& q, const std::optional<Tensor>& k,
      const Tensor& cos_in, const Tensor& sin_in, const std::optional<Tensor>& q_weight,
      const std::optional<Tensor>& k_weight, double eps_in)
      : cos(cos_in), sin(sin_in), weights{contiguous(q_weight), contiguous(k_weight)}, inputs{q, k},
        gradients{dq, dk}, shape((check_tables(dq, cos, sin), dq)), eps(eps_in) {
    check_like(dk, dq, "dk");
    cos = torch::stable::contiguous(cos);
    sin = torch::stable::contiguous(sin);
    for (int i = 0; i < 2; ++i) {
      gradients[i] = with_unit_stride(gradients[i]);
      check_weight(weights[i], shape.width);
      if (!weights[i]) continue;
      STD_TORCH_CHECK(inputs[i], "the backward pass of the norm needs the inputs of rope");
      check_like(*inputs[i], dq, "q or k");
      inputs[i] = with_unit_stride(*inputs[i]);
    }
  }

  // Token t of dq goes to to_q + t * stride; dk and, where there is one, dv likewise.
  // Returns the gradients of the weights and of the bias.
  template <class T>
  std::tuple<Tensor, Tensor, Tensor> run(T* to_q, T* to_k, T* to_v, int64_t stride, const Tensor* dv) const {
    const Tables tables(cos, sin, std::nullopt, true);
    const int64_t width = shape.width;
    const View<T> from[2] = {gradients[0], gradients[1]};
    const View<T> x[2] = {inputs[0] ? *inputs[0] : gradients[0], inputs[1] ? *inputs[1] : gradients[1]};
    const View<T> value = dv ? *dv : gradients[0];
    T* const to[3] = {to_q, to_k, to_v};
    const float* b = data<float>(bias);
    const int64_t row = shape.row();
    std::vector<float> bias_sums(b ? shape.chunks() * 3 * row : 0);
    const float* w[2] = {data<float>(weights[0]), data<float>(weights[1])};
    const bool any_norm = w[0] || w[1];
    std::vector<float> sums(any_norm ? shape.chunks() * 2 * width : 0);

    shape.each_chunk([&](int64_t chunk, int64_t first, int64_t end) {
      std::vector<float> dt(any_norm ? width : 0);
      for (int64_t token = first; token < end; ++token) {
        const float* C = tables.C.data() + token % shape.tokens * width;
        const float* S = tables.S.data() + token % shape.tokens * width;
        for (int i = 0; i < 2; ++i) {
          T* dx = to[i] + token * stride;
          if (w[i]) {
            VADIT_CALL(
                rotate_norm_backward<T>, dx, from[i].token(token), from[i].stride_h, x[i].token(token),
                b ? b + i * row : nullptr, x[i].stride_h, shape.heads, width, C, S, w[i], dt.data(),
                sums.data() + (chunk * 2 + i) * width, eps);
          } else {
            VADIT_CALL(
                rotate<T>, dx, from[i].token(token), nullptr, from[i].stride_h, shape.heads, width, C, S, false, 0.0f);
          }
        }
        for (int64_t head = 0; dv && head < shape.heads; ++head) {
          std::copy_n(value.token(token) + head * value.stride_h, width, to_v + token * stride + head * width);
        }
        for (int i = 0; b && i < 3; ++i) {
          VADIT_CALL(add_to_sums<T>, bias_sums.data() + (chunk * 3 + i) * row, to[i] + token * stride, row);
        }
      }
    });

    Tensor dweights[2];
    for (int i = 0; i < 2; ++i) {
      dweights[i] = torch::stable::new_zeros(cos, {w[i] ? width : 0});
      float* dw = mutable_data<float>(dweights[i]);
      for (int64_t chunk = 0; w[i] && chunk < shape.chunks(); ++chunk) {
        for (int64_t j = 0; j < width; ++j) dw[j] += sums[(chunk * 2 + i) * width + j];
      }
    }
    Tensor dbias = torch::stable::new_zeros(cos, {b ? 3 * row : 0});
    float* db = mutable_data<float>(dbias);
    for (int64_t chunk = 0; b && chunk < shape.chunks(); ++chunk) {
      for (int64_t j = 0; j < 3 * row; ++j) db[j] += bias_sums[chunk * 3 * row + j];
    }
    return {dweights[0], dweights[1], dbias};
  }
};

// (B, H, N, K) that lies in memory as (B, N, H, K).
Tensor token_major(const Tensor& like, const Shape& shape) {
  const Tensor t = new_large(like, {shape.batch, shape.tokens, shape.heads, shape.width});
  return torch::stable::transpose(t, 1, 2);
}

void check_bias(const std::optional<Tensor>& bias, const Shape& shape) {
  if (!bias) return;
  check_float(*bias, "bias");
  STD_TORCH_CHECK(bias->numel() == 3 * shape.row(), "bias must have three times the heads and width of q");
}

// q and k rotated, and with a bias v with its part of it.
std::tuple<Tensor, Tensor, Tensor> forward_all(
    const Tensor& q_in, const Tensor& k_in, const std::optional<Tensor>& v_in, const std::optional<Tensor>& bias_in,
    const Tensor& cos_in, const Tensor& sin_in, const std::optional<Tensor>& q_weight,
    const std::optional<Tensor>& k_weight, double eps) {
  check_tables(q_in, cos_in, sin_in);
  check_like(k_in, q_in, "k");
  const Shape shape(q_in);
  check_weight(q_weight, shape.width);
  check_weight(k_weight, shape.width);
  check_bias(bias_in, shape);
  if (v_in) check_like(*v_in, q_in, "v");
  const std::optional<Tensor> bias = contiguous(bias_in);
  const Tensor inputs[3] = {with_unit_stride(q_in), with_unit_stride(k_in), with_unit_stride(v_in ? *v_in : q_in)};
  const Tensor cos = torch::stable::contiguous(cos_in), sin = torch::stable::contiguous(sin_in);
  const std::optional<Tensor> weights[2] = {contiguous(q_weight), contiguous(k_weight)};
  const Tables tables[2] = {{cos, sin, weights[0], false}, {cos, sin, weights[1], false}};
  Tensor results[3] = {token_major(q_in, shape), token_major(k_in, shape), q_in};
  if (v_in) results[2] = token_major(q_in, shape);
  with_element(q_in, [&](auto element) {
    using T = decltype(element);
    const View<T> from[3] = {inputs[0], inputs[1], inputs[2]};
    T* const to[3] = {
        mutable_data<T>(results[0]), mutable_data<T>(results[1]), v_in ? mutable_data<T>(results[2]) : nullptr};
    const float* b = data<float>(bias);
    shape.each_chunk([&](int64_t, int64_t first, int64_t end) {
      for (int64_t token = first; token < end; ++token) {
        const int64_t row = token % shape.tokens * shape.width;
        for (int i = 0; i < 2; ++i) {
          VADIT_CALL(
              rotate<T>, to[i] + token * shape.row(), from[i].token(token), b ? b + i * shape.row() : nullptr,
              from[i].stride_h, shape.heads, shape.width, tables[i].C.data() + row, tables[i].S.data() + row,
              weights[i].has_value(), eps);
        }
        if (to[2]) {
          VADIT_CALL(
              add_bias<T>, to[2] + token * shape.row(), from[2].token(token), b + 2 * shape.row(), from[2].stride_h,
              shape.heads, shape.width);
        }
      }
    });
  });
  return {results[0], results[1], results[2]};
}

}  // namespace

std::tuple<Tensor, Tensor> rope(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& q_weight,
    const std::optional<Tensor>& k_weight, double eps) {
  const auto results = forward_all(q, k, std::nullopt, std::nullopt, cos, sin, q_weight, k_weight, eps);
  return {std::get<0>(results), std::get<1>(results)};
}

std::tuple<Tensor, Tensor, Tensor> rope_qkv(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& cos, const Tensor& sin,
    const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, double eps) {
  return forward_all(q, k, v, bias, cos, sin, q_weight, k_weight, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_backward(
    const Tensor& dq, const Tensor& dk, const std::optional<Tensor>& q, const std::optional<Tensor>& k,
    const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
    double eps) {
  const Backward backward(dq, dk, q, k, cos, sin, q_weight, k_weight, eps);
  Tensor dq_in = token_major(dq, backward.shape), dk_in = token_major(dk, backward.shape);
  std::tuple<Tensor, Tensor, Tensor> dweights;
  with_element(dq, [&](auto element) {
    using T = decltype(element);
    dweights = backward.run<T>(
        mutable_data<T>(dq_in), mutable_data<T>(dk_in), nullptr, backward.shape.row(), nullptr);
  });
  return {dq_in, dk_in, std::get<0>(dweights), std::get<1>(dweights)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_qkv_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv_in, const std::optional<Tensor>& q,
    const std::optional<Tensor>& k, const std::optional<Tensor>& bias, const Tensor& cos, const Tensor& sin,
    const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, double eps) {
  Backward backward(dq, dk, q, k, cos, sin, q_weight, k_weight, eps);
  check_bias(bias, backward.shape);
  backward.bias = contiguous(bias);
  check_like(dv_in, dq, "dv");
  const Tensor dv = with_unit_stride(dv_in);
  const Shape& shape = backward.shape;
  Tensor dqkv = new_large(dq, {shape.batch, shape.tokens, 3, shape.heads, shape.width});
  std::tuple<Tensor, Tensor, Tensor> dweights;
  with_element(dq, [&](auto element) {
    using T = decltype(element);
    T* to = mutable_data<T>(dqkv);
    dweights = backward.run<T>(to, to + shape.row(), to + 2 * shape.row(), 3 * shape.row(), &dv);
  });
  return {dqkv, std::get<0>(dweights), std::get<1>(dweights), std::get<2>(dweights)};
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
  m.impl("rope_qkv", TORCH_BOX(&rope_qkv));
  m.impl("rope_qkv_backward", TORCH_BOX(&rope_qkv_backward));
}

}  // namespace vadit

#endif

// The ops under the key CUDA: checks what would otherwise be read out of bounds, allocates, and calls the launchers on
// the tensors' device and torch's current stream. kernels/ops holds the shapes, gradients and friendlier checks.

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "launch.h"

// The handle of a stream comes from one of two places: libtorch_cpu since torch 2.13, libtorch_cuda before. Weak, so
// that the library loads with either, and with a torch without CUDA.
extern "C" {
__attribute__((weak, visibility("default"))) AOTITorchError torch_stream_native_handle(StreamHandle, void**);
__attribute__((weak, visibility("default"))) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
}

namespace vadit::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef VADIT_EMULATED
struct Target {
  explicit Target(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
// Where the kernels of one call run. The device is the current one as long as this lives.
class Target {
 public:
  explicit Target(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {}

  void* stream() const {
    void* handle = nullptr;
    if (torch_stream_native_handle != nullptr) {
      StreamHandle opaque = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device_, &opaque));
      const torch::stable::accelerator::Stream stream(opaque);  // deletes it at the end
      STABLE_TORCH_ERROR_CODE_CHECK(torch_stream_native_handle(opaque, &handle));
    } else {
      STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch names no current CUDA stream");
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &handle));
    }
    return handle;
  }

 private:
  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

Type type_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be a float32 or bfloat16 tensor");
  return type == ScalarType::Float ? Type::kFloat32 : Type::kBFloat16;
}

void check_device(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
      " must lie on the same device as the first tensor");
}

// t, contiguous; it must be float32 with `elements` elements.
Tensor float_like(const Tensor& t, const Tensor& like, int64_t elements, const char* name) {
  check_device(t, like, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be a float32 tensor");
  STD_TORCH_CHECK(t.numel() == elements, name, " must have ", elements, " elements, not ", t.numel());
  return torch::stable::contiguous(t);
}

OptionalTensor float_like(const OptionalTensor& t, const Tensor& like, int64_t elements, const char* name) {
  return t ? OptionalTensor(float_like(*t, like, elements, name)) : std::nullopt;
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
const float* floats(const OptionalTensor& t) { return t ? floats(*t) : nullptr; }
float* mutable_floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor new_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}
Tensor zero_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_zeros(like, sizes, ScalarType::Float);
}

void check_same(const Tensor& t, const Tensor& like, const char* name) {
  check_device(t, like, name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.dim() == like.dim(), name, " must match dtype and axes");
  for (int64_t axis = 0; axis < t.dim(); ++axis)
    STD_TORCH_CHECK(t.size(axis) == like.size(axis), name, " must have the shape of its counterpart");
}

// --- rms_norm, gated_norm

// What weights the rows of a norm and, with a gate, those of the sum before it; null where there is none.
struct NormWeights {
  OptionalTensor gate, bias, weight, scale, shift;
};

// The shape and the inputs of a norm's passes, checked and contiguous. A gate says that there is a sum.
struct NormCall {
  NormTypes types;
  NormShape shape;
  Tensor x, h;
  NormWeights weights;
  bool gated;

  NormCall(const Tensor& x_in, const Tensor& h_in, Type y, const NormWeights& given)
      : types{type_of(x_in, "x"), y}, shape(shape_of(x_in, given.gate || given.scale || given.shift)),
        x(torch::stable::contiguous(x_in)), h(torch::stable::contiguous(h_in)),
        weights{dense(given.gate, shape.images, "gate"), dense(given.bias, 1, "bias"),
                dense(given.weight, 1, "weight"), dense(given.scale, shape.images, "scale"),
                dense(given.shift, shape.images, "shift")},
        gated(given.gate) {
    STD_TORCH_CHECK(types.x == y || types.x == Type::kFloat32, "y must have the dtype of x, or be narrower");
    if (!gated) return;
    STD_TORCH_CHECK(type_of(h, "h") == y && h.numel() == x.numel(), "h must have the shape of x and the dtype of y");
    check_device(h, x, "h");
  }

  NormInput input(double eps) const {
    return {x.const_data_ptr(), gated ? h.const_data_ptr() : nullptr, row(weights.gate), row(weights.bias),
            row(weights.weight), row(weights.scale), row(weights.shift), static_cast<float>(eps)};
  }

 private:
  static NormShape shape_of(const Tensor& x, bool modulated) {
    STD_TORCH_CHECK(x.dim() > (modulated ? 1 : 0), "x must have an axis of columns, and one of images where modulated");
    const int64_t width = x.size(x.dim() - 1), images = modulated ? x.size(0) : 1;
    return {images, x.numel() > 0 ? x.numel() / width / images : 0, width};
  }

  OptionalTensor dense(const OptionalTensor& t, int64_t rows, const char* name) const {
    if (!t) return t;
    type_of(*t, name);
    check_device(*t, x, name);
    const int64_t elements = rows * shape.width;
    STD_TORCH_CHECK(
        t->numel() == elements && t->dim() > 0 && t->dim() <= 2, name, " must have ", elements, " elements, not ",
        t->numel());
    const int64_t last = t->dim() - 1;
    return t->size(last) <= 1 || t->stride(last) == 1 ? *t : torch::stable::contiguous(*t);
  }

  static Row row(const OptionalTensor& t) {
    if (!t) return {nullptr, Type::kFloat32, 0};
    return {t->const_data_ptr(), type_of(*t, ""), t->dim() == 2 ? t->stride(0) : 0};
  }
};

// The sum (x itself where there is none) and the norm.
std::tuple<Tensor, Tensor> norm_op(
    const Tensor& x, const Tensor& h, ScalarType y_type, const NormWeights& weights, double eps) {
  const NormCall call(x, h, y_type == ScalarType::Float ? Type::kFloat32 : Type::kBFloat16, weights);
  Tensor total = call.gated ? torch::stable::new_empty(call.x, x.sizes()) : call.x;
  Tensor y = torch::stable::new_empty(call.x, x.sizes(), y_type);
  if (x.numel() == 0) return {total, y};
  const Target target(x);
  if (call.gated)
    gated_norm(
        call.types, call.shape, call.input(eps), total.mutable_data_ptr(), y.mutable_data_ptr(), target.stream());
  else
    rms_norm(call.types, call.shape, call.input(eps), y.mutable_data_ptr(), target.stream());
  return {total, y};
}

// The gradients of x, h (x's where there is no sum), gate, bias, weight, scale and shift.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward_op(
    const Tensor& dtotal_in, const Tensor& dy_in, const Tensor& x, const Tensor& h, const NormWeights& weights,
    double eps) {
  const NormCall call(x, h, type_of(dy_in, "dy"), weights);
  STD_TORCH_CHECK(dy_in.numel() == x.numel(), "dy must have the shape of x");
  check_device(dy_in, x, "dy");
  check_same(dtotal_in, x, "dsum");
  const Tensor dy = torch::stable::contiguous(dy_in), dtotal = torch::stable::contiguous(dtotal_in);
  Tensor dx = torch::stable::new_empty(call.x, x.sizes());
  Tensor dh = call.gated ? torch::stable::new_empty(call.h, h.sizes()) : dx;
  const bool empty = x.numel() == 0;
  const auto like = [&](const OptionalTensor& t) {
    if (!t) return torch::stable::new_empty(x, {0, call.shape.width});
    return empty ? torch::stable::new_zeros(*t, t->sizes()) : torch::stable::new_empty(*t, t->sizes());
  };
  Tensor dgate = like(weights.gate), dbias = like(weights.bias), dweight = like(weights.weight);
  Tensor dscale = like(weights.scale), dshift = like(weights.shift);
  if (!empty) {
    const Target target(x);
    const NormShape shape = call.shape;
    Tensor partial = new_floats(x, {call.gated ? 4 : 2, shape.images * shape.backward_chunks(), shape.width});
    const auto output = [](Tensor& t, const OptionalTensor& wanted) {
      return Output{wanted ? t.mutable_data_ptr() : nullptr, type_of(t, "")};
    };
    const NormGradients gradients{dx.mutable_data_ptr(),
                                  call.gated ? dh.mutable_data_ptr() : nullptr,
                                  output(dgate, weights.gate),
                                  output(dbias, weights.bias),
                                  output(dweight, weights.weight),
                                  output(dscale, weights.scale),
                                  output(dshift, weights.shift),
                                  mutable_floats(partial)};
    const NormSlopes slopes{dy.const_data_ptr(), call.gated ? dtotal.const_data_ptr() : nullptr};
    const auto backward = call.gated ? gated_norm_backward : rms_norm_backward;
    backward(call.types, shape, call.input(eps), slopes, gradients, target.stream());
  }
  return {dx, dh, dgate, dbias, dweight, dscale, dshift};
}

Tensor rms_norm_op(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift, bool narrow,
    double eps) {
  const ScalarType type = narrow ? ScalarType::BFloat16 : x.scalar_type();
  return std::get<1>(norm_op(x, x, type, {{}, {}, weight, scale, shift}, eps));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_backward_op(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
    double eps) {
  const auto found = norm_backward_op(x, dy, x, x, {{}, {}, weight, scale, shift}, eps);
  return {std::get<0>(found), std::get<4>(found), std::get<5>(found), std::get<6>(found)};
}

std::tuple<Tensor, Tensor> gated_norm_op(
    const Tensor& x, const Tensor& h, const Tensor& gate, const OptionalTensor& bias, const Tensor& weight,
    const OptionalTensor& scale, const OptionalTensor& shift, double eps) {
  return norm_op(x, h, h.scalar_type(), {gate, bias, weight, scale, shift}, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_norm_backward_op(
    const Tensor& dsum, const Tensor& dy, const Tensor& sum, const Tensor& h, const Tensor& gate,
    const OptionalTensor& bias, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
    double eps) {
  return norm_backward_op(dsum, dy, sum, h, {gate, bias, weight, scale, shift}, eps);
}

// --- swiglu

int64_t half_width(const Tensor& x12) {
  STD_TORCH_CHECK(x12.dim() > 0 && x12.size(x12.dim() - 1) % 2 == 0, "x12 must have an even last axis");
  return x12.size(x12.dim() - 1) / 2;
}

Tensor swiglu_op(const Tensor& x12_in, const OptionalTensor& bias_in) {
  const Type type = type_of(x12_in, "x12");
  const int64_t width = half_width(x12_in);
  const Tensor x12 = torch::stable::contiguous(x12_in);
  const OptionalTensor bias = float_like(bias_in, x12, 2 * width, "bias");
  std::vector<int64_t> sizes(x12.sizes().begin(), x12.sizes().end());
  sizes.back() = width;
  Tensor y = torch::stable::new_empty(x12, sizes);
  if (y.numel() == 0) return y;
  const Target target(x12);
  const void* data = x12.const_data_ptr();
  swiglu(type, y.numel() / width, width, data, floats(bias), y.mutable_data_ptr(), target.stream());
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward_op(
    const Tensor& dy_in, const Tensor& x12_in, const OptionalTensor& bias_in) {
  const Type type = type_of(x12_in, "x12");
  const int64_t width = half_width(x12_in);
  check_device(dy_in, x12_in, "dy");
  STD_TORCH_CHECK(
      dy_in.scalar_type() == x12_in.scalar_type() && dy_in.numel() * 2 == x12_in.numel(),
      "dy must have the dtype and half the elements of x12");
  const Tensor dy = torch::stable::contiguous(dy_in), x12 = torch::stable::contiguous(x12_in);
  const OptionalTensor bias = float_like(bias_in, x12, 2 * width, "bias");
  Tensor dx12 = torch::stable::new_empty(x12, x12.sizes());
  const std::vector<int64_t> sizes = {bias ? 2 * width : 0};
  if (dy.numel() == 0) return {dx12, zero_floats(x12, sizes)};
  const Target target(x12);
  const int64_t rows = dy.numel() / width;
  Tensor dbias = new_floats(x12, sizes), partial = new_floats(x12, {swiglu_partial_rows(rows), sizes[0]});
  swiglu_backward(
      type, rows, width, dy.const_data_ptr(), x12.const_data_ptr(), floats(bias), dx12.mutable_data_ptr(),
      mutable_floats(dbias), mutable_floats(partial), target.stream());
  return {dx12, dbias};
}

// --- group_norm_silu

GroupShape group_shape(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be (B, N, C)");
  STD_TORCH_CHECK(groups > 0 && x.size(2) % groups == 0, "the groups must divide the channels of x");
  return GroupShape(x.size(0), x.size(1), x.size(2), groups);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_op(
    const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, int64_t groups, double eps, bool silu) {
  const Type type = type_of(x_in, "x");
  const GroupShape shape = group_shape(x_in, groups);
  const Tensor x = torch::stable::contiguous(x_in), weight = float_like(weight_in, x, shape.width, "weight");
  const Tensor bias = float_like(bias_in, x, shape.width, "bias");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor mean = zero_floats(x, {shape.images, groups}), rstd = zero_floats(x, {shape.images, groups});
  if (x.numel() == 0) return {y, mean, rstd};
  const Target target(x);
  Tensor partial = new_floats(x, {shape.images * shape.chunks, 2, shape.width});
  const GroupInput input{x.const_data_ptr(), floats(weight), floats(bias), floats(mean), floats(rstd), silu};
  group_norm_silu(
      type, shape, input, static_cast<float>(eps), mutable_floats(mean), mutable_floats(rstd), mutable_floats(partial),
      y.mutable_data_ptr(), target.stream());
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_op(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, const Tensor& mean_in,
    const Tensor& rstd_in, bool silu) {
  const Type type = type_of(x_in, "x");
  check_same(dy_in, x_in, "dy");
  STD_TORCH_CHECK(mean_in.dim() == 2, "mean must be (B, G)");
  const GroupShape shape = group_shape(x_in, mean_in.size(1));
  const Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
  const Tensor weight = float_like(weight_in, x, shape.width, "weight");
  const Tensor bias = float_like(bias_in, x, shape.width, "bias");
  const Tensor mean = float_like(mean_in, x, shape.images * shape.groups, "mean");
  const Tensor rstd = float_like(rstd_in, x, shape.images * shape.groups, "rstd");
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = zero_floats(x, {shape.width}), dbias = zero_floats(x, {shape.width});
  if (x.numel() == 0) return {dx, dweight, dbias};
  const Target target(x);
  Tensor partial = new_floats(x, {shape.images * shape.chunks, 2, shape.width});
  Tensor totals = new_floats(x, {2, shape.images, shape.width}), means = new_floats(x, {2, shape.images, shape.groups});
  const GroupInput input{x.const_data_ptr(), floats(weight), floats(bias), floats(mean), floats(rstd), silu};
  const GroupGradients gradients{
      dx.mutable_data_ptr(),   mutable_floats(dweight), mutable_floats(dbias),
      mutable_floats(partial), mutable_floats(totals),  mutable_floats(means)};
  group_norm_silu_backward(type, shape, input, dy.const_data_ptr(), gradients, target.stream());
  return {dx, dweight, dbias};
}

// --- rope

// The stride of an axis with one member is any number: 0 says that it does not matter.
int64_t stride_of(const Tensor& t, int64_t axis) { return t.size(axis) > 1 ? t.stride(axis) : 0; }

Tensor with_dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

Heads heads_of(const Tensor& t) {
  return {t.const_data_ptr(), {stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)}};
}
MutableHeads mutable_heads_of(Tensor& t) {
  return {t.mutable_data_ptr(), {stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)}};
}

// A (B, H, N, K) tensor that lies in memory as (B, N, H, K), which is what the matrix product after it wants.
Tensor new_heads(const Tensor& like, HeadShape s) {
  return torch::stable::transpose(
      torch::stable::new_empty(like, std::vector<int64_t>{s.batch, s.tokens, s.heads, s.width}), 1, 2);
}

// What the passes of rope share: shapes and small tensors, checked and contiguous.
struct RopeCall {
  Type type;
  HeadShape shape;
  Tensor cos, sin;
  OptionalTensor weight[2];
  float eps;

  RopeCall(
      const Tensor& q, const Tensor& k, const Tensor& cos_in, const Tensor& sin_in, const OptionalTensor& q_weight,
      const OptionalTensor& k_weight, double eps_in)
      : type(type_of(q, "q")), shape(checked(q, k)), cos(float_like(cos_in, q, shape.tokens * shape.width, "cos")),
        sin(float_like(sin_in, q, shape.tokens * shape.width, "sin")),
        weight{float_like(q_weight, q, shape.width, "q_weight"), float_like(k_weight, q, shape.width, "k_weight")},
        eps(static_cast<float>(eps_in)) {}

  static HeadShape checked(const Tensor& q, const Tensor& k) {
    STD_TORCH_CHECK(q.dim() == 4 && q.size(3) % 2 == 0, "q must be (B, H, N, K) with K even");
    check_same(k, q, "k");
    return {q.size(0), q.size(1), q.size(2), q.size(3)};
  }

  bool empty() const { return shape.rows() * shape.heads * shape.width == 0; }
  RopeTables tables() const { return {floats(cos), floats(sin), eps}; }
};

// q and k rotated, and with a bias v with its part of it.
std::tuple<Tensor, Tensor, Tensor> rope_forward(
    const Tensor& q_in, const Tensor& k_in, const OptionalTensor& v_in, const OptionalTensor& bias_in,
    const Tensor& cos, const Tensor& sin, const OptionalTensor& q_weight, const OptionalTensor& k_weight, double eps) {
  const RopeCall call(q_in, k_in, cos, sin, q_weight, k_weight, eps);
  const Tensor q = with_dense_rows(q_in), k = with_dense_rows(k_in);
  const OptionalTensor bias = float_like(bias_in, q, 3 * call.shape.heads * call.shape.width, "bias");
  OptionalTensor v;
  if (v_in) check_same(*v_in, q_in, "v"), v = with_dense_rows(*v_in);
  Tensor q_out = new_heads(q, call.shape), k_out = new_heads(q, call.shape), v_out = v ? new_heads(q, call.shape) : q;
  if (call.empty()) return {q_out, k_out, v_out};
  const Target target(q);
  RopeInput input{{heads_of(q), heads_of(k)}, {floats(call.weight[0]), floats(call.weight[1])}, floats(bias)};
  MutableHeads out[3] = {mutable_heads_of(q_out), mutable_heads_of(k_out)};
  if (v) input.in[2] = heads_of(*v), out[2] = mutable_heads_of(v_out);
  rope(call.type, call.shape, input, call.tables(), out, target.stream());
  return {q_out, k_out, v_out};
}

std::tuple<Tensor, Tensor> rope_op(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const OptionalTensor& q_weight,
    const OptionalTensor& k_weight, double eps) {
  const auto results = rope_forward(q, k, std::nullopt, std::nullopt, cos, sin, q_weight, k_weight, eps);
  return {std::get<0>(results), std::get<1>(results)};
}

std::tuple<Tensor, Tensor, Tensor> rope_qkv_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& cos, const Tensor& sin,
    const OptionalTensor& q_weight, const OptionalTensor& k_weight, double eps) {
  return rope_forward(q, k, v, bias, cos, sin, q_weight, k_weight, eps);
}

// Fills the gradients of q and k, and of v where it is given; returns those of the weights and of the bias.
std::tuple<Tensor, Tensor, Tensor> rope_backward_into(
    MutableHeads q_out, MutableHeads k_out, MutableHeads v_out, const Tensor& dq_in, const Tensor& dk_in,
    const Tensor* dv_in, const OptionalTensor& q_in, const OptionalTensor& k_in, const OptionalTensor& bias_in,
    const RopeCall& call) {
  const int64_t row = 3 * call.shape.heads * call.shape.width;
  const OptionalTensor* inputs[2] = {&q_in, &k_in};
  const OptionalTensor bias = float_like(bias_in, dq_in, row, "bias");
  OptionalTensor kept[2];
  RopeInput input{{}, {floats(call.weight[0]), floats(call.weight[1])}, floats(bias)};
  Tensor sums[3];  // the gradients of the weights and of the bias
  for (int part = 0; part < 3; ++part) {
    const bool wanted = part < 2 ? input.weight[part] != nullptr : input.bias != nullptr;
    const std::vector<int64_t> sizes = {!wanted ? 0 : part < 2 ? call.shape.width : row};
    sums[part] = call.empty() ? zero_floats(dq_in, sizes) : new_floats(dq_in, sizes);
    if (part == 2 || !wanted) continue;
    STD_TORCH_CHECK(inputs[part]->has_value(), "q and k are needed where their weight is given");
    check_same(**inputs[part], dq_in, "q or k");
    kept[part] = with_dense_rows(**inputs[part]);
    input.in[part] = heads_of(*kept[part]);
  }
  if (call.empty()) return {sums[0], sums[1], sums[2]};
  const Target target(dq_in);
  const int64_t rows = rope_partial_rows(call.shape);
  const bool normed = input.weight[0] || input.weight[1];
  Tensor weight_sums = new_floats(dq_in, {normed ? rows * call.shape.heads : 0, 2, call.shape.width});
  Tensor bias_sums = new_floats(dq_in, {bias ? rows : 0, row});
  const Tensor dq = with_dense_rows(dq_in), dk = with_dense_rows(dk_in);
  OptionalTensor dv;
  if (dv_in) dv = with_dense_rows(*dv_in);
  RopeGradients gradients{
      {heads_of(dq), heads_of(dk)}, {q_out, k_out, v_out}, {mutable_floats(sums[0]), mutable_floats(sums[1])},
      mutable_floats(sums[2]), mutable_floats(weight_sums), mutable_floats(bias_sums)};
  if (dv) gradients.dy[2] = heads_of(*dv);
  rope_backward(call.type, call.shape, input, call.tables(), gradients, target.stream());
  return {sums[0], sums[1], sums[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_backward_op(
    const Tensor& dq, const Tensor& dk, const OptionalTensor& q, const OptionalTensor& k, const Tensor& cos,
    const Tensor& sin, const OptionalTensor& q_weight, const OptionalTensor& k_weight, double eps) {
  const RopeCall call(dq, dk, cos, sin, q_weight, k_weight, eps);
  Tensor dq_out = new_heads(dq, call.shape), dk_out = new_heads(dq, call.shape);
  const auto [dq_weight, dk_weight, none] = rope_backward_into(
      mutable_heads_of(dq_out), mutable_heads_of(dk_out), {}, dq, dk, nullptr, q, k, std::nullopt, call);
  return {dq_out, dk_out, dq_weight, dk_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_qkv_backward_op(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const OptionalTensor& q, const OptionalTensor& k,
    const OptionalTensor& bias, const Tensor& cos, const Tensor& sin, const OptionalTensor& q_weight,
    const OptionalTensor& k_weight, double eps) {
  const RopeCall call(dq, dk, cos, sin, q_weight, k_weight, eps);
  check_same(dv, dq, "dv");
  const HeadShape s = call.shape;
  Tensor dqkv = torch::stable::new_empty(dq, std::vector<int64_t>{s.batch, s.tokens, 3, s.heads, s.width});
  char* data = static_cast<char*>(dqkv.mutable_data_ptr());
  const auto part = [&](int64_t index) {
    const int64_t row = s.heads * s.width;
    return MutableHeads{
        data + index * row * static_cast<int64_t>(dqkv.element_size()), {s.tokens * 3 * row, s.width, 3 * row}};
  };
  const auto [dq_weight, dk_weight, dbias] =
      rope_backward_into(part(0), part(1), part(2), dq, dk, &dv, q, k, bias, call);
  return {dqkv, dq_weight, dk_weight, dbias};
}

// --- vf_loss

FeatureShape feature_shape(const Tensor& t) {
  return {t.size(0), t.size(1), t.size(2), stride_of(t, 0), stride_of(t, 1)};
}

std::tuple<Tensor, Tensor> vf_gram_op(const Tensor& features_in) {
  const Type type = type_of(features_in, "features");
  STD_TORCH_CHECK(features_in.dim() == 3, "features must be (B, D, N)");
  const Tensor features = with_dense_rows(features_in);
  const FeatureShape shape = feature_shape(features);
  Tensor cosines = new_floats(features, {shape.batch, shape.positions, shape.positions});
  Tensor inverse_norm = new_floats(features, {shape.batch, shape.positions});
  if (cosines.numel() == 0) return {cosines, inverse_norm};
  const Target target(features);
  vf_gram(
      type, shape, features.const_data_ptr(), mutable_floats(cosines), mutable_floats(inverse_norm), target.stream());
  return {cosines, inverse_norm};
}

std::tuple<Tensor, Tensor> vf_distmat_op(
    const Tensor& u_in, const Tensor& v_in, const Tensor& cosines_in, double margin) {
  STD_TORCH_CHECK(u_in.dim() == 3 && u_in.scalar_type() == ScalarType::Float, "u must be a float32 (B, d, N) tensor");
  check_same(v_in, u_in, "v");
  const Tensor u = with_dense_rows(u_in), v = with_dense_rows(v_in);
  const FeatureShape shape = feature_shape(u);
  const Tensor cosines = float_like(cosines_in, u, shape.batch * shape.positions * shape.positions, "cosines");
  Tensor loss = new_floats(u, {});
  Tensor sign = torch::stable::new_empty(
      u, std::vector<int64_t>{shape.batch, shape.positions, shape.positions}, ScalarType::Char);
  const Target target(u);
  Tensor partial = new_floats(u, {gram_tiles(shape.batch, shape.positions)});
  vf_distmat(
      shape, floats(u), feature_shape(v), floats(v), floats(cosines), static_cast<float>(margin),
      mutable_floats(partial), mutable_floats(loss), static_cast<int8_t*>(sign.mutable_data_ptr()), target.stream());
  return {loss, sign};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vadit, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_op));
  m.impl("gated_norm", TORCH_BOX(&gated_norm_op));
  m.impl("gated_norm_backward", TORCH_BOX(&gated_norm_backward_op));
  m.impl("swiglu", TORCH_BOX(&swiglu_op));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_op));
  m.impl("rope", TORCH_BOX(&rope_op));
  m.impl("rope_backward", TORCH_BOX(&rope_backward_op));
  m.impl("rope_qkv", TORCH_BOX(&rope_qkv_op));
  m.impl("rope_qkv_backward", TORCH_BOX(&rope_qkv_backward_op));
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_op));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward_op));
  m.impl("vf_gram", TORCH_BOX(&vf_gram_op));
  m.impl("vf_distmat", TORCH_BOX(&vf_distmat_op));
}

}  // namespace vadit::cuda

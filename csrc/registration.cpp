// The op schemas of vadit, and nothing else: csrc/cpu and csrc/cuda hold the kernels, kernels/ops the shapes, gradients
// and checks.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vadit, m) {
  // averages: those of all weights for the first rate, then for the next; numbers: see kernels/ops/adamw_ema.py
  m.def(
      "adamw_ema(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] averages, Tensor(e!)[] copies, Tensor? scale, float[] rates, float[] numbers) -> ()");
  // narrow: the result is bfloat16, whatever x is.
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, bool narrow, float eps) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, float eps) "
      "-> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)");
  // y has the dtype of h; the gradients of what is None have no rows.
  m.def(
      "gated_norm(Tensor x, Tensor h, Tensor gate, Tensor? bias, Tensor weight, Tensor? scale, Tensor? shift, "
      "float eps) -> (Tensor sum, Tensor y)");
  m.def(
      "gated_norm_backward(Tensor dsum, Tensor dy, Tensor sum, Tensor h, Tensor gate, Tensor? bias, Tensor weight, "
      "Tensor? scale, Tensor? shift, float eps) -> (Tensor dx, Tensor dh, Tensor dgate, Tensor dbias, "
      "Tensor dweight, Tensor dscale, Tensor dshift)");
  m.def("swiglu(Tensor x12, Tensor? bias) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor x12, Tensor? bias) -> (Tensor dx12, Tensor dbias)");
  m.def(
      "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps) "
      "-> (Tensor, Tensor)");
  // bias is (3, H, K). q and k, the inputs of rope, are needed only where their weight is given; dqkv is (B, N, 3, H, K)
  // and holds dv too.
  m.def(
      "rope_qkv(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor cos, Tensor sin, Tensor? q_weight, "
      "Tensor? k_weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rope_backward(Tensor dq, Tensor dk, Tensor? q, Tensor? k, Tensor cos, Tensor sin, Tensor? q_weight, "
      "Tensor? k_weight, float eps) -> (Tensor dq_in, Tensor dk_in, Tensor dq_weight, Tensor dk_weight)");
  m.def(
      "rope_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? q, Tensor? k, Tensor? bias, Tensor cos, Tensor sin, "
      "Tensor? q_weight, Tensor? k_weight, float eps) "
      "-> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight, Tensor dbias)");
  // x (B, N, C): the pixels of an image in rows, its channels innermost; mean and rstd (B, groups).
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("vf_gram(Tensor features) -> (Tensor cosines, Tensor inverse_norm)");
  m.def("vf_distmat(Tensor u, Tensor v, Tensor cosines, float margin) -> (Tensor loss, Tensor sign)");
}

// The op schemas of vadit, and nothing else: csrc/cpu holds the kernels, kernels/ops the shapes, gradients and checks.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vadit, m) {
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, float eps) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? scale, bool modulated, float eps) "
      "-> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)");
  m.def("swiglu(Tensor x12) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor x12) -> Tensor");
  // transposed: the backward pass, which is the same rotation with the transposed matrix.
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)");
}

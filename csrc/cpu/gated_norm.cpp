// A gated residual sum and its RMSNorm. Formulas and kernels: norm.h.

#include "norm.h"

namespace vadit {

std::tuple<Tensor, Tensor> gated_norm(
    const Tensor& x, const Tensor& h, const Tensor& gate, const std::optional<Tensor>& bias, const Tensor& weight,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, double eps) {
  return norm<true>(x, h, {gate, bias, weight, scale, shift}, h.scalar_type(), eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_norm_backward(
    const Tensor& dsum, const Tensor& dy, const Tensor& sum, const Tensor& h, const Tensor& gate,
    const std::optional<Tensor>& bias, const Tensor& weight, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, double eps) {
  return norm_backward<true>(dsum, dy, sum, h, {gate, bias, weight, scale, shift}, eps);
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("gated_norm", TORCH_BOX(&gated_norm));
  m.impl("gated_norm_backward", TORCH_BOX(&gated_norm_backward));
}

}  // namespace vadit

// RMSNorm with modulation. Formulas and kernels: norm.h.

#include "norm.h"

namespace vadit {

Tensor rms_norm(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    bool narrow, double eps) {
  const ScalarType type = narrow ? ScalarType::BFloat16 : x.scalar_type();
  return std::get<1>(norm<false>(x, {}, {{}, {}, weight, scale, shift}, type, eps));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, double eps) {
  const auto [dx, dh, dgate, dbias, dweight, dscale, dshift] =
      norm_backward<false>({}, dy, x, {}, {{}, {}, weight, scale, shift}, eps);
  return {dx, dweight, dscale, dshift};
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace vadit

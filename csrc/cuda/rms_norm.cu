// RMSNorm with modulation. Formulas and kernels: norm.cuh.

#include "norm.cuh"

namespace vadit::cuda {

void rms_norm(NormTypes types, NormShape shape, NormInput input, void* y, void* stream) {
  norm<false>("rms_norm", types, shape, input, nullptr, y, stream);
}

void rms_norm_backward(
    NormTypes types, NormShape shape, NormInput input, NormSlopes slopes, NormGradients gradients, void* stream) {
  norm_backward<false>("rms_norm_backward", types, shape, input, slopes, gradients, stream);
}

}  // namespace vadit::cuda

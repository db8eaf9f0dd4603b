// A gated residual sum and its RMSNorm. Formulas and kernels: norm.cuh.

#include "norm.cuh"

namespace vadit::cuda {

void gated_norm(NormTypes types, NormShape shape, NormInput input, void* total, void* y, void* stream) {
  norm<true>("gated_norm", types, shape, input, total, y, stream);
}

void gated_norm_backward(
    NormTypes types, NormShape shape, NormInput input, NormSlopes slopes, NormGradients gradients, void* stream) {
  norm_backward<true>("gated_norm_backward", types, shape, input, slopes, gradients, stream);
}

}  // namespace vadit::cuda

// AdamW, clipping, averages and bf16 copies in one pass; the formula stands in kernels/ops/adamw_ema.py.
// Bytes moved per weight: gradient 4 (bfloat16: 2), weight, both moments and each average 8, copy 2.

#ifdef VADIT_ISA

namespace vadit::VADIT_ISA {
namespace {

VADIT_INLINE Vec root(Vec a) {
#if VADIT_LANES == 8
  return _mm256_sqrt_ps(a);
#elif VADIT_LANES == 16
  return _mm512_maskz_sqrt_ps(0xffff, a);
#else
  for (int64_t i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

template <class G>
void step(const OneWeight<G>& of, const AdamNumbers& by, int64_t begin, int64_t end) {
  each_vector(begin, end, [&](int64_t i, int64_t n) VADIT_LAMBDA {
    const Vec g = load(of.grad + i, n) * by.scale;
    Vec m = load(of.exp_avg + i, n);
    m += (g - m) * by.new_share1;
    const Vec v = load(of.exp_avg_sq + i, n) * by.beta2 + g * g * by.new_share2;
    const Vec w = load(of.weight + i, n) * by.kept - by.rate * m / (root(v) * by.inverse_root + by.eps);
    store(of.exp_avg + i, m, n);
    store(of.exp_avg_sq + i, v, n);
    store(of.weight + i, w, n);
    for (int64_t k = 0; k < of.num_averages; ++k) {
      const Vec a = load(of.averages[k] + i, n);
      // from the nearer end, as torch's lerp does: a share of 1 gives the weight itself
      store(of.averages[k] + i, of.shares[k] < 0.5f ? a + (w - a) * of.shares[k] : w - (w - a) * (1 - of.shares[k]), n);
    }
    if (of.copy) store(of.copy + i, w, n);
  });
}

}  // namespace
}  // namespace vadit::VADIT_ISA

#else

#include <vector>

#include <torch/csrc/stable/library.h>

namespace vadit {
namespace {

// Where one weight and what follows it lie.
template <class G>
struct OneWeight {
  float* weight;
  const G* grad;
  float *exp_avg, *exp_avg_sq;
  float* const* averages;
  const float* shares;
  int64_t num_averages;
  uint16_t* copy;
};

struct AdamNumbers {
  float scale, kept, new_share1, beta2, new_share2, rate, inverse_root, eps;
};

}  // namespace
}  // namespace vadit

#define VADIT_KERNELS "adamw_ema.cpp"
#include "vec.h"

namespace vadit {

void adamw_ema(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> averages, std::vector<Tensor> copies,
    std::optional<Tensor> scale, std::vector<double> rates, std::vector<double> numbers) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(
      grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
          averages.size() == count * rates.size() && (copies.empty() || copies.size() == count) && numbers.size() == 7,
      "every list must have a tensor for each weight");
  if (scale) check_float(*scale, "scale");
  float by[7];
  for (size_t i = 0; i < 7; ++i) by[i] = static_cast<float>(numbers[i]);
  const AdamNumbers all{scale ? *data<float>(*scale) : 1.0f, by[0], by[1], by[2], by[3], by[4], by[5], by[6]};
  const std::vector<float> shares(rates.begin(), rates.end());
  std::vector<float*> means(rates.size());
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = weights[i].numel();
    const auto state = [&](Tensor& t, const char* name) {
      check_float(t, name);
      STD_TORCH_CHECK(t.numel() == size, name, " has another size than its weight");
      return mutable_data<float>(t);
    };
    for (size_t k = 0; k < means.size(); ++k) means[k] = state(averages[k * count + i], "an average");
    check_element(grads[i], "a gradient");
    STD_TORCH_CHECK(grads[i].numel() == size, "a gradient has another size than its weight");
    uint16_t* copy = nullptr;
    if (!copies.empty()) {
      STD_TORCH_CHECK(
          copies[i].is_cpu() && copies[i].scalar_type() == ScalarType::BFloat16 && copies[i].numel() == size,
          "a copy must be a bfloat16 CPU tensor of its weight's size");
      copy = mutable_data<uint16_t>(copies[i]);
    }
    with_element(grads[i], [&](auto element) {
      using G = decltype(element);
      const OneWeight<G> one{
          state(weights[i], "a weight"), data<G>(grads[i]), state(exp_avgs[i], "exp_avg"),
          state(exp_avg_sqs[i], "exp_avg_sq"), means.data(), shares.data(), static_cast<int64_t>(means.size()), copy};
      torch::stable::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
        VADIT_CALL(step<G>, one, all, begin, end);
      });
    });
  }
}

STABLE_TORCH_LIBRARY_IMPL(vadit, CPU, m) { m.impl("adamw_ema", TORCH_BOX(&adamw_ema)); }

}  // namespace vadit

#endif

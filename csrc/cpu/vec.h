// What the CPU kernels share: run-time choice of the instruction set, eight floats at a time, tensor access.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#define VADIT_INLINE static inline __attribute__((always_inline))

namespace vadit {

using torch::stable::Tensor;

// The kernels' inner functions ("rows") are VADIT_INLINE and are called through run<row>(...), which holds two copies of
// each: for AVX2 + FMA, and for what the compiler targets anyway (SSE2 on x86-64, NEON on ARM). The choice is made by
// what the processor can do; target_clones("arch=haswell") would ask for that very Intel model instead.
#if defined(__x86_64__)
inline bool use_avx2() {
  // VADIT_CPU_BASELINE is for the tests: it runs the other copy on the same machine.
  static const bool answer = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             std::getenv("VADIT_CPU_BASELINE") == nullptr;
  return answer;
}

template <auto& row, class... Args>
__attribute__((target("avx2,fma"), noinline)) void run_avx2(Args... args) {
  row(args...);
}
#endif

template <auto& row, class... Args>
__attribute__((noinline)) void run_baseline(Args... args) {
  row(args...);
}

template <auto& row, class... Args>
void run(Args... args) {
#if defined(__x86_64__)
  if (use_avx2()) return run_avx2<row>(args...);
#endif
  run_baseline<row>(args...);
}

// Elements per task below which another thread does not pay.
constexpr int64_t kGrain = 16384;

VADIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of `width` elements per task.
VADIT_INLINE int64_t row_grain(int64_t width) { return ceil_div(kGrain, width > 0 ? width : 1); }

inline const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* mutable_data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float, name, " must be a float32 CPU tensor");
}

// exp(-|a|), relative error 2 ulp, 0 where the result would be denormal; some finite number for a NaN (callers multiply
// by `a`). No branch, no float-to-int conversion and no std::bit_cast (a call that is not inlined into the AVX2 copy), so that
// a loop around it vectorises.
VADIT_INLINE float exp_minus_abs(float a) {
  const float x = -__builtin_fabsf(a);
  const float lowest = -87.3365f;
  const float clamped = x > lowest ? x : lowest;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = clamped * 1.442695041f + magic;
  const float n = shifted - magic;
  // Cody-Waite: n * log(2) in two parts, exact enough that r keeps all its bits.
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = (__builtin_bit_cast(uint32_t, shifted) - __builtin_bit_cast(uint32_t, magic) + 127u) << 23;
  const float result = p * __builtin_bit_cast(float, exponent);
  return x > lowest ? result : 0.0f;
}

}  // namespace vadit

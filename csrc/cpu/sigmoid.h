// The logistic function in vectors of one instruction set: the pass of an op's file for it includes this (see vec.h).

namespace vadit::VADIT_ISA {
namespace {

constexpr float kLimit = 88.0f;

// Into [-limit, limit]; a NaN stays.
VADIT_INLINE Vec clamp(Vec a, float limit) {
  const Vec high = Vec{} + limit, low = Vec{} - limit;
  a = a > high ? high : a;
  return a < low ? low : a;
}

// exp(-x), kept below 2e38: so 1 - s = exp(-x) s never multiplies an infinity by zero.
// 2 ulp where kExact; else a relative error of 1e-5, far below the rounding to bfloat16.
template <bool kExact>
VADIT_INLINE Vec exp_minus(Vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec a = clamp(-x, kLimit);
  const Vec shifted = a * 1.442695041f + magic;
  const Vec n = shifted - magic;
  Vec p;
  if (kExact) {
    // Cody-Waite: n * log(2) in two parts, exact enough that r keeps all its bits.
    const Vec r = (a - n * 0.693359375f) + n * 2.12194440e-4f;
    p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
  } else {
    const Vec r = a * 1.442695041f - n;  // 2^r, |r| <= 1/2
    p = r * 9.58285e-3f + 5.590643e-2f;
    p = p * r + 2.4024099e-1f;
    p = p * r + 6.9312419e-1f;
    p = p * r + 1.0f;
  }
  return (Vec)((Bits)p + ((Bits)shifted << 23));  // times 2^n
}

// 1 / a for 1 <= a <= 2e38, to about 1 ulp where kExact, else to 1e-6.
template <bool kExact>
VADIT_INLINE Vec inverse(Vec a) {
#if VADIT_LANES == 8
  if (!kExact) {
    const Vec guess = _mm256_rcp_ps(a);
    return guess * (2.0f - a * guess);
  }
#elif VADIT_LANES == 16
  if (!kExact) {
    const Vec guess = _mm512_maskz_rcp14_ps(0xffff, a);
    return guess * (2.0f - a * guess);
  }
#endif
  return 1.0f / a;
}

struct Sigmoid {
  Vec s, one_minus_s;  // 1 - s where s is near 1 would lose its digits
};

template <class T>
VADIT_INLINE Sigmoid sigmoid(Vec x) {
  constexpr bool kExact = sizeof(T) == sizeof(float);
  const Vec e = exp_minus<kExact>(x);
  Vec s = inverse<kExact>(e + 1.0f);
  s = x < -kLimit ? Vec{} : s;  // x s must vanish for any finite x
  return {s, e * s};
}

}  // namespace
}  // namespace vadit::VADIT_ISA

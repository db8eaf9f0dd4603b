// What the CPU kernels share: tensor access, the choice of the instruction set at run time, and vectors of floats.
//
// An op's file x.cpp has two parts. It defines VADIT_KERNELS as its own name and includes this header, which includes
// x.cpp again for each instruction set, with VADIT_ISA naming a namespace and kLanes floats in a vector: these passes
// compile the kernels. The rest of x.cpp, outside VADIT_ISA, checks tensors and calls a kernel by VADIT_CALL.
// (Copies made by templates would not do: GCC splits wide vectors before it inlines a function into an AVX one.)
// Kernels use no function of std: a copy of it with AVX instructions could be linked into the other files.

#ifndef VADIT_CPU_VEC_H
#define VADIT_CPU_VEC_H

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VADIT_X86 1
#endif

#define VADIT_INLINE static inline __attribute__((always_inline))
#define VADIT_LAMBDA __attribute__((always_inline))

namespace vadit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using bfloat16 = uint16_t;  // its bits

enum class Isa { kBaseline, kAvx2, kAvx512 };  // kBaseline: SSE2 on x86-64, NEON on ARM

// The widest that the processor has; VADIT_CPU_ISA=baseline|avx2|avx512 takes a narrower one (for the tests).
inline Isa isa() {
  static const Isa chosen = [] {
#ifdef VADIT_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* wanted = std::getenv("VADIT_CPU_ISA");
    if (wanted && !std::strcmp(wanted, "baseline")) return Isa::kBaseline;
    if (avx512 && !(wanted && !std::strcmp(wanted, "avx2"))) return Isa::kAvx512;
    if (avx2) return Isa::kAvx2;
#endif
    return Isa::kBaseline;
  }();
  return chosen;
}

#ifdef VADIT_X86
#define VADIT_CALL(kernel, ...)                                     \
  (::vadit::isa() == ::vadit::Isa::kAvx512 ? avx512::kernel(__VA_ARGS__) \
   : ::vadit::isa() == ::vadit::Isa::kAvx2 ? avx2::kernel(__VA_ARGS__)   \
                                           : baseline::kernel(__VA_ARGS__))
#else
#define VADIT_CALL(kernel, ...) baseline::kernel(__VA_ARGS__)
#endif

// Elements per task below which another thread does not pay.
constexpr int64_t kGrain = 16384;

VADIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of `width` elements per task.
VADIT_INLINE int64_t row_grain(int64_t width) { return ceil_div(kGrain, width > 0 ? width : 1); }

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name, " must be a float32 CPU tensor");
}

// The tensors whose dtype the kernels are templates of.
inline void check_element(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      t.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16), name,
      " must be a float32 or bfloat16 CPU tensor");
}

inline void check_like(const Tensor& t, const Tensor& other, const char* name) {
  bool same = t.is_cpu() && t.scalar_type() == other.scalar_type() && t.dim() == other.dim();
  for (int64_t axis = 0; same && axis < t.dim(); ++axis) same = t.size(axis) == other.size(axis);
  STD_TORCH_CHECK(same, name, " has another shape or dtype than the op expects");
}

// new_empty, of the element type of `like` where no other is asked for. The C library maps every block from 32 MB on afresh, and taking it page
// by page of 4 KB costs several times what writing it does; so such a block asks for pages of 2 MB.
inline Tensor new_large(
    const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
    std::optional<ScalarType> type = std::nullopt) {
  Tensor t = torch::stable::new_empty(like, sizes, type);
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (bytes >= int64_t{4} << 20) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    // Only a hint: where it is refused the block is as good as before.
    madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
#endif
  return t;
}

// Calls f with a value of the element type of t, which check_element has seen.
template <class F>
void with_element(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) {
    f(float{});
  } else {
    f(bfloat16{});
  }
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace vadit

#endif  // VADIT_CPU_VEC_H

#ifndef VADIT_ISA
// ------------------------------------------------------------------------- the passes over the op's file, see above

#define VADIT_ISA baseline
#define VADIT_LANES 4
#include "vec.h"
#include VADIT_KERNELS
#undef VADIT_ISA
#undef VADIT_LANES

#ifdef VADIT_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VADIT_ISA avx2
#define VADIT_LANES 8
#include "vec.h"
#include VADIT_KERNELS
#undef VADIT_ISA
#undef VADIT_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define VADIT_ISA avx512
#define VADIT_LANES 16
#include "vec.h"
#include VADIT_KERNELS
#undef VADIT_ISA
#undef VADIT_LANES
#pragma GCC pop_options
#endif  // VADIT_X86

#else
// ------------------------------------------------------------------------------------ vectors of one instruction set

namespace vadit::VADIT_ISA {
namespace {

constexpr int64_t kLanes = VADIT_LANES;
typedef float Vec __attribute__((vector_size(4 * VADIT_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * VADIT_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * VADIT_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * VADIT_LANES)));

VADIT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

VADIT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// Between 16 and 32 bits: GCC 12 takes four to seven instructions for what AVX does in one or two.
VADIT_INLINE Bits widen(Halves h) {
#if VADIT_LANES == 8
  return (Bits)_mm256_cvtepu16_epi32((__m128i)h);
#elif VADIT_LANES == 16
  return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#else
  return __builtin_convertvector(h, Bits);
#endif
}

VADIT_INLINE Halves narrow(Bits bits) {
#if VADIT_LANES == 8
  const __m256i wide = (__m256i)bits;
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#elif VADIT_LANES == 16
  return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

VADIT_INLINE Vec load(const bfloat16* p) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Vec)(widen(h) << 16);
}

// Rounds to nearest, ties to even; the carry of a NaN's bits could make it a number, so it gets all bits set instead.
VADIT_INLINE void store(bfloat16* p, Vec v) {
  const Bits bits = (Bits)v;
  const Halves h = narrow(((bits + 0x7fff + ((bits >> 16) & 1)) | (Bits)(v != v)) >> 16);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n <= kLanes elements, zeros after them. n is a constant in all but the last step of each_vector.
template <class T>
VADIT_INLINE Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

template <class T>
VADIT_INLINE void store(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// f(i, n) for the vectors [i, i + n) that cover [begin, end); n is kLanes but for the last.
template <class F>
VADIT_INLINE void each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, end - i);
}

VADIT_INLINE float sum(Vec v) {
#if VADIT_LANES == 16
  const __m256 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif VADIT_LANES == 8
  const __m256 half = v;
#endif
#if VADIT_LANES == 4
  Vec quarter = v;
#else
  __m128 quarter = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#endif
  quarter += __builtin_shufflevector(quarter, quarter, 2, 3, 0, 1);
  quarter += __builtin_shufflevector(quarter, quarter, 1, 0, 3, 2);
  return quarter[0];
}

}  // namespace
}  // namespace vadit::VADIT_ISA

#endif  // VADIT_ISA

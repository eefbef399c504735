// One SIMD vector of T and the operations the kernels need, for the instruction set of the translation unit.
//
// A kernel translation unit is compiled with -DND_ISA=<its namespace>: avx512, avx2, neon or scalar. Everything lives in narrowdeep::ND_ISA, so that no inline function compiled for one instruction set can be
// merged by the linker with its twin of another. For the same reason kernel headers use no templates of the standard
// library that emit code.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "narrowdeep needs GCC 12 or later, or Clang: __builtin_shufflevector is missing"
#endif

#include <cstddef>
#include <cstdint>

// ND_VECTOR_BYTES: vectors of so many bytes (0: one element) in the compiler's own terms, without intrinsics. The scalar
// build is made with 0; 64 tries the shapes of AVX-512 on a machine without it.
#if defined(ND_VECTOR_BYTES)
#elif defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define ND_INLINE inline __attribute__((always_inline))
// GCC keeps an array of vectors in registers only where the loops over it are unrolled completely.
#define ND_UNROLL _Pragma("GCC unroll 16")

namespace narrowdeep {
namespace ND_ISA {

#if defined(ND_VECTOR_BYTES)
constexpr int kVectorBytes = ND_VECTOR_BYTES;
constexpr int kRegisters = kVectorBytes == 64 ? 32 : 16;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
#error "define ND_VECTOR_BYTES, or compile for AVX-512, AVX2 or NEON"
#endif

// Whether `fma` and `clip` are there for vectors of 32 bytes as well.
#if !defined(ND_VECTOR_BYTES) && defined(__AVX2__)
constexpr bool kHas32Bytes = true;
#else
constexpr bool kHas32Bytes = false;
#endif

template <class T>
struct Simd {
  static constexpr int kLanes = kVectorBytes ? kVectorBytes / int(sizeof(T)) : 1;
  typedef T Vec __attribute__((vector_size(kVectorBytes ? kVectorBytes : sizeof(T))));
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
constexpr int kLanes = Simd<T>::kLanes;

template <class T>
ND_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
ND_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class T>
ND_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, so this folds to a plain broadcast
}

// The first `count` lanes; the others are 0, and are left alone in memory.
template <class T>
ND_INLINE Vec<T> load_first(const T* p, int64_t count) {
  Vec<T> v = {};
  __builtin_memcpy(&v, p, size_t(count) * sizeof(T));
  return v;
}
template <class T>
ND_INLINE void store_first(T* p, Vec<T> v, int64_t count) {
  __builtin_memcpy(p, &v, size_t(count) * sizeof(T));
}

// ---- a * b + c, fused where the instruction set can -----------------------------------------------------------------
// clip(z, floor): floor > z ? floor : z. A NaN in z is kept, as torch.relu keeps it.
// where_le0(h, a, b): h <= 0 ? a : b, lane by lane; a NaN in h takes b, as in torch's threshold_backward.
// keep_if(mask, a): a & mask, with mask all ones or all zeros: exact for every a, also infinities.
#if !defined(ND_VECTOR_BYTES) && defined(__AVX512F__)
ND_INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
ND_INLINE __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
ND_INLINE __m512 clip(__m512 z, __m512 floor) { return _mm512_max_ps(floor, z); }
ND_INLINE __m512d clip(__m512d z, __m512d floor) { return _mm512_max_pd(floor, z); }
ND_INLINE __m512 where_le0(__m512 h, __m512 a, __m512 b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(h, _mm512_setzero_ps(), _CMP_LE_OQ), b, a);
}
ND_INLINE __m512d where_le0(__m512d h, __m512d a, __m512d b) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(h, _mm512_setzero_pd(), _CMP_LE_OQ), b, a);
}
ND_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
ND_INLINE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
ND_INLINE __m256 clip(__m256 z, __m256 floor) { return _mm256_max_ps(floor, z); }
ND_INLINE __m256d clip(__m256d z, __m256d floor) { return _mm256_max_pd(floor, z); }
ND_INLINE __m512 keep_if(__m512 mask, __m512 a) { return _mm512_and_ps(mask, a); }
ND_INLINE __m512d keep_if(__m512d mask, __m512d a) { return _mm512_and_pd(mask, a); }
#elif !defined(ND_VECTOR_BYTES) && defined(__AVX2__)
ND_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
ND_INLINE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
ND_INLINE __m256 clip(__m256 z, __m256 floor) { return _mm256_max_ps(floor, z); }
ND_INLINE __m256d clip(__m256d z, __m256d floor) { return _mm256_max_pd(floor, z); }
ND_INLINE __m256 where_le0(__m256 h, __m256 a, __m256 b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(h, _mm256_setzero_ps(), _CMP_LE_OQ));
}
ND_INLINE __m256d where_le0(__m256d h, __m256d a, __m256d b) {
  return _mm256_blendv_pd(b, a, _mm256_cmp_pd(h, _mm256_setzero_pd(), _CMP_LE_OQ));
}
ND_INLINE __m256 keep_if(__m256 mask, __m256 a) { return _mm256_and_ps(mask, a); }
ND_INLINE __m256d keep_if(__m256d mask, __m256d a) { return _mm256_and_pd(mask, a); }
#else
#if !defined(ND_VECTOR_BYTES) && defined(__ARM_NEON)
ND_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return (Vec<float>)vfmaq_f32(c, a, b); }
ND_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return (Vec<double>)vfmaq_f64(c, a, b); }
#else
ND_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
ND_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
#endif
ND_INLINE Vec<float> clip(Vec<float> z, Vec<float> floor) { return floor > z ? floor : z; }
ND_INLINE Vec<double> clip(Vec<double> z, Vec<double> floor) { return floor > z ? floor : z; }
ND_INLINE Vec<float> where_le0(Vec<float> h, Vec<float> a, Vec<float> b) { return h <= 0.0f ? a : b; }
ND_INLINE Vec<double> where_le0(Vec<double> h, Vec<double> a, Vec<double> b) { return h <= 0.0 ? a : b; }
ND_INLINE Vec<float> keep_if(Vec<float> mask, Vec<float> a) {
  typedef int32_t Int __attribute__((vector_size(sizeof(a))));
  return (Vec<float>)((Int)mask & (Int)a);
}
ND_INLINE Vec<double> keep_if(Vec<double> mask, Vec<double> a) {
  typedef int64_t Int __attribute__((vector_size(sizeof(a))));
  return (Vec<double>)((Int)mask & (Int)a);
}
#endif

template <class T>
ND_INLINE T all_ones() {
  T mask;
  __builtin_memset(&mask, 0xff, sizeof(mask));
  return mask;
}

// ---- lanes ----------------------------------------------------------------------------------------------------------
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  typedef Indices<I...> type;
};

// Every lane from the one before it (BY = 1) or behind it (BY = -1), around the ends.
template <int BY, class V, int... I>
ND_INLINE V rotated(V x, Indices<I...>) {
  return __builtin_shufflevector(x, x, ((I - BY + int(sizeof...(I))) % int(sizeof...(I)))...);
}
template <class T, int BY>
ND_INLINE Vec<T> from_lane(Vec<T> x) {
  return rotated<BY>(x, typename MakeIndices<kLanes<T>>::type());
}

// ---- sums over lanes ------------------------------------------------------------------------------------------------
// `sum_lanes<K>(acc)` adds up the lanes of K vectors at once, K a power of two and at most the lane count: the sum of
// acc[k] comes back in lane k * (lanes / K). A tree of shuffles costs K - 1 additions where K separate sums would cost
// K log2(lanes): at width 4 that is what keeps weight gradients as cheap as the layer itself.
// In a vector of groups of 2 w lanes: keeps the lower (upper) w lanes of every group of x, then of every group of y.
template <int W, bool UPPER, class V, int... I>
ND_INLINE V halves(V x, V y, Indices<I...>) {
  return __builtin_shufflevector(x, y, ((I / W) * 2 * W + (UPPER ? W : 0) + I % W)...);
}
template <class T, int W>
ND_INLINE Vec<T> fold_pair(Vec<T> x, Vec<T> y) {
  typename MakeIndices<kLanes<T>>::type all;
  return halves<W, false>(x, y, all) + halves<W, true>(x, y, all);
}
// Adds the upper half of every group of 2 w lanes onto its lower half.
template <int W, class V, int... I>
ND_INLINE V rotate_within(V x, Indices<I...>) {
  return __builtin_shufflevector(x, x, (I ^ W)...);
}
template <class T, int W>
ND_INLINE Vec<T> fold_self(Vec<T> x) {
  if constexpr (W == 0) {
    return x;
  } else {
    x = x + rotate_within<W>(x, typename MakeIndices<kLanes<T>>::type());
    return fold_self<T, W / 2>(x);
  }
}
template <class T, int K, int W>
ND_INLINE Vec<T> sum_tree(Vec<T>* acc) {
  if constexpr (K == 1) {
    return fold_self<T, W>(acc[0]);
  } else {
    Vec<T> half[K / 2];
    for (int k = 0; k < K / 2; ++k) half[k] = fold_pair<T, W>(acc[2 * k], acc[2 * k + 1]);
    return sum_tree<T, K / 2, W / 2>(half);
  }
}
template <class T, int K>
ND_INLINE Vec<T> sum_lanes(Vec<T>* acc) {
  static_assert(K >= 1 && K <= kLanes<T> && (K & (K - 1)) == 0, "K must be a power of two, at most the lane count");
  return sum_tree<T, K, kLanes<T> / 2>(acc);
}

ND_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
ND_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
ND_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ND_ISA
}  // namespace narrowdeep

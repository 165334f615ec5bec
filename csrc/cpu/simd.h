// Vectors of float for every instruction set: the compiler's own vector type, as wide as the set's registers, and
// intrinsics only where the compiler does not find the instruction by itself. Read once per instruction set, inside an
// anonymous namespace: a weak symbol compiled for AVX-512 could otherwise be picked by the linker for the baseline.
//
//   Vec, Int, W          W floats, W int32
//   load, store          from and to float, bfloat16, float16 (round to nearest even); _n for the first n < W elements
//   stream               store past the cache, for outputs larger than it (needs alignment: see stream_ok)
//   load_pair, store_pair  two vectors at once, for functions of single elements
//   + - * /, < > == ?:   the compiler's own; a * b + c contracts to one FMA
//   vmax, vmin, vabs, vsqrt, sum, max, exp
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common.h"

namespace fastlm::FASTLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint32_t UInt __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));

inline Vec splat(float x) { return x - Vec{}; }
inline Int splat_int(int32_t x) { return x - Int{}; }
inline Int bits(Vec x) { return (Int)x; }
inline Vec from_bits(Int x) { return (Vec)x; }
inline Vec to_float(Int x) { return __builtin_convertvector(x, Vec); }

// --- conversions ----------------------------------------------------------------------------------------------------

// Between 16 and 32 bits by intrinsics: GCC 12 takes the vectors apart for __builtin_convertvector.
inline UInt widen(Half h) {
#if defined(__AVX512F__)
  return (UInt)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (UInt)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, UInt);
#endif
}
inline Half narrow(UInt x) {  // of values below 2^16
#if defined(__AVX512F__)
  return (Half)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
#else
  return __builtin_convertvector(x, Half);
#endif
}

inline Vec from_bfloat16(Half h) { return (Vec)(widen(h) << 16); }

inline Half to_bfloat16(Vec x) {  // to nearest, ties to even; NaN stays NaN
  const UInt u = (UInt)x;
  const UInt rounded = u + 0x7fff + ((u >> 16) & 1);
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  return narrow((UInt)_mm512_mask_or_epi32((__m512i)rounded, nan, (__m512i)u, _mm512_set1_epi32(0x400000)) >> 16);
#else
  return narrow((x == x ? rounded : u | 0x400000) >> 16);
#endif
}

inline float float16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float value;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    const uint32_t u = 0x7f800000 | ((magnitude & 0x3ff) << 13);
    std::memcpy(&value, &u, 4);
  } else {  // 2^-112 undoes the difference of the exponent biases and makes subnormals right
    const uint32_t u = magnitude << 13;
    std::memcpy(&value, &u, 4);
    value *= 0x1p112f;
  }
  uint32_t u;
  std::memcpy(&u, &value, 4);
  u |= sign;
  std::memcpy(&value, &u, 4);
  return value;
}

inline uint16_t float_to_float16(float x) {  // to nearest, ties to even
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (u < 0x38800000) {                       // subnormal: let the addition round
    float magic = 0.5f, value;
    std::memcpy(&value, &u, 4);
    value += magic;
    std::memcpy(&u, &value, 4);
    return sign | uint16_t(u - 0x3f000000);
  }
  return sign | uint16_t((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13);
}

// --- memory ---------------------------------------------------------------------------------------------------------

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

inline Vec load(const bfloat16* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  return from_bfloat16(h);
}
inline void store(bfloat16* p, Vec x) {
  const Half h = to_bfloat16(x);
  std::memcpy(p, &h, sizeof h);
}

inline Vec load(const float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec x;
  for (int i = 0; i < W; ++i) x[i] = float16_to_float(p[i].bits);
  return x;
#endif
}
inline void store(float16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i].bits = float_to_float16(x[i]);
#endif
}

/// The first n elements, 0 <= n <= W; the lanes behind them are `fill` and their memory is not touched.
template <class T>
inline Vec load_n(const T* p, int64_t n, float fill = 0.f) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>(0xffffu >> (W - n));
  const Vec other = splat(fill);
  if constexpr (std::is_same<T, float>::value) return (Vec)_mm512_mask_loadu_ps((__m512)other, mask, p);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  const Vec x = std::is_same<T, float16>::value ? (Vec)_mm512_cvtph_ps(half) : from_bfloat16((Half)half);
  return (Vec)_mm512_mask_mov_ps((__m512)other, mask, (__m512)x);
#else
  T lanes[W];
  if (n < W) {
    std::memcpy(lanes, p, n * sizeof(T));
    std::memset(static_cast<void*>(lanes + n), 0, (W - n) * sizeof(T));
    Vec x = load(lanes);
    if (fill != 0.f)
      for (int i = static_cast<int>(n); i < W; ++i) x[i] = fill;
    return x;
  }
  return load(p);
#endif
}
template <class T>
inline void store_n(T* p, Vec x, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>(0xffffu >> (W - n));
  if constexpr (std::is_same<T, float>::value) return _mm512_mask_storeu_ps(p, mask, (__m512)x);
  const __m256i half =
      std::is_same<T, float16>::value ? _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT) : (__m256i)to_bfloat16(x);
  _mm256_mask_storeu_epi16(p, mask, half);
#else
  T lanes[W];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
#endif
}

/// A store that does not read the line into the cache first. Only where stream_ok() and the output exceeds the cache.
inline void stream(float* p, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}
template <class T>
inline void stream(T* p, Vec x) {  // the 16-bit types
#if defined(__AVX512F__)
  alignas(32) T lanes[W];
  store(lanes, x);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(lanes));
#elif defined(__AVX2__)
  alignas(16) T lanes[W];
  store(lanes, x);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(lanes));
#else
  store(p, x);
#endif
}
/// The same for 2 W bfloat16 or float16.
template <class T>
inline void stream(T* p, Vec a, Vec b) {
  T lanes[2 * W];
  store(lanes, a);
  store(lanes + W, b);
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_loadu_si512(lanes));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
#else
  std::memcpy(p, lanes, sizeof lanes);
#endif
}

/// Elements 0, 2, 4, ... and 1, 3, 5, ... of the 2 W elements of low and high.
inline void unzip(Vec low, Vec high, Vec& even, Vec& odd) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i one = _mm512_set1_epi32(1);
  even = (Vec)_mm512_permutex2var_ps((__m512)low, index, (__m512)high);
  odd = (Vec)_mm512_permutex2var_ps((__m512)low, _mm512_add_epi32(index, one), (__m512)high);
#elif defined(__AVX2__)
  const __m256d e = (__m256d)_mm256_shuffle_ps((__m256)low, (__m256)high, 0x88);  // within halves of the register
  const __m256d o = (__m256d)_mm256_shuffle_ps((__m256)low, (__m256)high, 0xdd);
  even = (Vec)_mm256_permute4x64_pd(e, 0xd8);
  odd = (Vec)_mm256_permute4x64_pd(o, 0xd8);
#else
  const Vec a = low, b = high;  // even or odd may be one of them
  for (int i = 0; i < W / 2; ++i) {
    even[i] = a[2 * i], even[i + W / 2] = b[2 * i];
    odd[i] = a[2 * i + 1], odd[i + W / 2] = b[2 * i + 1];
  }
#endif
}

/// The inverse of unzip.
inline void zip(Vec even, Vec odd, Vec& low, Vec& high) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i eight = _mm512_set1_epi32(8);
  low = (Vec)_mm512_permutex2var_ps((__m512)even, index, (__m512)odd);
  high = (Vec)_mm512_permutex2var_ps((__m512)even, _mm512_add_epi32(index, eight), (__m512)odd);
#elif defined(__AVX2__)
  const __m256 first = _mm256_unpacklo_ps((__m256)even, (__m256)odd);
  const __m256 second = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
  low = (Vec)_mm256_permute2f128_ps(first, second, 0x20);
  high = (Vec)_mm256_permute2f128_ps(first, second, 0x31);
#else
  const Vec a = even, b = odd;
  for (int i = 0; i < W / 2; ++i) {
    low[2 * i] = a[i], low[2 * i + 1] = b[i];
    high[2 * i] = a[i + W / 2], high[2 * i + 1] = b[i + W / 2];
  }
#endif
}

// Two vectors at once, of 2 W consecutive elements: (a, b) are the first and the last W of them, but of bfloat16 those
// at even and at odd places, which one 64-byte load gives for two instructions, and two more store. For functions of
// single elements, which do not care.
template <class T>
inline void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p), b = load(p + W);
}
inline void load_pair(const bfloat16* p, Vec& a, Vec& b) {
  UInt u;
  std::memcpy(&u, p, sizeof u);
  a = (Vec)(u << 16), b = (Vec)(u & 0xffff0000);
}
/// float32 in the order that load_pair gives T in.
template <class T>
inline void load_pair_as(const float* p, Vec& a, Vec& b) {
  load_pair(p, a, b);
  if constexpr (std::is_same<T, bfloat16>::value) unzip(a, b, a, b);
}
/// bfloat16 to nearest, ties away from zero: good for results that lie on a tie by chance only, so that the
/// direction is of no consequence. NaN stays NaN unless its low bits are set, as no operation on bfloat16 sets them.
template <class T, class STREAM>
inline void store_pair(T* p, Vec a, Vec b, STREAM) {
  if constexpr (std::is_same<T, bfloat16>::value) {
    const UInt half = UInt{} + 0x8000;
    const UInt low = (UInt)a + half, high = (UInt)b + half;
    const UInt u = (low >> 16) | (high & 0xffff0000);
#if defined(__AVX512F__)
    if (STREAM::value) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)u);
#elif defined(__AVX2__)
    if (STREAM::value) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)u);
#endif
    std::memcpy(static_cast<void*>(p), &u, sizeof u);
  } else if constexpr (!STREAM::value) {
    store(p, a), store(p + W, b);
  } else if constexpr (sizeof(T) == 4) {
    stream(p, a), stream(p + W, b);
  } else {
    stream(p, a, b);
  }
}

/// After the last stream(): its stores become visible before what follows.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
/// Whether to stream an output of `rows` rows of N elements, `stride` apart: aligned, and too large to stay in the
/// cache for whoever reads it next.
template <class T, int VECTORS = 1>  // that each stream() writes
inline bool stream_ok(const T* p, int64_t rows, int64_t N, int64_t stride) {
  constexpr int64_t LARGE = 16 << 20, VECTOR = VECTORS * W * sizeof(T);
  return rows * N * int64_t(sizeof(T)) >= LARGE && reinterpret_cast<uintptr_t>(p) % VECTOR == 0 &&
         stride * int64_t(sizeof(T)) % VECTOR == 0;
}
/// A full vector streamed or stored; the last, shorter one of a row is always stored.
template <class T, class N>
inline void put(T* p, Vec x, N n, std::true_type) {
  if constexpr (std::is_same<N, int64_t>::value)
    store_n(p, x, n);
  else
    stream(p, x);
}
template <class T, class N>
inline void put(T* p, Vec x, N n, std::false_type) {
  if constexpr (std::is_same<N, int64_t>::value)
    store_n(p, x, n);
  else
    store(p, x);
}
/// f(std::true_type) or f(std::false_type): turns a flag of the call into one the compiler knows.
template <class F>
inline void with_flag(bool flag, F f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

// b where either is NaN, as maxps. By intrinsics: GCC 12 compares and blends where a is a constant.
inline Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline Vec vmin(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline Vec vabs(Vec a) { return from_bits(bits(a) & 0x7fffffff); }
inline Vec vsqrt(Vec a) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < W; ++i) a[i] = std::sqrt(a[i]);
  return a;
#endif
}

inline float sum(Vec x) {  // pairwise, so the order is the same as a tree's
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
#endif
}
inline float max(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
#endif
}

/// e^x within about 1 ulp over the whole range; exp(-inf) = 0, exp(inf) = inf, NaN stays; results below 2^-126 are 0
/// outside AVX-512.
/// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, Cody and Waite), a polynomial in r, times 2^n.
inline Vec exp(Vec x) {
  const Vec shift = splat(0x1.8p23f);
  const Vec t = vmin(splat(89.f), vmax(splat(-104.f), x));  // NaN passes through
  const Vec n = (t * 1.44269504f + shift) - shift;
  const Vec r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Int k = __builtin_convertvector(n, Int);
  const Int half = k >> 1;  // 2^n in two factors: n reaches 128, one factor's exponent does not
  const Vec y = p * from_bits((half + 127) << 23) * from_bits((k - half + 127) << 23);
  return x < -87.3365f ? Vec{} : (x == x ? y : x);
#endif
}

// --- dtypes ---------------------------------------------------------------------------------------------------------

template <class T>
struct Type {
  using type = T;
};

/// f(Type<T>{}) for the C++ type of a dtype: the one switch.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(Type<float>{});
    case DType::bfloat16:
      return f(Type<bfloat16>{});
    case DType::float16:
      return f(Type<float16>{});
  }
}

/// f(i, n) for each vector of [0, N): n is W, known to the compiler, but for the last, shorter one.
template <class F>
inline void for_vectors(int64_t N, F f) {
  int64_t i = 0;
  for (; i + W <= N; i += W) f(i, std::integral_constant<int64_t, W>{});
  if (i < N) f(i, N - i);
}
/// The sum of f(i, n) over the vectors of [0, N), in four running sums: the additions of one would wait for each other,
/// and their rounding errors would all lean one way.
template <class F>
inline Vec sum_vectors(int64_t N, F f) {
  constexpr std::integral_constant<int64_t, W> full;
  Vec a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * W <= N; i += 4 * W) {
    a += f(i, full);
    b += f(i + W, full);
    c += f(i + 2 * W, full);
    d += f(i + 3 * W, full);
  }
  for (; i + W <= N; i += W) a += f(i, full);
  if (i < N) b += f(i, N - i);
  return (a + b) + (c + d);
}
template <class T>
inline Vec load(const T* p, std::integral_constant<int64_t, W>) {
  return load(p);
}
template <class T>
inline Vec load(const T* p, int64_t n) {
  return load_n(p, n);
}
template <class T>
inline void store(T* p, Vec x, std::integral_constant<int64_t, W>) {
  store(p, x);
}
template <class T>
inline void store(T* p, Vec x, int64_t n) {
  store_n(p, x, n);
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

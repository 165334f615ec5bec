// The 8-bit code book of blocks of 256 numbers (Dettmers et al. 2021, arXiv:2110.02861), W numbers at a time. The book
// and what is nearest stand in fastlm/reference/adam.py. A code is a number n of a tree: with e the place of n's
// leading bit and f what follows it, its value is 10^(e - top) * (0.1 + 0.9 * (f + half a step)).
//   decode   the exponent and the mantissa of 2n + 1 are e and f: a table of 16 powers of ten, two products
//   encode   within a decade n is a straight line of x: the exponent of x picks the one number of its binade where a
//            decade ends, that comparison the decade, the decade the line. No search: 11 instructions for 16 numbers,
//            where comparisons with 1e-4, 1e-2, 1e-1 as on the GPU take 20
#pragma once
#include <cmath>
#include <cstring>

#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t CODES = 256;  // of a block, which share a scale

// As vmax and vmin, whose comparison the compiler keeps beside a selection here.
inline Vec highest(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return vmax(a, b);
#endif
}
inline Vec lowest(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return vmin(a, b);
#endif
}
/// x without its fraction, 0 where y is not above 0.
inline Int truncated_where_positive(Vec x, Vec y) {
#if defined(__AVX512F__)
  const __mmask16 positive = _mm512_cmp_ps_mask((__m512)y, _mm512_setzero_ps(), _CMP_GT_OQ);
  return (Int)_mm512_maskz_cvttps_epi32(positive, (__m512)x);
#else
  return __builtin_convertvector(x, Int) & (y > 0.f);
#endif
}

/// table[index & 15], lane by lane.
inline Vec lookup16(const float* table, Int index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  return (Vec)_mm256_i32gather_ps(table, (__m256i)(index & 15), 4);
#else
  Vec x;
  for (int i = 0; i < W; ++i) x[i] = table[index[i] & 15];
  return x;
#endif
}
/// table[index & 31].
inline Vec lookup32(const float* table, Int index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
#elif defined(__AVX2__)
  return (Vec)_mm256_i32gather_ps(table, (__m256i)(index & 31), 4);
#else
  Vec x;
  for (int i = 0; i < W; ++i) x[i] = table[index[i] & 31];
  return x;
#endif
}

inline Int load_codes(const uint8_t* p, std::integral_constant<int64_t, W>) {
#if defined(__AVX512F__)
  return (Int)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Int x;
  for (int i = 0; i < W; ++i) x[i] = p[i];
  return x;
#endif
}
/// Codes below 0 become 0.
inline void store_codes(uint8_t* p, Int x, std::integral_constant<int64_t, W>) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtepi32_epi8(_mm512_max_epi32((__m512i)x, _mm512_setzero_si512())));
#else
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(x[i] < 0 ? 0 : x[i]);
#endif
}
/// The same for 4 W codes in four vectors.
inline void store_codes(uint8_t* p, Int a, Int b, Int c, Int d) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_packus_epi32((__m512i)a, (__m512i)b), high = _mm512_packus_epi32((__m512i)c, (__m512i)d);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
#else
  constexpr std::integral_constant<int64_t, W> full;
  store_codes(p, a, full);
  store_codes(p + W, b, full);
  store_codes(p + 2 * W, c, full);
  store_codes(p + 3 * W, d, full);
#endif
}
inline Int load_codes(const uint8_t* p, int64_t n) {
  uint8_t lanes[W] = {};
  std::memcpy(lanes, p, n);
  return load_codes(lanes, std::integral_constant<int64_t, W>{});
}
inline void store_codes(uint8_t* p, Int x, int64_t n) {
  uint8_t lanes[W];
  store_codes(lanes, x, std::integral_constant<int64_t, W>{});
  std::memcpy(p, lanes, n);
}

/// Codes and the numbers behind them, for moments with a sign or for those without.
template <bool SIGNED>
class Book {
 public:
  Book() {
    for (int e = TOP; e >= FIRST_DECADE; --e) {
      const double steps = 1 << e, power = ten(TOP - e);
      line(e + SHIFT, 10 * power / 9 * steps, 8. / 9 * steps - BELOW, 2 * steps - 0.5 - BELOW);
    }
    line(0, 0, SIGNED ? 0 : 1, SIGNED ? 0 : 1);
    line(PIECES - 1, 0, (2 << TOP) - BELOW, (2 << TOP) - BELOW);
    for (int i = 0; i < 16; ++i) power[i] = static_cast<float>(i <= TOP ? ten(i) : 0);
    if (!SIGNED) power[0] = 0;                         // of the number 1, which stands for zero
    power[TOP + 1] = SIGNED ? 9660377.f : 98272552.f;  // of the last: the products round to 1
    for (int i = 0; i < 32; ++i) {
      const double low = std::ldexp(1., i - 31);
      int32_t piece = 0;
      while (piece + 1 < PIECES && end(piece) <= low) ++piece;
      std::memcpy(pieces + i, &piece, 4);
      ends[i] = piece + 1 < PIECES && end(piece) < 2 * low ? static_cast<float>(end(piece)) : INFINITY;
    }
  }

  /// The numbers times the scale of their block, to which the decades are multiplied once for the block.
  class Decoder {
   public:
    Decoder(const Book& book, float scale) {
      for (int i = 0; i < 16; i += W) store(power + i, load(book.power + i) * (SIGNED ? 1e-7f : 1e-8f) * scale);
    }
    Vec operator()(Int code) const {
      const Int n = SIGNED ? code - 127 : code + 1;
      const Int size = SIGNED ? (n < 0 ? -n : n) : n;
      const Int u = bits(to_float(size + size + 1));
      const Vec inner = from_bits((u & 0x7fffff) | 0x3f800000);
      const Vec x = (9.f * inner - 8.f) * lookup16(power, u >> 23);  // the exponent of 1 is 127, the last of the table
      return SIGNED ? from_bits(bits(x) | (n & INT32_MIN)) : x;
    }

   private:
    alignas(64) float power[16];
  };

  /// The nearest code of numbers in the book's range, for store_codes(); what is above zero without a sign never gives
  /// zero.
  Int encode(Vec value) const {
    const Vec x = highest(SIGNED ? vabs(value) : value, splat(0x1p-31f));
    const Int binade = bits(x) >> 23;
    Int piece = bits(lookup32(pieces, binade));
    piece = x >= lookup32(ends, binade) ? piece + 1 : piece;
    const Vec place = lowest(x * lookup16(slope, piece) + lookup16(start, piece), lookup16(last, piece));
    if (!SIGNED) return truncated_where_positive(place, value);
    const Int n = __builtin_convertvector(place, Int);
    return value < 0.f ? 127 - n : 127 + n;  // -1 for -128: the first code
  }

 private:
  static constexpr int TOP = SIGNED ? 6 : 7;  // the decade from 0.1 has 2^TOP values of either sign
  // Lines in ascending order: below the first number, one for each decade, 1 itself.
  static constexpr int FIRST_DECADE = SIGNED ? 0 : 1;
  static constexpr int BELOW = SIGNED ? 0 : 1;  // what a line gives is the number, or the code itself, one less
  static constexpr int SHIFT = SIGNED ? 1 : 0, PIECES = TOP + SHIFT + 2;

  static double ten(int e) {
    double power = 1;
    for (; e > 0; --e) power *= 10;
    return power;
  }
  static double value(int n) {
    int e = 0;
    while (2 << e <= n) ++e;
    return n == 2 << TOP ? 1 : (9 * (n + 0.5) / (1 << e) - 8) * ten(e) / ten(TOP + 1);
  }
  /// Where a piece gives way to the next: halfway between two numbers.
  static double end(int piece) {
    if (piece == 0) return SIGNED ? value(1) / 2 : value(2);  // unsigned: the piece is 2's lower half
    const int n = 1 << (piece + 1 - SHIFT);
    return (value(n - 1) + value(n)) / 2;
  }
  void line(int piece, double a, double b, double most) {
    slope[piece] = static_cast<float>(a);
    start[piece] = static_cast<float>(b);
    last[piece] = static_cast<float>(most);
  }

  float power[16];             // by the exponent of 2n + 1
  float pieces[32], ends[32];  // by the exponent of x: the piece at its start (an integer's bits), where that ends
  float slope[16] = {}, start[16] = {}, last[16] = {};  // of a piece
};

}  // namespace
}  // namespace fastlm::FASTLM_ISA

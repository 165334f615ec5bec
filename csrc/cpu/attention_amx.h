// Tiles of bfloat16 for AMX: products, and the forms of Q, K, V and dO that its two operands want without a
// transposition at the time of use.
//   product  C[16][16] float32 += A[16][32] B[32][16]; A by rows, B with pairs of rows side by side ("paired":
//            [rows / 2][columns] of two bfloat16 each)
//   paired   of rows X: interleave(X). Of columns X^T: the 32-bit transposition of X by rows, because neighbours in a
//            row of X are the pairs of X^T.
//   blocks   2 x 2 tiles of C: four loads for four products. On Sapphire Rapids loads, not products, set the pace.
//   papers   Intel 64 and IA-32 Architectures Software Developer's Manual, chapter on AMX
//   tried and lost: products of one key tile while the softmax of another runs (no gain, the two share the ports)
#pragma once
#include "amx.h"
#include "attention.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

template <int MT, int NT, bool ADD>
inline void tile_block(int64_t K, const bfloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                       int64_t ldc) {
  if constexpr (ADD) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (NT > 1) _tile_loadd(1, c + 16, ldc * 4);
    if constexpr (MT > 1) _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if constexpr (MT > 1 && NT > 1) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    if constexpr (NT > 1) _tile_zero(1);
    if constexpr (MT > 1) _tile_zero(2);
    if constexpr (MT > 1 && NT > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += 32) {
    _tile_loadd(4, a + k, lda * 2);
    _tile_loadd(6, b + k / 2 * ldb, ldb * 4);
    if constexpr (MT > 1) _tile_loadd(5, a + 16 * lda + k, lda * 2);
    if constexpr (NT > 1) _tile_loadd(7, b + k / 2 * ldb + 16, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NT > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (MT > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (MT > 1 && NT > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (NT > 1) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (MT > 1) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if constexpr (MT > 1 && NT > 1) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

/// C[M][N] = (ADD: +=) A[M][K] B[K][N]; A by rows, B paired. M and N are rounded up to 16, K to 32: the buffers must
/// have that much, and zeros behind K in one operand and no NaN in the other.
template <bool ADD>
inline void tile_gemm(int64_t M, int64_t N, int64_t K, const bfloat16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                      float* c, int64_t ldc) {
  for (int64_t n = 0; n < N; n += 32)
    for (int64_t m = 0; m < M; m += 32) {
      const bool two_rows = M - m > 16, two_columns = N - n > 16;
      const auto run = [&](auto block) { block(K, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc); };
      if (two_rows && two_columns)
        run(tile_block<2, 2, ADD>);
      else if (two_rows)
        run(tile_block<2, 1, ADD>);
      else if (two_columns)
        run(tile_block<1, 2, ADD>);
      else
        run(tile_block<1, 1, ADD>);
    }
}

/// [rows][cols] to row length ld, a multiple of 32, zeros behind cols and for rows up to `padded`. Returns whether all
/// are finite. Asks for the rows 64 further on, the next tile's: their stride is too long for the hardware to foresee.
inline bool copy_rows(const bfloat16* from, int64_t stride, int64_t rows, int64_t padded, int64_t cols, bfloat16* to,
                      int64_t ld) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 infinite = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < ld; c += 32) {
      const bfloat16* const p = from + r * stride + c;
      const int64_t n = cols - c;
      const __mmask32 inside = n >= 32 ? ~__mmask32(0) : n > 0 ? (__mmask32(1) << n) - 1 : 0;
      const __m512i x = _mm512_maskz_loadu_epi16(inside, p);
      _mm_prefetch(reinterpret_cast<const char*>(p + BK * stride), _MM_HINT_T0);
      infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
      _mm512_store_si512(to + r * ld + c, x);
    }
  std::memset(static_cast<void*>(to + rows * ld), 0, (padded - rows) * ld * sizeof(bfloat16));
  return infinite == 0;
}

/// Rows of length ld (already padded) to pairs: [rows / 2][ld].
inline void interleave(const bfloat16* from, int64_t ld, int64_t rows, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < ld; c += W) {
      Half low, high;
      std::memcpy(&low, from + r * ld + c, sizeof low);
      std::memcpy(&high, from + (r + 1) * ld + c, sizeof high);
      const UInt x = widen(low) | widen(high) << 16;
      std::memcpy(to + r / 2 * ld + c, &x, sizeof x);
    }
}

/// 32-bit words [rows][cols] to [cols][rows]; rows and cols are multiples of 16.
inline void transpose_words(const uint32_t* from, int64_t ld, int64_t rows, int64_t cols, uint32_t* to, int64_t ldt) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < cols; c += W) {
      Vec x[W];
      for (int i = 0; i < W; ++i) std::memcpy(&x[i], from + (r + i) * ld + c, sizeof x[i]);
      transpose(x);
      for (int i = 0; i < W; ++i) std::memcpy(to + (c + i) * ldt + r, &x[i], sizeof x[i]);
    }
}

inline const uint32_t* words(const bfloat16* p) { return reinterpret_cast<const uint32_t*>(p); }

/// 2^x within 1.6e-7, exact for whole x; 2^-inf = 0, NaN stays.
inline Vec exp2_tile(Vec x) {
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  Vec p = splat(1.8793186e-3f);
  p = p * r + 8.990995e-3f;
  p = p * r + 5.5818677e-2f;
  p = p * r + 2.4015927e-1f;
  p = p * r + 6.931517e-1f;
  p = p * r + 1.f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);  // p 2^floor(x)
}

/// Two vectors as bfloat16, to nearest even: the lanes of `first`, then those of `second`.
inline __m512i to_bfloat16_both(Vec first, Vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
/// Lane i of the first and of the second side by side.
inline __m512i pair_lanes(__m512i both) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

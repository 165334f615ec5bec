// Small matrix products on packed float32 tiles: C[M][N] (+)= A[M][K] B[K][N], the lanes of a vector along N.
//   A is read one element at a time and spread over a vector, so it may lie by rows or by columns: no transposed copy
//   of P or dS is ever made. B and C rows hold whole vectors.
//   A block of MR x NV vectors of C stays in registers over the whole of K: 24 sums for 10 loads with AVX-512, so the
//   product runs at the rate of the multipliers as long as B's panel (K x NV vectors) stays in the first-level cache.
//   MR = 8, NV = 3 has fewer loads per sum, but the tiles are 64 wide: a vector would be left over.
#pragma once
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int GEMM_VECTORS = 4;
constexpr int gemm_rows(int vectors) { return vectors == 4 ? 6 : 8; }
#elif defined(__AVX2__)
constexpr int GEMM_VECTORS = 2;
constexpr int gemm_rows(int) { return 6; }
#else
constexpr int GEMM_VECTORS = 2;
constexpr int gemm_rows(int) { return 4; }
#endif

/// How A lies: by_rows A[m * lda + k], by_columns A[k * lda + m].
enum class Lie { by_rows, by_columns };

/// SAFE leaves out the terms where either factor is 0: a NaN or Inf in a key that a query may not see has weight 0, and
/// 0 * NaN must not reach the query.
template <int MR, int NV, Lie LIE, bool ADD, bool SAFE>
inline void gemm_block(int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  Vec total[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) total[m][n] = ADD ? load(c + m * ldc + n * W) : Vec{};
  for (int64_t k = 0; k < K; ++k) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = load(b + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const float scalar = LIE == Lie::by_rows ? a[m * lda] : a[m];
      if constexpr (SAFE) {
        if (scalar == 0.f) continue;
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) total[m][n] += row[n] == Vec{} ? Vec{} : row[n] * scalar;
      } else {
        const Vec spread = splat(scalar);
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) total[m][n] += spread * row[n];
      }
    }
    a += LIE == Lie::by_rows ? 1 : lda;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * W, total[m][n]);
}

template <int NV, Lie LIE, bool ADD, bool SAFE, int MR = gemm_rows(NV)>
inline void gemm_tail(int64_t rows, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                      int64_t ldc) {
  if constexpr (MR > 0) {
    if (rows == MR) return gemm_block<MR, NV, LIE, ADD, SAFE>(K, a, lda, b, ldb, c, ldc);
    gemm_tail<NV, LIE, ADD, SAFE, MR - 1>(rows, K, a, lda, b, ldb, c, ldc);
  }
}

template <int NV, Lie LIE, bool ADD, bool SAFE>
inline void gemm_panel(int64_t M, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                       int64_t ldc) {
  constexpr int MR = gemm_rows(NV);
  const int64_t step = LIE == Lie::by_rows ? lda : 1;
  int64_t m = 0;
  for (; m + MR <= M; m += MR) gemm_block<MR, NV, LIE, ADD, SAFE>(K, a + m * step, lda, b, ldb, c + m * ldc, ldc);
  if (m < M) gemm_tail<NV, LIE, ADD, SAFE, MR - 1>(M - m, K, a + m * step, lda, b, ldb, c + m * ldc, ldc);
}

/// C[M][N] = (ADD: +=) A[M][K] B[K][N]; N is rounded up to whole vectors, which B and C must have room for.
template <Lie LIE, bool ADD, bool SAFE = false>
inline void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc) {
  constexpr int64_t step = GEMM_VECTORS * W;
  int64_t n = 0;
  for (; n + step <= N; n += step) gemm_panel<GEMM_VECTORS, LIE, ADD, SAFE>(M, K, a, lda, b + n, ldb, c + n, ldc);
  const int64_t left = (N - n + W - 1) / W;
  if (left == 1) gemm_panel<1, LIE, ADD, SAFE>(M, K, a, lda, b + n, ldb, c + n, ldc);
  if constexpr (GEMM_VECTORS > 2) {
    if (left == 2) gemm_panel<2, LIE, ADD, SAFE>(M, K, a, lda, b + n, ldb, c + n, ldc);
    if (left == 3) gemm_panel<3, LIE, ADD, SAFE>(M, K, a, lda, b + n, ldb, c + n, ldc);
    if (left == 4) gemm_panel<4, LIE, ADD, SAFE>(M, K, a, lda, b + n, ldb, c + n, ldc);
  } else if (left == 2) {
    gemm_panel<2, LIE, ADD, SAFE>(M, K, a, lda, b + n, ldb, c + n, ldc);
  }
}

/// W x W floats transposed in registers.
inline void transpose(Vec (&x)[W]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 16; half += 8) {
      a[half + i] = _mm512_shuffle_f32x4(b[half + i], b[half + i + 4], 0x88);
      a[half + i + 4] = _mm512_shuffle_f32x4(b[half + i], b[half + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    x[i] = (Vec)_mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    x[i + 8] = (Vec)_mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = (Vec)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    x[i + 4] = (Vec)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = t;
    }
#endif
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

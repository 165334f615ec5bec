// The weight gradient of a linear layer in bfloat16 tiles; linear.cpp has the frame.
//   product   C[32][32] float32 += A[32][m] B[m][32] by 2 x 2 tiles; A = dy^T, B = x, m the rows of both
//   packing   two rows of x side by side ("pairs") are a tile of B as they are; of dy the 32-bit transposition of its
//             pairs is a tile of A. Unpacking pairs leaves columns in the order 0-3, 8-11, ..., then 4-7, 12-15, ...;
//             dW is put right on the way out, N K elements in place of M (N + K).
//   memory    an item sums its block of dW in the second-level cache, over 256 rows at a time that are packed beside
//   it.
//             With 2 x 2 tiles, loads go as fast as products; packing is bound by where dy and x come from
//   measured  on Sapphire Rapids, cycles of 2.6 GHz: 23 a product, 85 a packed tile whether transposed or not
//   lost      x a panel of 32 columns at a time, all rows: a page for each row, 230 cycles a tile; asking for the next
//             panel between products: the requests take the buffers that the tiles' own misses need (23 to 43 cycles)
#pragma once
#include "amx.h"
#include "linear.h"
#include "tile_gemm.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t TILE_BYTES = 1024, STEPS = LINEAR_ROWS / 32;

/// Where the columns of a pair of tiles come from: 16 of each 32.
inline int64_t unpacked(int64_t i) { return (i & 15) / 4 * 8 + (i & 3) + (i & 16) / 4; }

/// 32 rows of 32 columns to two tiles. SUMMED: their sums are added to sums[32], in the tiles' order.
template <bool TRANSPOSED, bool SUMMED>
inline void pack_whole(const bfloat16* x, int64_t stride, int64_t ahead, char* tile, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  Vec first[16], second[16];
  __m512 total = {}, total2 = {};
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(x + 2 * i * stride + ahead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(x + (2 * i + 1) * stride + ahead), _MM_HINT_T0);
    const __m512i low = _mm512_loadu_si512(x + 2 * i * stride), high = _mm512_loadu_si512(x + (2 * i + 1) * stride);
    first[i] = (Vec)_mm512_unpacklo_epi16(low, high), second[i] = (Vec)_mm512_unpackhi_epi16(low, high);
    if constexpr (SUMMED) {
      total = _mm512_dpbf16_ps(total, (__m512bh)first[i], ones);
      total2 = _mm512_dpbf16_ps(total2, (__m512bh)second[i], ones);
    }
  }
  if constexpr (TRANSPOSED) transpose(first), transpose(second);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm512_store_ps(tile + i * 64, (__m512)first[i]);
    _mm512_store_ps(tile + TILE_BYTES + i * 64, (__m512)second[i]);
  }
  if constexpr (SUMMED) store(sums, load(sums) + (Vec)total), store(sums + 16, load(sums + 16) + (Vec)total2);
}

/// The same of fewer rows and columns, zeros behind them.
template <bool TRANSPOSED, bool SUMMED>
inline void pack(const bfloat16* x, int64_t stride, int64_t rows, int64_t columns, char* tile, float* sums) {
  if (rows >= 32 && columns >= 32)
    return pack_whole<TRANSPOSED, SUMMED>(x, stride, rows >= 64 ? 32 * stride : 0, tile, sums);
  alignas(64) bfloat16 whole[32 * 32];
  const __mmask32 mask = columns >= 32 ? ~__mmask32(0) : (__mmask32(1) << columns) - 1;
  for (int i = 0; i < 32; ++i)
    _mm512_store_si512(whole + 32 * i,
                       i < rows ? _mm512_maskz_loadu_epi16(mask, x + i * stride) : _mm512_setzero_si512());
  pack_whole<TRANSPOSED, SUMMED>(whole, 32, 0, tile, sums);
}

/// C[32][32] (ADD: +=) A B over `steps` of 32 rows, from pairs of tiles ROWS apart to four tiles in a row.
template <bool ADD>
inline void weight_block(const char* a, const char* b, int64_t steps, char* c) {
  if constexpr (ADD) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + TILE_BYTES, 64);
    _tile_loadd(2, c + 2 * TILE_BYTES, 64);
    _tile_loadd(3, c + 3 * TILE_BYTES, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const char* const end = a + 2 * steps * TILE_BYTES; a < end; a += 2 * TILE_BYTES, b += 2 * TILE_BYTES) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(5, a + TILE_BYTES, 64);
    _tile_loadd(7, b + TILE_BYTES, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + TILE_BYTES, 64);
  _tile_stored(2, c + 2 * TILE_BYTES, 64);
  _tile_stored(3, c + 3 * TILE_BYTES, 64);
}

/// One item: dW[n0, n1) x [k0, k1).
template <class E>
void weight_item_amx(const WeightGradient<bfloat16>& p, E* dw, float* dbias, int64_t n0, int64_t n1, int64_t k0,
                     int64_t k1, char* scratch) {
  const Tiles configured;
  constexpr int64_t PANEL = (2 * STEPS + 1) * TILE_BYTES, BLOCK = 4 * TILE_BYTES;
  const int64_t across = ceil_div(n1 - n0, 32), along = ceil_div(k1 - k0, 32);
  char* const a = scratch;
  char* const b = a + across * PANEL;
  char* const c = b + along * PANEL;
  float* const sums = reinterpret_cast<float*>(c + across * along * BLOCK);
  std::memset(sums, 0, across * 32 * sizeof(float));
  const auto pack_dy = dbias ? pack<true, true> : pack<true, false>;
  for (int64_t m = 0; m < p.M; m += 32 * STEPS) {
    const int64_t steps = min64(STEPS, ceil_div(p.M - m, 32));
    for (int64_t j = 0; j < across; ++j)
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t row = m + 32 * s;
        char* const tile = a + j * PANEL + 2 * s * TILE_BYTES;
        pack_dy(p.dy + row * p.dy_stride + n0 + 32 * j, p.dy_stride, p.M - row, n1 - n0 - 32 * j, tile, sums + 32 * j);
      }
    for (int64_t k = 0; k < along; ++k)
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t row = m + 32 * s;
        char* const tile = b + k * PANEL + 2 * s * TILE_BYTES;
        pack<false, false>(p.x + row * p.x_stride + k0 + 32 * k, p.x_stride, p.M - row, k1 - k0 - 32 * k, tile,
                           nullptr);
      }
    const auto run = m == 0 ? weight_block<false> : weight_block<true>;
    for (int64_t k = 0; k < along; ++k)
      for (int64_t j = 0; j < across; ++j) run(a + j * PANEL, b + k * PANEL, steps, c + (k * across + j) * BLOCK);
  }
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < across * 32; ++i) {
    const int64_t n = n0 + i / 32 * 32 + unpacked(i & 31);
    if (n >= n1) continue;
    if (dbias) dbias[n] = sums[i];
    for (int64_t k = 0; k < along; ++k) {
      const char* const tile = c + (k * across + i / 32) * BLOCK + (i & 16) * 128 + (i & 15) * 64;
      const __m512 even = _mm512_load_ps(tile), odd = _mm512_load_ps(tile + TILE_BYTES);
      E* const to = dw + n * p.K + k0 + 32 * k;
      const int64_t left = k1 - k0 - 32 * k;
      store_n(to, (Vec)_mm512_permutex2var_ps(even, low, odd), min64(16, left));
      if (left > 16) store_n(to + 16, (Vec)_mm512_permutex2var_ps(even, high, odd), min64(16, left - 16));
    }
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

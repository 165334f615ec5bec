// Tiles of bfloat16 for AMX: products, and the forms of Q, K, V and dO that its two operands want without a
// transposition at the time of use.
//   product  C[16][16] float32 += A[16][32] B[32][16]; A by rows, B with pairs of rows side by side
//   packed   operands lie as whole tiles, 1024 bytes each: a load of a tile takes 10 cycles so, 15 with any other
//            distance between its rows. With four loads for four products (2 x 2 tiles of C) the products then set the
//            pace, 19 cycles each; a store of C takes 18 more that nothing hides, so sums stay in tiles as long as
//            they can.
//   papers   Intel 64 and IA-32 Architectures Software Developer's Manual, chapter on AMX
#pragma once
#include "amx.h"
#include "attention.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int64_t TILE = 256;  // words of a tile

/// Packed tiles of an operand of a product: the first one, and how many words on the next row (of A) or column (of B)
/// of tiles and the next 32 of the summation are.
struct Operand {
  const uint32_t* tiles;
  int64_t along, step;
};

/// 32 x 16 NT elements of C (ADD: +=) the product of 32 `steps` rows of B with as many columns of A.
template <int NT, bool ADD>
inline void tile_product(int64_t steps, Operand a, Operand b, float* c, int64_t ldc) {
  if constexpr (ADD) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16 * ldc, ldc * 4);
    if constexpr (NT > 1) _tile_loadd(2, c + 16, ldc * 4);
    if constexpr (NT > 1) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (NT > 1) _tile_zero(2);
    if constexpr (NT > 1) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a.tiles + s * a.step, 64);
    _tile_loadd(6, b.tiles + s * b.step, 64);
    _tile_loadd(5, a.tiles + s * a.step + a.along, 64);
    if constexpr (NT > 1) _tile_loadd(7, b.tiles + s * b.step + b.along, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (NT > 1) _tile_dpbf16ps(2, 4, 7);
    if constexpr (NT > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16 * ldc, ldc * 4);
  if constexpr (NT > 1) _tile_stored(2, c + 16, ldc * 4);
  if constexpr (NT > 1) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// --- packing --------------------------------------------------------------------------------------------------------

/// Rows of a tensor, as many and as wide as there are; behind them zeros are read.
struct Rows {
  const bfloat16* from;
  int64_t stride, rows, cols;
  __m512i magnitude = _mm512_setzero_si512();  // the largest bits seen, without signs

  /// Columns c .. c + 31 of row r; FULL: all of them are there. Asks for the row 64 further on: the stride is too long
  /// for the hardware to foresee.
  template <bool FULL>
  __m512i read(int64_t r, int64_t c) {
    __mmask32 inside = ~__mmask32(0);
    if constexpr (!FULL) {
      if (r >= rows || c >= cols) return _mm512_setzero_si512();
      if (cols - c < 32) inside = (__mmask32(1) << (cols - c)) - 1;
    }
    const bfloat16* const p = from + r * stride + c;
    _mm_prefetch(reinterpret_cast<const char*>(p + BK * stride), _MM_HINT_T0);
    const __m512i x = FULL ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(inside, p);
    magnitude = _mm512_max_epu16(magnitude, _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)));
    return x;
  }
  /// Whether all that was read is finite.
  bool finite() const { return _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(0x7f80)) == 0; }

  /// f(read) with the read(r, c) that fits.
  template <class F>
  void pack(int64_t padded, int64_t ld, F f) {
    if (rows >= padded && cols >= ld)
      f([&](int64_t r, int64_t c) { return read<true>(r, c); });
    else
      f([&](int64_t r, int64_t c) { return read<false>(r, c); });
  }
};

/// Tiles by rows: [padded / 16][ld / 32] tiles of [16][32] elements. padded: rows, a multiple of 16; ld: columns,
/// of 32.
inline void pack_rows(Rows& x, int64_t padded, int64_t ld, uint32_t* to) {
  x.pack(padded, ld, [&](auto read) {
    for (int64_t m = 0; m < padded; ++m) {
      uint32_t* const row = to + m / 16 * (ld / 32) * TILE + m % 16 * 16;
      for (int64_t c = 0; c < ld; c += 32) _mm512_store_si512(row + c / 32 * TILE, read(m, c));
    }
  });
}

/// The transpose as a paired operand: [ld / 32][padded / 16] tiles of 32 columns of x (16 pairs) by 16 rows of x.
inline void pack_columns(Rows& x, int64_t padded, int64_t ld, uint32_t* to) {
  x.pack(padded, ld, [&](auto read) {
    for (int64_t m = 0; m < padded; m += 16)
      for (int64_t c = 0; c < ld; c += 32) {
        Vec words[W];
        for (int r = 0; r < W; ++r) words[r] = (Vec)read(m + r, c);
        transpose(words);
        uint32_t* const tile = to + (c / 32 * (padded / 16) + m / 16) * TILE;
        for (int i = 0; i < W; ++i) _mm512_store_si512(tile + i * W, (__m512i)words[i]);
      }
  });
}

/// Rows as a paired operand: [padded / 32][ld / 16] tiles of 32 rows (16 pairs) by 16 columns of x. padded: a multiple
/// of 32.
inline void pack_pairs(Rows& x, int64_t padded, int64_t ld, uint32_t* to) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);  // so that unpacking leaves columns in order
  x.pack(padded, ld, [&](auto read) {
    for (int64_t m = 0; m < padded; m += 2)
      for (int64_t c = 0; c < ld; c += 32) {
        const __m512i upper = _mm512_permutexvar_epi64(order, read(m, c));
        const __m512i lower = _mm512_permutexvar_epi64(order, read(m + 1, c));
        uint32_t* const row = to + (m / 32 * (ld / 16) + c / 16) * TILE + m % 32 / 2 * 16;
        _mm512_store_si512(row, _mm512_unpacklo_epi16(upper, lower));
        _mm512_store_si512(row + TILE, _mm512_unpackhi_epi16(upper, lower));
      }
  });
}

/// The transpose by rows: [padded / 32][ld / 16] tiles of 16 columns by 32 rows of x. padded: a multiple of 32.
inline void pack_turned(Rows& x, int64_t padded, int64_t ld, uint32_t* to) {
  x.pack(padded, ld, [&](auto read) {
    for (int64_t m = 0; m < padded; m += 32)
      for (int64_t c = 0; c < ld; c += 32) {
        uint32_t* const tile = to + (m / 32 * (ld / 16) + c / 16) * TILE;
        alignas(64) uint32_t later[TILE];  // 32 vectors at once would not stay in registers
        Vec words[W];
        for (int r = 0; r < W; ++r) {
          const __m512i upper = read(m + 2 * r, c), lower = read(m + 2 * r + 1, c);
          words[r] = (Vec)_mm512_unpacklo_epi16(upper, lower);
          _mm512_store_si512(later + r * W, _mm512_unpackhi_epi16(upper, lower));
        }
        const auto put = [&](int64_t column) {  // words of columns 0-3, 8-11, 16-19, 24-27 from `column` on
          transpose(words);
          for (int i = 0; i < W; ++i)
            _mm512_store_si512(tile + i / 8 * TILE + (i % 8 / 4 * 8 + i % 4 + column) * W, (__m512i)words[i]);
        };
        put(0);
        for (int r = 0; r < W; ++r) words[r] = (Vec)_mm512_load_si512(later + r * W);
        put(4);
      }
  });
}

// --- powers ---------------------------------------------------------------------------------------------------------

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

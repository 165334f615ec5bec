// The backward of attention_backward.cpp in bfloat16 tiles: the same five products, P and dS rounded to bfloat16, all
// sums in float32. Queries go in pairs of tiles, so that the sums of dK and dV are loaded and stored half as often.
// dS is stored in two forms, by rows for dK = dS^T Q and in pairs of keys for dQ^T = K^T dS^T; the latter's transposed
// result is turned on output.
#pragma once
#include "attention_amx.h"
#include "attention_gradients.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t PAIR = 2;  // tiles of queries at a time

/// P^T and dS^T of one tile from logits (powers of e are taken as powers of 2) and dO V^T: by rows of length PAIR * BQ,
/// and dS also in pairs of keys. `vectors` is even. Keys up to the next multiple of 32 get 0 in the pairs.
inline void gradient_tile_amx(const float* x, const float* dx, bfloat16* p_rows, bfloat16* ds_rows, uint32_t* ds_pairs,
                              int64_t keys, int vectors, float scale, const Dropout& dropout, int64_t j0,
                              const float* lse, const float* delta, const float* slope) {
  for (int n = 0; n < vectors; ++n) {
    const Vec l = load(lse + n * W) * LOG2_E, e = load(delta + n * W);
    const auto both = [&](int64_t j, Vec& kept, Vec& ds) {
      const Vec p = exp2_tile(load(x + j * BQ + n * W) * scale - l);
      Vec dp = load(dx + j * BQ + n * W);
      kept = p;
      if (dropout.used) {
        kept = dropout.apply(p, n, j0 + j) * dropout.keep_scale;
        dp = dropout.apply(dp, n, j0 + j) * dropout.keep_scale;
      }
      ds = p * (dp - e);
      if (slope) ds *= load(slope + j * BQ + n * W);
    };
    const auto put_rows = [&](bfloat16* rows, int64_t j, __m512i pair) {
      bfloat16* const to = rows + j * PAIR * BQ + n * W;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(pair));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + PAIR * BQ), _mm512_extracti64x4_epi64(pair, 1));
    };
    int64_t j = 0;
    for (; j < keys; j += 2) {
      Vec p0, p1{}, ds0, ds1{};
      both(j, p0, ds0);
      if (j + 1 < keys) both(j + 1, p1, ds1);
      put_rows(p_rows, j, to_bfloat16_both(p0, p1));
      const __m512i ds = to_bfloat16_both(ds0, ds1);
      put_rows(ds_rows, j, ds);
      _mm512_store_si512(ds_pairs + j / 2 * BQ + n * W, pair_lanes(ds));
    }
    for (; j < round_up(keys, 32); j += 2) _mm512_store_si512(ds_pairs + j / 2 * BQ + n * W, _mm512_setzero_si512());
  }
}

/// backward_item in bfloat16 tiles. False, with nothing written, where a key or value is not finite: masked ones must
/// not leak, and the tiles cannot leave terms out.
inline bool backward_item_amx(const Problem& p, const Gradients& grad, int64_t b, int64_t hk, int64_t first,
                              int64_t last, float* dk, float* dv, float* scratch) {
  Arena arena(scratch);
  const Tiles configured;
  const int64_t Dp = round_up(p.D, 32), Dvp = round_up(p.Dv, 32), Tp = round_up(p.T, BK), tiles = ceil_div(p.S, BQ);
  bfloat16* const k = arena.take<bfloat16>(Tp * Dp);
  bfloat16* const v = arena.take<bfloat16>(Tp * Dvp);
  bfloat16* const kt = arena.take<bfloat16>(Dp * Tp);
  float* const x = arena.take(BK * BQ);
  float* const dx = arena.take(BK * BQ);
  Logits logits(p, arena, true);
  Dropout dropout(p, arena);
  bfloat16* const p_rows = arena.take<bfloat16>(BK * PAIR * BQ);
  bfloat16* const ds_rows = arena.take<bfloat16>(BK * PAIR * BQ);
  uint32_t* const ds_pairs = arena.take<uint32_t>(BK / 2 * BQ);
  uint32_t* const words_of = arena.take<uint32_t>(BK / 2 * max64(Dp, Dvp));  // rows of a tile, then pairs of keys
  bfloat16* const rows_of = reinterpret_cast<bfloat16*>(words_of);
  uint32_t* const qt = arena.take<uint32_t>(PAIR * Dp / 2 * BQ);
  uint32_t* const gt = arena.take<uint32_t>(PAIR * Dvp / 2 * BQ);
  uint32_t* const q_pairs = arena.take<uint32_t>(PAIR * BQ / 2 * Dp);
  uint32_t* const g_pairs = arena.take<uint32_t>(PAIR * BQ / 2 * Dvp);
  float* const dqt = arena.take(PAIR * Dp * BQ);
  float* const lse = arena.take(PAIR * BQ);
  float* const delta = arena.take(PAIR * BQ);

  if (!(copy_rows(at<bfloat16>(p.k, p.ks, b, hk), p.ks[2], p.T, Tp, p.D, k, Dp) &
        copy_rows(at<bfloat16>(p.v, p.vs, b, hk), p.vs[2], p.T, Tp, p.Dv, v, Dvp)))
    return false;
  for (int64_t j = 0; j < Tp; j += BK) {
    interleave(k + j * Dp, Dp, BK, words_of);
    transpose_words(words_of, Dp, BK / 2, Dp, reinterpret_cast<uint32_t*>(kt) + j / 2, Tp / 2);
  }
  std::memset(dk, 0, p.T * Dp * sizeof(float));
  std::memset(dv, 0, p.T * Dvp * sizeof(float));

  for (int64_t item = first; item < last;) {
    const int64_t h = hk * p.group() + item / tiles, i0 = item % tiles * BQ;
    const int64_t count = min64(min64(PAIR, last - item), tiles - item % tiles), i1 = min64(p.S, i0 + count * BQ);
    item += count;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i), padded = round_up(rows, 32);
      read_statistics<bfloat16>(p, grad, b, h, i, rows, lse + c * BQ, delta + c * BQ);
      const auto take = [&](const void* from, const Strides& s, int64_t D, int64_t ld, uint32_t* columns,
                            uint32_t* pairs) {
        copy_rows(at<bfloat16>(from, s, b, h, i), s[2], rows, padded, D, rows_of, ld);
        for (int64_t r = 0; r < rows; ++r)  // a query that saw no key may hold NaN, and 0 * NaN is NaN
          if (lse[c * BQ + r] == INF) std::memset(static_cast<void*>(rows_of + r * ld), 0, ld * sizeof(bfloat16));
        transpose_words(words_of, ld / 2, padded, ld / 2, columns + c * ld / 2 * BQ, BQ);
        interleave(rows_of, ld, padded, pairs + c * BQ / 2 * ld);
      };
      take(p.q, p.qs, p.D, Dp, qt, q_pairs);
      take(grad.dout, grad.gs, p.Dv, Dvp, gt, g_pairs);
    }
    std::memset(dqt, 0, count * Dp * BQ * sizeof(float));
    for (int64_t j0 = p.first_key(i0); j0 < p.keys(i1); j0 += BK) {
      const int64_t keys = min64(BK, p.T - j0);
      int64_t begin = count, end = 0;  // the tiles that see a key of this one
      for (int64_t c = 0; c < count; ++c) {
        const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i);
        const int vectors = static_cast<int>(round_up(rows, 32) / W);
        if (!logits.read(b, h, i, rows, j0, keys)) {
          if (begin < count)
            for (int64_t j = 0; j < keys; ++j) {
              std::memset(static_cast<void*>(p_rows + (j * PAIR + c) * BQ), 0, BQ * sizeof(bfloat16));
              std::memset(static_cast<void*>(ds_rows + (j * PAIR + c) * BQ), 0, BQ * sizeof(bfloat16));
            }
          continue;
        }
        begin = min64(begin, c);
        end = c + 1;
        tile_gemm<false>(keys, vectors * W, Dp, k + j0 * Dp, Dp, qt + c * Dp / 2 * BQ, BQ, x, BQ);
        tile_gemm<false>(keys, vectors * W, Dvp, v + j0 * Dvp, Dvp, gt + c * Dvp / 2 * BQ, BQ, dx, BQ);
        float scale = p.scale * LOG2_E;
        if (!logits.plain) {
          logits.transform(x, vectors);
          scale = LOG2_E;
        }
        dropout.set_rows(p, b, h, i);
        gradient_tile_amx(x, dx, p_rows + c * BQ, ds_rows + c * BQ, ds_pairs, keys, vectors, scale, dropout, j0,
                          lse + c * BQ, delta + c * BQ, logits.slope);
        tile_gemm<true>(p.D, vectors * W, keys, kt + j0, Tp, ds_pairs, BQ, dqt + c * Dp * BQ, BQ);
      }
      if (begin >= end) continue;
      const int64_t queries = min64(end * BQ, i1 - i0) - begin * BQ, skipped = begin * BQ / 2;
      tile_gemm<true>(keys, p.Dv, queries, p_rows + begin * BQ, PAIR * BQ, g_pairs + skipped * Dvp, Dvp, dv + j0 * Dvp,
                      Dvp);
      tile_gemm<true>(keys, p.D, queries, ds_rows + begin * BQ, PAIR * BQ, q_pairs + skipped * Dp, Dp, dk + j0 * Dp,
                      Dp);
    }
    Vec factor[NV];
    for (Vec& f : factor) f = splat(p.scale);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t i = i0 + c * BQ;
      store_transposed(dqt + c * Dp * BQ, factor, min64(BQ, i1 - i), p.D, at<bfloat16>(grad.dq, grad.dqs, b, h, i),
                       grad.dqs[2]);
    }
  }
  for (int64_t c = 0; c < p.T * Dp; c += W) store(dk + c, load(dk + c) * p.scale);
  return true;
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

// The forward of attention_forward.cpp in bfloat16 tiles: P is rounded to bfloat16, all sums are float32.
#pragma once
#include "attention_amx.h"
#include "attention_forward.h"

namespace fastlm::FASTLM_ISA {
namespace {

/// softmax_tile with powers of 2, to bfloat16 pairs of keys: [BK / 2][BQ]. Keys up to the next multiple of 32 get 0.
inline void softmax_pairs(const float* x, uint32_t* pairs, int64_t keys, int vectors, float scale,
                          const Dropout& dropout, int64_t j0, Running& run, int64_t Dv) {
  for (int n = 0; n < vectors; ++n) {
    const float* const column = x + n * W;
    const Vec center = raise_maximum(column_maximum(column, keys, scale), RESCALE * LOG2_E, n, run, Dv, exp2_tile);
    Vec total[2] = {load(run.total + n * W), Vec{}};
    int64_t j = 0;
    for (; j < keys; j += 2) {
      Vec first = exp2_tile(load(column + j * BQ) * scale - center);
      Vec second = j + 1 < keys ? exp2_tile(load(column + (j + 1) * BQ) * scale - center) : Vec{};
      total[0] += first;
      total[1] += second;
      if (dropout.used) first = dropout.apply(first, n, j0 + j), second = dropout.apply(second, n, j0 + j + 1);
      _mm512_store_si512(pairs + j / 2 * BQ + n * W, pair_lanes(to_bfloat16_both(first, second)));
    }
    for (; j < round_up(keys, 32); j += 2) _mm512_store_si512(pairs + j / 2 * BQ + n * W, _mm512_setzero_si512());
    store(run.total + n * W, total[0] + total[1]);
  }
}

/// forward_item in bfloat16 tiles.
void forward_item_amx(const Problem& p, void* out, const Strides& os, float* lse, int64_t b, int64_t h, int64_t i0,
                      float* scratch) {
  Arena arena(scratch);
  const Tiles tiles;
  const int64_t i1 = min64(p.S, i0 + CHUNK), blocks = ceil_div(i1 - i0, BQ);
  const int64_t Dp = round_up(p.D, 32), Dvp = round_up(p.Dv, 32), hk = h / p.group();
  bfloat16* const kt = arena.take<bfloat16>(BK * Dp);
  bfloat16* const v = arena.take<bfloat16>(BK * Dvp);
  uint32_t* const v_pairs = arena.take<uint32_t>(BK / 2 * Dvp);
  bfloat16* const vt = arena.take<bfloat16>(Dvp * BK);
  float* const x = arena.take(BK * BQ);
  uint32_t* const pairs = arena.take<uint32_t>(BK / 2 * BQ);
  Logits logits(p, arena);
  Dropout dropout(p, arena);
  uint32_t* qt[CHUNK / BQ];
  Running run[CHUNK / BQ];
  for (int64_t c = 0; c < blocks; ++c) {
    qt[c] = arena.take<uint32_t>(Dp / 2 * BQ);
    run[c] = {arena.take(BQ), arena.take(BQ), arena.take(Dvp * BQ)};
    run[c].start(Dvp);
    const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i), padded = round_up(rows, 16);
    copy_rows(at<bfloat16>(p.q, p.qs, b, h, i), p.qs[2], rows, padded, p.D, kt, Dp);
    transpose_words(words(kt), Dp / 2, padded, Dp / 2, qt[c], BQ);
  }
  for (int64_t j0 = p.first_key(i0); j0 < p.keys(i1); j0 += BK) {
    const int64_t keys = min64(BK, p.T - j0), padded = round_up(keys, 32);
    bool packed = false, finite = true;
    for (int64_t c = 0; c < blocks; ++c) {
      const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i);
      if (!logits.read(b, h, i, rows, j0, keys)) continue;
      if (!packed) {
        copy_rows(at<bfloat16>(p.k, p.ks, b, hk, j0), p.ks[2], keys, padded, p.D, kt, Dp);
        finite = copy_rows(at<bfloat16>(p.v, p.vs, b, hk, j0), p.vs[2], keys, padded, p.Dv, v, Dvp);
        interleave(v, Dvp, padded, v_pairs);
        transpose_words(v_pairs, Dvp, round_up(padded / 2, 16), Dvp, reinterpret_cast<uint32_t*>(vt), BK / 2);
        packed = true;
      }
      const int vectors = static_cast<int>(ceil_div(rows, W));
      tile_gemm<false>(keys, rows, Dp, kt, Dp, qt[c], BQ, x, BQ);
      float scale = p.scale * LOG2_E;
      if (!logits.plain) {
        logits.transform(x, vectors);
        scale = LOG2_E;
      }
      if (dropout.used) dropout.set_rows(p, b, h, i);
      softmax_pairs(x, pairs, keys, vectors, scale, dropout, j0, run[c], Dvp);
      if (finite) {
        tile_gemm<true>(p.Dv, rows, keys, vt, BK, pairs, BQ, run[c].out, BQ);
        continue;
      }
      for (int64_t j = 0; j < keys; ++j)  // a NaN among the values: the terms of weight 0 must be left out
        for (int64_t n = 0; n < vectors * W; ++n) {
          const bfloat16 weight{static_cast<uint16_t>(pairs[j / 2 * BQ + n] >> (j % 2 * 16))};
          if (weight.bits == 0) continue;
          for (int64_t d = 0; d < p.Dv; ++d)
            run[c].out[d * BQ + n] += from_bfloat16(Half{weight.bits})[0] * from_bfloat16(Half{v[j * Dvp + d].bits})[0];
        }
    }
  }
  for (int64_t c = 0; c < blocks; ++c) {
    const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i);
    finish<bfloat16>(p, run[c], dropout.keep_scale, LN_2, out, os, lse, b, h, i, rows);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

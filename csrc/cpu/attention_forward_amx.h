// The forward of attention_forward.cpp in bfloat16 tiles: P is rounded to bfloat16, all sums are float32.
//   order    BLOCK keys are packed, then every 64 queries of the item pass over them: logits and powers of 64 keys at
//            a time, the product with V for SPAN of them together, because loads and stores of O^T cost as much as
//            half of that product.
//   maximum  taken over the first keys a query sees. Later ones are raised to powers about the maximum so far at once:
//            any center will do as long as the powers stay below LIMIT, which their sum tells. Only where it does not,
//            the maximum is looked for and the sums rescaled.
#pragma once
#include "attention_amx.h"
#include "attention_forward.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t SPAN = 2 * BK;             // keys of one product with V
constexpr int64_t BLOCK = ATTENTION_KEYS;    // keys that are packed at a time
constexpr int64_t UNIT = 32;                 // queries that pass over the keys together, where there is no mask
constexpr int64_t LANES = SPAN / 32 * TILE;  // words of the pairs of one vector of queries
constexpr float LIMIT = 4096.f;

/// Which keys of a tile one vector of queries sees: all lanes those below `all`, lane i those up to last[i], no lane
/// those from `end` on.
struct Seen {
  int64_t all, end;
  Int last;

  Seen(int64_t keys, int64_t visible, int n)
      : all(min64(keys, n * W + visible + 1)),
        end(min64(keys, n * W + visible + W)),
        last(lanes(n) + static_cast<int32_t>(min64(visible, BK))) {}
  Vec limit(Vec x, int64_t j, float otherwise) const {
    return last < splat_int(static_cast<int32_t>(j)) ? splat(otherwise) : x;
  }
};

/// Powers of 2 of one vector of queries, to bfloat16 pairs of keys (0 up to the next multiple of 32); returns their
/// sums before they are rounded.
template <bool DROP>
inline Vec powers(const float* x, uint32_t* pairs, int64_t keys, const Seen& seen, float scale, Vec center,
                  const Dropout& dropout, int n, int64_t j0) {
  Vec total[2] = {};
  const auto put = [&](int64_t j, Vec first, Vec second) {
    total[0] += first;
    total[1] += second;
    if constexpr (DROP) first = dropout.apply(first, n, j0 + j), second = dropout.apply(second, n, j0 + j + 1);
    _mm512_store_si512(pairs + j / 2 * W, pair_lanes(to_bfloat16_both(first, second)));
  };
  const auto power = [&](int64_t j) { return exp2_tile(load(x + j * BQ) * scale - center); };
  int64_t j = 0;
  for (; j + 1 < seen.all; j += 2) put(j, power(j), power(j + 1));
  for (; j < seen.end; j += 2)
    put(j, seen.limit(power(j), j, 0.f), j + 1 < seen.end ? seen.limit(power(j + 1), j + 1, 0.f) : Vec{});
  for (; j < round_up(keys, 32); j += 2) _mm512_store_si512(pairs + j / 2 * W, _mm512_setzero_si512());
  return total[0] + total[1];
}

/// Up to 64 queries on their way over the keys.
struct ForwardTile {
  Operand q;  // as pack_columns has it
  Running run;
  int64_t Dp, Dvp;
  int vectors;
  uint32_t* pairs;            // P^T of SPAN keys: [vectors][SPAN / 32] tiles
  const uint32_t* v;          // the values of those keys, as pack_turned has them
  int64_t begin = 0;          // of the powers that are not in the output yet, in 32 keys
  int64_t ends[NV / 2] = {};  // and their end for each 32 queries

  /// S^T of 64 keys. Blocks that no query sees are left as they are.
  void logits(const uint32_t* k, int64_t keys, int64_t visible, float* x) const {
    const int64_t steps = Dp / 32;
    for (int n = 0; n < vectors; n += 2)
      for (int64_t m = 0; m < min64(keys, n * W + 2 * W + visible); m += 32) {
        const Operand a{k + m / 16 * steps * TILE, steps * TILE, TILE}, b{q.tiles + n * TILE, q.along, q.step};
        float* const to = x + m * BQ + n * W;
        vectors - n > 1 ? tile_product<2, false>(steps, a, b, to, BQ) : tile_product<1, false>(steps, a, b, to, BQ);
      }
  }

  /// Adds V^T P^T of the powers that are left to the output.
  void flush() {
    for (int n = 0; n < vectors; n += 2) {
      const int64_t steps = ends[n / 2] - begin;
      ends[n / 2] = 0;
      if (steps <= 0) continue;
      const Operand b{pairs + n * LANES + begin * TILE, LANES, TILE};
      for (int64_t d = 0; d < Dvp; d += 32) {
        const Operand a{v + (begin * Dvp + d) / 16 * TILE, TILE, Dvp / 16 * TILE};
        float* const to = run.out + d * BQ + n * W;
        vectors - n > 1 ? tile_product<2, true>(steps, a, b, to, BQ) : tile_product<1, true>(steps, a, b, to, BQ);
      }
    }
    begin = SPAN;
  }

  /// One step of the online softmax: logits of up to 64 keys -> powers, from `at` (in 32 keys) of the pairs on.
  template <bool DROP>
  void softmax(const float* x, int64_t at, int64_t keys, float scale, int64_t visible, const Dropout& dropout,
               int64_t j0) {
    for (int n = 0; n < vectors; ++n) {
      const Seen seen(keys, visible, n);
      const float* const column = x + n * W;
      uint32_t* const to = pairs + n * LANES + at * TILE;
      const auto take = [&](Vec center) { return powers<DROP>(column, to, keys, seen, scale, center, dropout, n, j0); };
      const Vec center = load(run.maximum + n * W), before = load(run.total + n * W);
      const float least = -max(-center);
      if (least > -INF) {
        const Vec total = take(center);
        if (max(total <= splat(LIMIT) ? Vec{} : splat(1.f)) == 0.f) {
          store(run.total + n * W, before + total);
          continue;
        }
      }
      Vec highest = splat(-INF);
      for (int64_t j = 0; j < seen.end; ++j) {
        const Vec logit = load(column + j * BQ) * scale;
        highest = vmax(j < seen.all ? logit : seen.limit(logit, j, -INF), highest);
      }
      flush();
      const Vec raised = raise_maximum(highest, RESCALE * LOG2_E, n, run, Dvp, exp2_tile);
      const Vec total = take(raised);
      store(run.total + n * W, load(run.total + n * W) + total);
    }
    begin = min64(begin, at);
    for (int n = 0; n < vectors; n += 2) {
      const int64_t end = min64(keys, n * W + 2 * W + visible);
      if (end > 0) ends[n / 2] = at + ceil_div(end, 32);
    }
  }

  /// The same as flush() for up to 64 keys among whose values is a NaN or an infinity: terms of weight 0 are left out.
  void add_infinite(const bfloat16* values, int64_t stride, int64_t Dv, int64_t keys) {
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t i = 0; i < vectors * W; ++i) {
        const uint32_t pair = pairs[i / W * LANES + begin * TILE + j / 2 * W + i % W];
        const uint16_t weight = static_cast<uint16_t>(pair >> (j % 2 * 16));
        if (weight == 0) continue;
        for (int64_t d = 0; d < Dv; ++d)
          run.out[d * BQ + i] += from_bfloat16(Half{weight})[0] * from_bfloat16(Half{values[j * stride + d].bits})[0];
      }
    begin = SPAN;
    for (int64_t& end : ends) end = 0;
  }
};

/// forward_item in bfloat16 tiles.
void forward_item_amx(const Problem& p, void* out, const Strides& os, float* lse, int64_t b, int64_t h, int64_t i0,
                      float* scratch) {
  Arena arena(scratch);
  const Tiles configured;
  const int64_t i1 = min64(p.S, i0 + CHUNK), blocks = ceil_div(i1 - i0, BQ);
  const int64_t Dp = round_up(p.D, 32), Dvp = round_up(p.Dv, 32), hk = h / p.group();
  uint32_t* const k = arena.take<uint32_t>(BLOCK * Dp / 2);
  uint32_t* const v = arena.take<uint32_t>(BLOCK * Dvp / 2);
  float* const x = arena.take(BK * BQ);
  uint32_t* const pairs = arena.take<uint32_t>(NV * LANES);
  Logits logits(p, arena);
  Dropout dropout(p, arena);
  uint32_t* qt[CHUNK / BQ];
  Running run[CHUNK / BQ];
  for (int64_t c = 0; c < blocks; ++c) {
    qt[c] = arena.take<uint32_t>(Dp / 2 * BQ);
    run[c] = {arena.take(BQ), arena.take(BQ), arena.take(Dvp * BQ)};
    run[c].start(Dvp);
    const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i);
    Rows queries{at<bfloat16>(p.q, p.qs, b, h, i), p.qs[2], rows, p.D};
    pack_columns(queries, round_up(rows, W), Dp, qt[c]);
  }
  // What an ordinary problem hides lies behind the diagonal, and the powers are not taken there.
  const bool ordinary = !p.mask && !p.options.documents_q && !p.options.alibi && p.options.softcap == 0.f;
  const int64_t T = p.keys(i1), unit = ordinary ? UNIT : BQ;
  for (int64_t k0 = p.first_key(i0); k0 < T; k0 += BLOCK) {
    bool packed[BLOCK / BK] = {}, finite[BLOCK / BK];
    for (int64_t i = i0; i < i1; i += unit) {
      const int64_t c = (i - i0) / BQ, lane = (i - i0) % BQ, rows = min64(unit, i1 - i);
      const int64_t tiles = ceil_div(min64(BQ, i1 - i0 - c * BQ), W);
      const Running own{run[c].maximum + lane, run[c].total + lane, run[c].out + lane};
      ForwardTile tile{{qt[c] + lane / W * TILE, TILE, tiles * TILE}, own,   Dp,      Dvp,
                       static_cast<int>(ceil_div(rows, W)),           pairs, nullptr, SPAN};
      if (dropout.used) dropout.set_rows(p, b, h, i);
      for (int64_t t = 0; t < BLOCK / BK; ++t) {
        const int64_t j0 = k0 + t * BK, keys = min64(BK, p.T - j0), visible = i + p.offset() + p.right - j0;
        if (keys <= 0 || visible + rows <= 0) break;
        if (t % 2 == 0) {
          tile.flush();
          tile.v = v + t * BK * Dvp / 2;
        }
        if (!logits.read(b, h, i, rows, j0, keys)) continue;
        if (!packed[t]) {
          packed[t] = true;
          Rows of_k{at<bfloat16>(p.k, p.ks, b, hk, j0), p.ks[2], keys, p.D};
          Rows of_v{at<bfloat16>(p.v, p.vs, b, hk, j0), p.vs[2], keys, p.Dv};
          pack_rows(of_k, round_up(keys, 32), Dp, k + t * BK * Dp / 2);
          pack_turned(of_v, round_up(keys, 32), Dvp, v + t * BK * Dvp / 2);
          finite[t] = of_v.finite();
        }
        const bool left_open = i + rows - 1 + p.offset() - p.options.left <= j0;
        const bool direct = logits.plain || (ordinary && left_open);
        const int64_t seen = direct ? visible : BK;
        tile.logits(k + t * BK * Dp / 2, keys, seen, x);
        if (!direct) logits.transform(x, tile.vectors);
        const float scale = direct ? p.scale * LOG2_E : LOG2_E;
        if (!finite[t]) tile.flush();
        if (dropout.used)
          tile.softmax<true>(x, t % 2 * (BK / 32), keys, scale, seen, dropout, j0);
        else
          tile.softmax<false>(x, t % 2 * (BK / 32), keys, scale, seen, dropout, j0);
        if (!finite[t]) tile.add_infinite(at<bfloat16>(p.v, p.vs, b, hk, j0), p.vs[2], p.Dv, keys);
      }
      tile.flush();
    }
  }
  for (int64_t c = 0; c < blocks; ++c) {
    const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i);
    finish<bfloat16>(p, run[c], dropout.keep_scale, LN_2, out, os, lse, b, h, i, rows);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

// The backward of attention_backward.cpp in bfloat16 tiles: the same five products, P and dS rounded to bfloat16, all
// sums in float32.
//   order    As many keys as the second-level cache holds are packed, with their sums dK and dV; groups of 256 queries
//            pass over them. A load and a store of a sum take 20 cycles a tile from the first-level cache, 67 from the
//            second, where the sums are, so each is done for many products: dK and dV of 32 keys once for the group,
//            dQ once for SPAN keys.
//   step     32 keys and 64 queries: S^T and dP^T, then P^T and dS^T by rows for dV = P^T dO and dK = dS^T Q, and dS
//            in pairs of keys for dQ^T = K^T dS^T. Pairs come from unpacking two rows, which leaves 32 queries in the
//            order 0-3, 8-11, 16-19, 24-27, 4-7, ..: dQ is turned and put in order on output.
//   memory   rows that come next are asked for between the steps: from beyond the cache they would take as long as the
//            arithmetic of a third of a group
#pragma once
#include "attention_amx.h"
#include "attention_gradients.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t GROUP = ATTENTION_GROUP;           // tiles of queries at a time
constexpr int64_t GROUP_STEPS = GROUP * BQ / 32;     // of 32 queries
constexpr int64_t SPAN_STEPS = ATTENTION_SPAN / 32;  // of 32 keys, between two additions to dQ

/// Rows to be asked for ahead of time.
struct Ahead {
  const char* from = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0;

  Ahead() = default;
  Ahead(const bfloat16* from, int64_t stride, int64_t rows, int64_t cols)
      : from(reinterpret_cast<const char*>(from)), stride(stride * 2), bytes(cols * 2), rows(rows) {}
  void ask(int64_t count) {
    for (; rows > 0 && count > 0; --rows, --count, from += stride)
      for (int64_t c = 0; c < bytes; c += 64) _mm_prefetch(from + c, _MM_HINT_T1);
  }
};

/// 2^x within 4e-6, for what is rounded to bfloat16 next.
inline Vec exp2_rough(Vec x) {
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = splat(0.013534167f);
  p = p * r + 0.05201146f;
  p = p * r + 0.24144275f;
  p = p * r + 0.69300383f;
  p = p * r + 1.0000026f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}

/// Where P^T and dS^T of 32 keys and 32 queries go: by rows, two tiles `along` apart, and dS in pairs of keys, two
/// tiles one behind the other.
struct GradientTiles {
  uint32_t *p, *ds;
  int64_t along;
  uint32_t* pairs;

  void clear() const {
    for (int64_t m = 0; m < 2; ++m) {
      std::memset(p + m * along, 0, TILE * 4);
      std::memset(ds + m * along, 0, TILE * 4);
      std::memset(pairs + m * TILE, 0, TILE * 4);
    }
  }
};

/// P^T and dS^T of 32 keys and 32 queries, vectors n and n + 1 of a tile, from logits (powers of e are taken as powers
/// of 2) and dO V^T, rows of length BQ. Lane i of vector n sees the keys up to i + visible, below `keys`.
/// PLAIN: no dropout and no slope of a softcap.
template <bool PLAIN>
inline void gradient_block(const float* x, const float* dx, const GradientTiles& to, int64_t keys, int64_t visible,
                           float scale, const Dropout& dropout, int n, int64_t j0, const float* lse, const float* delta,
                           const float* slope) {
  const Vec l[2] = {load(lse) * LOG2_E, load(lse + W) * LOG2_E}, e[2] = {load(delta), load(delta + W)};
  const Int last[2] = {lanes(0) + static_cast<int32_t>(min64(visible, BK)),
                       lanes(1) + static_cast<int32_t>(min64(visible, BK))};
  const int64_t all = min64(keys, visible + 1), end = min64(keys, visible + 2 * W);
  const auto row = [&](int64_t j, bool limited, __m512i& p_row, __m512i& ds_row) {
    Vec p[2], ds[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      Vec power = exp2_rough(load(x + j * BQ + u * W) * scale - l[u]);
      Vec dp = load(dx + j * BQ + u * W);
      if (limited) power = last[u] < splat_int(static_cast<int32_t>(j)) ? Vec{} : power;
      p[u] = power;
      if (!PLAIN && dropout.used) {
        p[u] = dropout.apply(power, n + u, j0 + j) * dropout.keep_scale;
        dp = dropout.apply(dp, n + u, j0 + j) * dropout.keep_scale;
      }
      ds[u] = power * (dp - e[u]);
      if (!PLAIN && slope) ds[u] *= load(slope + j * BQ + u * W);
    }
    p_row = to_bfloat16_both(p[0], p[1]);
    ds_row = to_bfloat16_both(ds[0], ds[1]);
  };
  const auto put = [&](int64_t j, __m512i p0, __m512i p1, __m512i ds0, __m512i ds1) {
    const int64_t at = j / 16 * to.along + j % 16 * 16;
    _mm512_store_si512(to.p + at, p0);
    _mm512_store_si512(to.p + at + 16, p1);
    _mm512_store_si512(to.ds + at, ds0);
    _mm512_store_si512(to.ds + at + 16, ds1);
    _mm512_store_si512(to.pairs + j / 2 * 16, _mm512_unpacklo_epi16(ds0, ds1));
    _mm512_store_si512(to.pairs + j / 2 * 16 + TILE, _mm512_unpackhi_epi16(ds0, ds1));
  };
  const __m512i none = _mm512_setzero_si512();
  __m512i p0, p1, ds0, ds1;
  int64_t j = 0;
  for (; j + 1 < all; j += 2) {
    row(j, false, p0, ds0);
    row(j + 1, false, p1, ds1);
    put(j, p0, p1, ds0, ds1);
  }
  for (; j < end; j += 2) {
    row(j, true, p0, ds0);
    p1 = ds1 = none;
    if (j + 1 < end) row(j + 1, true, p1, ds1);
    put(j, p0, p1, ds0, ds1);
  }
  for (; j < 32; j += 2) put(j, none, none, none, none);
}

/// dQ^T of up to 64 queries, whose lanes are in the order of the pairs, to rows.
inline void store_queries(const float* from, float scale, int64_t rows, int64_t cols, bfloat16* to, int64_t stride) {
  for (int64_t n = 0; n < round_up(rows, 32); n += W)
    for (int64_t c = 0; c < cols; c += W) {
      Vec x[W];
      for (int i = 0; i < W; ++i) x[i] = load(from + (c + i) * BQ + n) * scale;
      transpose(x);
      for (int64_t i = 0; i < W; ++i) {
        const int64_t r = n / 32 * 32 + i / 4 * 8 + n % 32 / 16 * 4 + i % 4;
        if (r >= rows) continue;
        if (cols - c >= W)
          store(to + r * stride + c, x[i]);
        else
          store_n(to + r * stride + c, x[i], cols - c);
      }
    }
}

/// backward_item in bfloat16 tiles. False where a key or value is not finite, and then all of the item is to be done
/// again: masked ones must not leak, and the tiles cannot leave terms out.
inline bool backward_item_amx(const Problem& p, const Gradients& grad, int64_t b, int64_t hk, int64_t first,
                              int64_t last, float* dk, float* dv, float* scratch) {
  Arena arena(scratch);
  const Tiles configured;
  const int64_t Dp = round_up(p.D, 32), Dvp = round_up(p.Dv, 32), tiles = ceil_div(p.S, BQ);
  const int64_t held = attention_backward_keys(p.D, p.Dv);
  constexpr int64_t SPAN = ATTENTION_SPAN;
  uint32_t* const k = arena.take<uint32_t>(held * Dp / 2);
  uint32_t* const v = arena.take<uint32_t>(held * Dvp / 2);
  uint32_t* const kt = arena.take<uint32_t>(held * Dp / 2);
  float* const x = arena.take(32 * BQ);
  float* const dx = arena.take(32 * BQ);
  Logits logits(p, arena, true);
  uint32_t* const p_rows = arena.take<uint32_t>(2 * GROUP_STEPS * TILE);
  uint32_t* const ds_rows = arena.take<uint32_t>(2 * GROUP_STEPS * TILE);
  uint32_t* const ds_pairs = arena.take<uint32_t>(2 * GROUP_STEPS * SPAN_STEPS * TILE);
  bfloat16* const seeing = arena.take<bfloat16>(BQ * max64(Dp, Dvp));
  uint32_t* const qt = arena.take<uint32_t>(GROUP * BQ * Dp / 2);
  uint32_t* const gt = arena.take<uint32_t>(GROUP * BQ * Dvp / 2);
  uint32_t* const q_pairs = arena.take<uint32_t>(GROUP * BQ * Dp / 2);
  uint32_t* const g_pairs = arena.take<uint32_t>(GROUP * BQ * Dvp / 2);
  // What an ordinary problem hides lies behind the diagonal, and the powers are not taken there.
  const bool ordinary = !p.mask && !p.options.documents_q && !p.options.alibi && p.options.softcap == 0.f;
  const bool once = p.T <= held;  // then dQ and the statistics are only of interest to one group
  const int64_t kept = once ? GROUP : last - first;
  float* const lse_all = arena.take(kept * BQ);
  float* const delta_all = arena.take(kept * BQ);
  float* const dqt_all = arena.take(kept * BQ * Dp);
  Dropout dropouts[GROUP] = {Dropout(p, arena), Dropout(p, arena), Dropout(p, arena), Dropout(p, arena)};

  for (int64_t k0 = 0; k0 < max64(p.T, 1); k0 += held) {
    const int64_t k1 = min64(p.T, k0 + held);
    bool packed[ATTENTION_HELD / SPAN] = {};
    std::memset(dk + k0 * Dp, 0, (k1 - k0) * Dp * sizeof(float));
    std::memset(dv + k0 * Dvp, 0, (k1 - k0) * Dvp * sizeof(float));
    for (int64_t item = first, next; item < last; item = next) {
      const int64_t h = hk * p.group() + item / tiles, i0 = item % tiles * BQ;
      const int64_t count = min64(min64(GROUP, last - item), tiles - item % tiles), i1 = min64(p.S, i0 + count * BQ);
      const int64_t reach = p.keys(i1), slot = once ? 0 : item - first, steps = ceil_div(i1 - i0, 32);
      next = item + count;
      if (k0 > 0 && reach <= k0) continue;
      float* const lse = lse_all + slot * BQ;
      float* const delta = delta_all + slot * BQ;
      float* const dqt = dqt_all + slot * BQ * Dp;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i), padded = round_up(rows, 32);
        if (k0 == 0) read_statistics<bfloat16>(p, grad, b, h, i, rows, lse + c * BQ, delta + c * BQ);
        dropouts[c].set_rows(p, b, h, i);
        bool unseen = false;  // a query that saw no key may hold NaN, and 0 * NaN is NaN
        for (int64_t r = 0; r < rows; ++r) unseen |= lse[c * BQ + r] == INF;
        const auto take = [&](const void* from, const Strides& s, int64_t D, int64_t ld, uint32_t* columns,
                              uint32_t* pairs) {
          Rows x{at<bfloat16>(from, s, b, h, i), s[2], rows, D};
          if (unseen) {
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t d = 0; d < D; ++d)
                seeing[r * ld + d] = lse[c * BQ + r] == INF ? bfloat16{} : x.from[r * x.stride + d];
            x = Rows{seeing, ld, rows, D};
          }
          pack_columns(x, padded, ld, columns + c * BQ * ld / 2);
          pack_pairs(x, padded, ld, pairs + c * BQ * ld / 2);
        };
        take(p.q, p.qs, p.D, Dp, qt, q_pairs);
        take(grad.dout, grad.gs, p.Dv, Dvp, gt, g_pairs);
      }
      if (k0 == 0) std::memset(dqt, 0, count * Dp * BQ * sizeof(float));
      Ahead ahead[3];
      if (next < last) {
        const int64_t other = hk * p.group() + next / tiles, i = next % tiles * BQ, rows = min64(GROUP * BQ, p.S - i);
        ahead[0] = Ahead(at<bfloat16>(p.q, p.qs, b, other, i), p.qs[2], rows, p.D);
        ahead[1] = Ahead(at<bfloat16>(grad.dout, grad.gs, b, other, i), grad.gs[2], rows, p.Dv);
        if (k0 == 0) ahead[2] = Ahead(at<bfloat16>(grad.out, grad.os, b, other, i), grad.os[2], rows, p.Dv);
      }
      const int64_t seen_from = max64(0, p.first_key(i0) - k0) / SPAN * SPAN;
      for (int64_t s0 = k0 + seen_from; s0 < min64(reach, k1); s0 += SPAN) {
        if (bool& done = packed[(s0 - k0) / SPAN]; !done) {
          done = true;
          const int64_t rows = min64(SPAN, k1 - s0), padded = round_up(rows, 32), at_row = (s0 - k0) / 2;
          Rows of_k{at<bfloat16>(p.k, p.ks, b, hk, s0), p.ks[2], rows, p.D};
          Rows of_v{at<bfloat16>(p.v, p.vs, b, hk, s0), p.vs[2], rows, p.Dv};
          pack_rows(of_k, padded, Dp, k + at_row * Dp);
          pack_turned(of_k, padded, Dp, kt + at_row * Dp);
          pack_rows(of_v, padded, Dvp, v + at_row * Dvp);
          if (!of_k.finite() || !of_v.finite()) return false;
        }
        int64_t ends[GROUP_STEPS] = {};  // steps of keys that 32 queries have seen something of
        for (int64_t s = 0; s < SPAN_STEPS && s0 + s * 32 < min64(reach, k1); ++s) {
          const int64_t j0 = s0 + s * 32, keys = min64(32, p.T - j0);
          const uint32_t* const k_rows = k + (j0 - k0) / 2 * Dp;
          const uint32_t* const v_rows = v + (j0 - k0) / 2 * Dvp;
          int64_t begin = steps, end = 0;  // the steps of queries that see one of these keys
          for (int64_t c = 0; c < count; ++c) {
            const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i), visible = i + p.offset() + p.right - j0;
            const int vectors = static_cast<int>(round_up(rows, 32) / W);
            if (visible + rows <= 0) continue;
            const bool any = logits.read(b, h, i, rows, j0, keys);
            const bool left_open = i + rows - 1 + p.offset() - p.options.left <= j0;
            const bool direct = logits.plain || (ordinary && left_open);
            const int64_t seen = direct ? visible : BK;
            for (Ahead& rows_of : ahead) rows_of.ask(4);
            const auto each = [&](auto f) {  // f(vector, step) for each 32 queries on or below the diagonal
              for (int n = 0; n < vectors; n += 2)
                if (n * W + 31 + visible >= 0) f(n, c * 2 + n / 2);
            };
            const auto tiles_of = [&](int64_t step) {
              return GradientTiles{p_rows + step * TILE, ds_rows + step * TILE, GROUP_STEPS * TILE,
                                   ds_pairs + (step * SPAN_STEPS + s) * 2 * TILE};
            };
            if (!any) {
              each([&](int, int64_t step) { tiles_of(step).clear(); });
              continue;
            }
            each([&](int n, int64_t) {
              const Operand a{k_rows, Dp / 32 * TILE, TILE}, q{qt + c * BQ * Dp / 2 + n * TILE, TILE, vectors * TILE};
              tile_product<2, false>(Dp / 32, a, q, x + n * W, BQ);
              const Operand d{v_rows, Dvp / 32 * TILE, TILE}, g{gt + c * BQ * Dvp / 2 + n * TILE, TILE, vectors * TILE};
              tile_product<2, false>(Dvp / 32, d, g, dx + n * W, BQ);
            });
            if (!direct) logits.transform(x, vectors);
            const float scale = direct ? p.scale * LOG2_E : LOG2_E;
            each([&](int n, int64_t step) {
              const auto run = [&](auto block) {
                block(x + n * W, dx + n * W, tiles_of(step), keys, n * W + seen, scale, dropouts[c], n, j0,
                      lse + c * BQ + n * W, delta + c * BQ + n * W, logits.slope ? logits.slope + n * W : nullptr);
              };
              dropouts[c].used || logits.slope ? run(gradient_block<false>) : run(gradient_block<true>);
              begin = min64(begin, step);
              end = step + 1;
              ends[step] = s + 1;
            });
          }
          for (int64_t d = 0; d < Dvp && begin < end; d += 32)
            tile_product<2, true>(end - begin, {p_rows + begin * TILE, GROUP_STEPS * TILE, TILE},
                                  {g_pairs + (begin * Dvp + d) / 16 * TILE, TILE, Dvp / 16 * TILE}, dv + j0 * Dvp + d,
                                  Dvp);
          for (int64_t d = 0; d < Dp && begin < end; d += 32)
            tile_product<2, true>(end - begin, {ds_rows + begin * TILE, GROUP_STEPS * TILE, TILE},
                                  {q_pairs + (begin * Dp + d) / 16 * TILE, TILE, Dp / 16 * TILE}, dk + j0 * Dp + d, Dp);
        }
        for (int64_t step = 0; step < steps; ++step)
          for (int64_t d = 0; d < Dp && ends[step] > 0; d += 32)
            tile_product<2, true>(ends[step], {kt + ((s0 - k0) / 2 * Dp + d / 16 * TILE), TILE, Dp / 16 * TILE},
                                  {ds_pairs + step * SPAN_STEPS * 2 * TILE, TILE, 2 * TILE},
                                  dqt + (step / 2 * Dp + d) * BQ + step % 2 * 32, BQ);
      }
      if (max64(reach, 1) > k0 + held) continue;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t i = i0 + c * BQ;
        store_queries(dqt + c * Dp * BQ, p.scale, min64(BQ, i1 - i), p.D, at<bfloat16>(grad.dq, grad.dqs, b, h, i),
                      grad.dqs[2]);
      }
    }
    for (int64_t c = k0 * Dp; c < k1 * Dp; c += W) store(dk + c, load(dk + c) * p.scale);
  }
  return true;
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

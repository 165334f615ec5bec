// The forward for one or two queries against many keys, as in generation with a cache: no product has enough rows to
// pay for packing, and memory sets the pace.
//   algorithm  an item is a share of the keys of up to DECODE_ROWS queries that read the same key head. Lanes are keys:
//              a dot product along D for each key and query, W of them turned at once instead of summed one by one,
//              then the online softmax by rows, then O += P V.
//   memory     reads K and V once, straight from where they are, and converts in registers
//              (tried and lost: prefetching the next tile's rows, 37 GB/s for 47 on a cache of 8192 keys)
//   parallel   items. Few key heads are split along the keys, by the shape alone; the parts are merged in order.
#pragma once
#include "attention_forward.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t DECODE_ROWS = ATTENTION_DECODE_ROWS;

/// Queries [0, S) of `heads` heads from h on, one behind the other as rows; what they have seen so far.
template <class T>
struct Decode {
  const Problem& p;
  int64_t b, h, heads, rows, Dp, Dvp;
  float *q, *x, *out, *tile;  // [DECODE_ROWS][Dp], [DECODE_ROWS][BK], [DECODE_ROWS][Dvp], a tile for transform()
  float maximum[DECODE_ROWS], total[DECODE_ROWS];
  bool safe = false;  // the tile hides keys: terms of weight 0 are left out, whatever the values are
  Logits logits;

  Decode(const Problem& problem, int64_t batch, int64_t first, int64_t count, Arena& arena)
      : p(problem),
        b(batch),
        h(first),
        heads(count),
        rows(count * problem.S),
        Dp(round_up(problem.D, W)),
        Dvp(round_up(problem.Dv, W)),
        q(arena.take(DECODE_ROWS * Dp)),
        x(arena.take(DECODE_ROWS * BK)),
        out(arena.take(DECODE_ROWS * Dvp)),
        tile(arena.take(BK * BQ)),
        logits(problem, arena) {
    std::memset(q, 0, DECODE_ROWS * Dp * sizeof(float));
    std::memset(out, 0, DECODE_ROWS * Dvp * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) pack(at<T>(p.q, p.qs, b, h + r / p.S, r % p.S), 0, 1, p.D, q + r * Dp, Dp);
    for (int64_t r = 0; r < DECODE_ROWS; ++r) maximum[r] = -INF, total[r] = 0.f;
  }

  /// Takes the keys [begin, end) into account.
  void run(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += BK) {
      const int64_t keys = min64(BK, end - j);
      bool seen[DECODE_ROWS], any = false;
      safe = false;
      for (int64_t g = 0; g < heads; ++g) {
        seen[g] = logits.read(b, h + g, 0, p.S, j, keys);
        any |= seen[g];
        safe |= !seen[g] || !logits.plain;
      }
      if (!any) continue;
      if (rows == 1)
        products<1>(j, keys);
      else if (rows == 2)
        products<2>(j, keys);
      else if (rows <= 4)
        products<4>(j, keys);
      else
        products<DECODE_ROWS>(j, keys);
      float scale = p.scale;
      if (safe) {
        for (int64_t g = 0; g < heads; ++g) transform(g, seen[g], j, keys);
        scale = 1.f;
      }
      for (int64_t r = 0; r < rows; ++r) softmax(r, j, keys, scale);
      for (int64_t r = 0; r < rows; r += 4) {
        const int64_t some = min64(4, rows - r);
        if (some == 1)
          outputs<1>(r, j, keys);
        else if (some == 2)
          outputs<2>(r, j, keys);
        else
          outputs<4>(r, j, keys);  // of rows that are not there, weights are 0
      }
    }
  }

 private:
  template <int R>
  void products(int64_t j0, int64_t keys) {
    const T* const base = at<T>(p.k, p.ks, b, h / p.group(), j0);
    for (int64_t j = 0; j < keys; j += W) {
      Vec part[R][W];
      for (int64_t i = 0; i < W; ++i) {
        const T* const key = base + min64(j + i, keys - 1) * p.ks[2];
        Vec sums[R] = {};
        for_vectors(p.D, [&](int64_t d, auto n) {
          const Vec at = load(key + d, n);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sums[r] += at * load(q + r * Dp + d);
        });
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) part[r][i] = sums[r];
      }
      for (int r = 0; r < R; ++r) {
        transpose(part[r]);
        for (int width = W / 2; width > 0; width /= 2)
          for (int i = 0; i < width; ++i) part[r][i] += part[r][i + width];
        store(x + r * BK + j, part[r][0]);
      }
    }
  }

  /// The rows of head g through a tile with queries in its lanes.
  void transform(int64_t g, bool seen, int64_t j0, int64_t keys) {
    float* const rows_of = x + g * p.S * BK;
    if (seen) {
      logits.read(b, h + g, 0, p.S, j0, keys);
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t s = 0; s < p.S; ++s) tile[j * BQ + s] = rows_of[s * BK + j];
      logits.transform(tile, 1);
    }
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t s = 0; s < p.S; ++s) rows_of[s * BK + j] = seen ? tile[j * BQ + s] : -INF;
  }

  /// Logits -> P in place.
  void softmax(int64_t r, int64_t j0, int64_t keys, float scale) {
    float* const row = x + r * BK;
    for (int64_t j = keys; j < round_up(keys, W); ++j) row[j] = scale == 0.f ? row[0] : -INF / scale;
    Vec most = splat(-INF), sums{};
    for (int64_t j = 0; j < keys; j += W) most = vmax(load(row + j) * scale, most);
    const float highest = max(most);
    if (highest > maximum[r] + RESCALE) {
      const float factor = std::exp(maximum[r] - highest);
      maximum[r] = highest;
      total[r] *= factor;
      for (int64_t d = 0; d < Dvp; d += W) store(out + r * Dvp + d, load(out + r * Dvp + d) * factor);
    }
    const float center = maximum[r] == -INF ? 0.f : maximum[r];
    const int64_t h_r = h + r / p.S;
    for (int64_t j = 0; j < keys; j += W) {
      Vec weight = exp_logit(load(row + j) * scale - center);
      if (keys - j < W)
        for (int64_t l = keys - j; l < W; ++l) weight[l] = 0.f;
      sums += weight;
      if (p.dropout > 0) weight = RowDropout(*p.seed, p.dropout, p.row(b, h_r, r % p.S))(weight, j0 + j);
      store(row + j, weight);
    }
    total[r] += sum(sums);
  }

  /// O += P V of R rows from `first` on.
  template <int R>
  void outputs(int64_t first, int64_t j0, int64_t keys) {
    const T* const base = at<T>(p.v, p.vs, b, h / p.group(), j0);
    const float* const weights = x + first * BK;
    const auto columns = [&](int64_t d, auto vectors, auto n) {
      constexpr int N = decltype(vectors)::value;
      Vec sums[R][N];
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < N; ++u) sums[r][u] = load(out + (first + r) * Dvp + d + u * W);
      const auto add = [&](int64_t j, auto leave_out) {
        Vec value[N];
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) value[u] = load(base + j * p.vs[2] + d + u * W, n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const float weight = weights[r * BK + j];
          if (decltype(leave_out)::value && weight == 0.f) continue;
#pragma GCC unroll 4
          for (int u = 0; u < N; ++u) sums[r][u] += value[u] * weight;
        }
      };
      with_flag(safe, [&](auto leave_out) {
        for (int64_t j = 0; j < keys; ++j) add(j, leave_out);
      });
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < N; ++u) store(out + (first + r) * Dvp + d + u * W, sums[r][u]);
    };
    constexpr std::integral_constant<int64_t, W> full;
    int64_t d = 0;
    for (; d + 4 * W <= p.Dv; d += 4 * W) columns(d, std::integral_constant<int, 4>{}, full);
    for (; d + W <= p.Dv; d += W) columns(d, std::integral_constant<int, 1>{}, full);
    if (d < p.Dv) columns(d, std::integral_constant<int, 1>{}, p.Dv - d);
  }
};

/// Output and lse of one row from sums under the maximum.
template <class T>
inline void finish_row(const Problem& p, float total, float maximum, const float* sums, void* out, const Strides& os,
                       float* lse, int64_t b, int64_t h, int64_t i) {
  const Ending ending(p, h, total, maximum);
  lse[p.row(b, h, i)] = ending.lse;
  T* const to = at<T>(out, os, b, h, i);
  for_vectors(p.Dv,
              [&](int64_t d, auto n) { store(to + d, total == 0.f ? Vec{} : load(sums + d) * ending.factor, n); });
}

/// All queries of one head against all of its keys.
template <class T>
void decode_head(const Problem& p, void* out, const Strides& os, float* lse, int64_t b, int64_t h, float* scratch) {
  Arena arena(scratch);
  Decode<T> d(p, b, h, 1, arena);
  d.run(p.first_key(0), p.keys(p.S));
  for (int64_t i = 0; i < p.S; ++i)
    finish_row<T>(p, d.total[i], d.maximum[i], d.out + i * d.Dvp, out, os, lse, b, h, i);
}

/// The whole call. scratch: `share` floats per thread, then ATTENTION_DECODE_PARTS parts of rows.
template <class T>
void decode(const Problem& p, void* out, const Strides& os, float* lse, float* scratch, int64_t share, int threads) {
  const int64_t at_once = min64(p.group(), DECODE_ROWS / p.S), chunks = ceil_div(p.group(), at_once);
  const int64_t units = p.B * p.Hk * chunks, tiles = ceil_div(p.T, BK);
  const int64_t splits = max64(1, min64(ATTENTION_DECODE_PARTS / max64(units, 1), ceil_div(tiles, 4)));
  const int64_t Dvp = round_up(p.Dv, W), part = DECODE_ROWS * (Dvp + 2);
  float* const parts = scratch + threads * share;
  const double work = 2. * p.B * p.H * p.S * p.T * (p.D + p.Dv);
  const auto head = [&](int64_t unit) { return unit / chunks % p.Hk * p.group() + unit % chunks * at_once; };
  const auto count = [&](int64_t unit) { return min64(at_once, p.group() - unit % chunks * at_once); };
  const auto finish = [&](int64_t unit, const float* total, const float* maximum, const float* sums) {
    for (int64_t r = 0; r < count(unit) * p.S; ++r)
      finish_row<T>(p, total[r], maximum[r], sums + r * Dvp, out, os, lse, unit / (chunks * p.Hk), head(unit) + r / p.S,
                    r % p.S);
  };
  parallel_items(work < 2e5 ? 1 : threads, units * splits, [&](int64_t item, int thread) {
    const int64_t unit = item / splits, split = item % splits;
    Arena arena(scratch + thread * share);
    Decode<T> d(p, unit / (chunks * p.Hk), head(unit), count(unit), arena);
    const int64_t first = p.first_key(0), some = ceil_div(max64(0, p.keys(p.S) - first), BK);
    d.run(first + some * split / splits * BK, min64(p.keys(p.S), first + some * (split + 1) / splits * BK));
    if (splits == 1) return finish(unit, d.total, d.maximum, d.out);
    float* const to = parts + item * part;
    std::memcpy(to, d.total, sizeof d.total);
    std::memcpy(to + DECODE_ROWS, d.maximum, sizeof d.maximum);
    std::memcpy(to + 2 * DECODE_ROWS, d.out, DECODE_ROWS * Dvp * sizeof(float));
  });
  if (splits == 1) return;
  for (int64_t unit = 0; unit < units; ++unit) {  // merge, in order
    float* const to = parts + unit * splits * part;
    for (int64_t r = 0; r < count(unit) * p.S; ++r) {
      float highest = -INF;
      for (int64_t s = 0; s < splits; ++s) {
        const float maximum = to[s * part + DECODE_ROWS + r];
        highest = maximum > highest ? maximum : highest;
      }
      float total = 0.f;
      for (int64_t s = 0; s < splits; ++s) {
        const float* const from = to + s * part;
        const float factor = highest == -INF ? 1.f : std::exp(from[DECODE_ROWS + r] - highest);
        total += from[r] * factor;
        for (int64_t d = 0; d < Dvp; d += W) {
          float* const sums = to + 2 * DECODE_ROWS + r * Dvp + d;
          const Vec term = load(from + 2 * DECODE_ROWS + r * Dvp + d) * factor;
          store(sums, s == 0 ? term : load(sums) + term);
        }
      }
      to[r] = total;
      to[DECODE_ROWS + r] = highest;
    }
    finish(unit, to, to + DECODE_ROWS, to + 2 * DECODE_ROWS);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

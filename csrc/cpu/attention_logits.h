// From products to logits, a tile at a time: scale, softcap, mask, ALiBi, and -inf for what diagonals, a window or
// documents hide. Most tiles need the scale alone, which the softmax takes along: those are `plain` and are not
// touched. Tiles in which no query sees a key are found before their keys are read.
#pragma once
#include "attention.h"
#include "simd_math.h"

namespace fastlm::FASTLM_ISA {
namespace {

inline Vec mask_value(const float* p, int64_t n) { return load_n(p, n); }
inline Vec mask_value(const bfloat16* p, int64_t n) { return load_n(p, n); }
inline Vec mask_value(const float16* p, int64_t n) { return load_n(p, n); }
inline Vec mask_value(const bool* p, int64_t n) {
  uint8_t lanes[W] = {};
  std::memcpy(lanes, p, n);
  Vec x;
  for (int i = 0; i < W; ++i) x[i] = lanes[i] ? 0.f : -INF;
  return x;
}

/// What is added to the logits of one tile: nothing, one value per key (a mask that all queries share), or one per key
/// and query, transposed as the logits are. -inf removes the key.
struct MaskTile {
  float* tile;  // [BK][BQ]; written for the queries rounded up to 32
  bool used = false, per_key = false, empty = false;

  template <class M>
  void read(const M* mask, const Strides& s, int64_t queries, int64_t keys) {
    Vec most = splat(-INF), least = splat(INF);
    used = true;
    if (s[2] == 0) {
      per_key = true;
      for (int64_t j = 0; j < keys; j += W) {
        const int64_t n = min64(W, keys - j);
        Vec x{};
        if (s[3] == 1) {
          x = mask_value(mask + j, n);
        } else {
          for (int64_t i = 0; i < n; ++i) x[i] = mask_value(mask + (j + i) * s[3], 1)[0];
        }
        store(tile + j, x);
        for (int64_t i = n; i < W; ++i) x[i] = x[0];
        most = vmax(x, most);
        least = vmin(x, least);
      }
    } else {
      per_key = false;
      for (int64_t i = 0; i < min64(BQ, round_up(queries, 32)); i += W)
        for (int64_t j = 0; j < keys; j += W) {
          const int64_t n = min64(W, keys - j);
          Vec x[W];
          for (int64_t r = 0; r < W; ++r) {  // the rows behind the last repeat it: they must not change the extremes
            const M* row = mask + min64(i + r, queries - 1) * s[2] + j * s[3];
            if (s[3] == 1) {
              x[r] = mask_value(row, n);
            } else {
              for (int64_t c = 0; c < W; ++c) x[r][c] = c < n ? mask_value(row + c * s[3], 1)[0] : 0.f;
            }
          }
          transpose(x);
          for (int64_t c = 0; c < n; ++c) {
            store(tile + (j + c) * BQ + i, x[c]);
            most = vmax(x[c], most);
            least = vmin(x[c], least);
          }
        }
    }
    empty = max(most) == -INF;
    used = !(max(most) == 0.f && -max(-least) == 0.f);
  }

  void read(const Problem& p, int64_t b, int64_t h, int64_t i0, int64_t queries, int64_t j0, int64_t keys) {
    const auto from = [&](auto kind) {
      read(at<decltype(kind)>(p.mask, p.ms, b, h, i0) + j0 * p.ms[3], p.ms, queries, keys);
    };
    if (p.mask_type == 3) return from(bool{});
    if (p.mask_type >= 0)
      with_type(static_cast<DType>(p.mask_type), [&](auto type) { from(typename decltype(type)::type{}); });
  }
};

/// Numbers of the lanes of vector n of a tile.
inline Int lanes(int n) {
  Int x{};
  for (int i = 0; i < W; ++i) x[i] = n * W + i;
  return x;
}

/// Document ids of the queries and keys of a tile. Ids are split in halves: lanes are 32 bits wide.
struct Documents {
  int32_t *low, *high;  // [BQ] of the queries, then [BK] of the keys
  bool mixed = false;   // some query does not see some key

  explicit Documents(Arena& arena) : low(arena.take<int32_t>(BQ + BK)), high(arena.take<int32_t>(BQ + BK)) {}

  /// False where no query sees a key.
  template <class I>
  bool read(const I* of_queries, int64_t queries, const I* of_keys, int64_t keys) {
    const auto extremes = [](const I* ids, int64_t n, I& least, I& most) {
      least = most = ids[0];
      for (int64_t i = 0; i < n; ++i) {
        least = ids[i] < least ? ids[i] : least;
        most = ids[i] > most ? ids[i] : most;
      }
    };
    I least, most, least_key, most_key;
    extremes(of_queries, queries, least, most);
    extremes(of_keys, keys, least_key, most_key);
    if (most < least_key || most_key < least) return false;
    mixed = least != most || least_key != most_key;
    if (!mixed) return true;
    const auto split = [&](const I* ids, int64_t n, int64_t at) {
      for (int64_t i = 0; i < BQ; ++i) {
        const int64_t id = i < n ? static_cast<int64_t>(ids[i]) : 0;
        low[at + i] = static_cast<int32_t>(id);
        high[at + i] = static_cast<int32_t>(id >> 32);
      }
    };
    split(of_queries, queries, 0);
    split(of_keys, keys, BQ);
    return true;
  }

  bool read(const Problem& p, int64_t b, int64_t i, int64_t queries, int64_t j, int64_t keys) {
    const auto from = [&](auto id) {
      using I = decltype(id);
      return read(static_cast<const I*>(p.options.documents_q) + b * p.S + i, queries,
                  static_cast<const I*>(p.options.documents_k) + b * p.T + j, keys);
    };
    return p.options.wide_documents ? from(int64_t{}) : from(int32_t{});
  }
};

inline Int load_int(const int32_t* p) {
  Int x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

struct Logits {
  const Problem& p;
  MaskTile mask;
  Documents documents;
  float* slope;  // [BK][BQ], the derivative of the softcap as transform() leaves it; null where there is none
  bool plain = true;

  Logits(const Problem& problem, Arena& arena, bool gradient = false)
      : p(problem),
        mask{arena.take(BK * BQ)},
        documents(arena),
        slope(gradient && problem.options.softcap > 0 ? arena.take(BK * BQ) : nullptr) {}

  /// Looks at the tile of queries from i and keys from j on. False where no query sees a key.
  bool read(int64_t b, int64_t h, int64_t i, int64_t queries, int64_t j, int64_t keys) {
    last_ = i + p.offset() + p.right - j;
    first_ = i + p.offset() - p.options.left - j;
    if (last_ + queries <= 0 || first_ >= keys) return false;
    keys_ = keys;
    distance_ = i + p.offset() - j;
    if (p.mask) {
      mask.read(p, b, h, i, queries, j, keys);
      if (mask.empty) return false;
    }
    if (p.options.documents_q && !documents.read(p, b, i, queries, j, keys)) return false;
    alibi_ = p.options.alibi ? p.options.alibi[b * p.options.alibi_batch + h] : 0.f;
    plain = last_ >= keys - 1 && first_ + queries <= 1 && !mask.used && !documents.mixed && !p.options.alibi &&
            p.options.softcap == 0.f;
    return true;
  }

  /// Products to logits in place, -inf where the query may not see the key, whatever the product is there.
  void transform(float* x, int vectors) {
    float scale = p.scale;
    if (p.options.softcap > 0) {
      cap(x, vectors);
      scale = 1.f;
    }
    with_flag(mask.used, [&](auto masked) {
      with_flag(p.options.alibi != nullptr, [&](auto biased) {
        with_flag(documents.mixed, [&](auto mixed) {
          hide<decltype(masked)::value, decltype(biased)::value, decltype(mixed)::value>(x, vectors, scale);
        });
      });
    });
  }

 private:
  int64_t keys_, last_, first_, distance_;  // lane l sees rows l + first_ to l + last_ and stands at l + distance_
  float alibi_;

  void cap(float* x, int vectors) const {
    const float cap = p.options.softcap, inner = p.scale / cap;
    for (int64_t j = 0; j < keys_; ++j)
      for (int n = 0; n < vectors; ++n) {
        const Vec t = tanh(load(x + j * BQ + n * W) * inner);
        store(x + j * BQ + n * W, t * cap);
        if (slope) store(slope + j * BQ + n * W, 1.f - t * t);
      }
  }

  template <bool MASKED, bool BIASED, bool MIXED>
  void hide(float* x, int vectors, float scale) const {
    const auto lane = [](int64_t n) { return static_cast<int32_t>(max64(-2 * BQ, min64(2 * BQ, n))); };
    for (int n = 0; n < vectors; ++n) {
      const Int first = lanes(n) + lane(first_), last = lanes(n) + lane(last_);
      const Int position = lanes(n) + static_cast<int32_t>(distance_);
      const Int low = MIXED ? load_int(documents.low + n * W) : Int{};
      const Int high = MIXED ? load_int(documents.high + n * W) : Int{};
      for (int64_t j = 0; j < keys_; ++j) {
        float* const at = x + j * BQ + n * W;
        const Int row = splat_int(static_cast<int32_t>(j));
        Vec t = load(at) * scale;
        if constexpr (BIASED) t -= vabs(to_float(position - row)) * alibi_;
        if constexpr (MASKED) {
          const Vec bias = mask.per_key ? splat(mask.tile[j]) : load(mask.tile + j * BQ + n * W);
          t = bias == splat(-INF) ? bias : t + bias;
        }
        t = (row > last) | (row < first) ? splat(-INF) : t;
        if constexpr (MIXED) t = (low == documents.low[BQ + j]) & (high == documents.high[BQ + j]) ? t : splat(-INF);
        store(at, t);
      }
    }
  }
};

}  // namespace
}  // namespace fastlm::FASTLM_ISA

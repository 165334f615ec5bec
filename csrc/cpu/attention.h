// What the forward and backward of attention share: the problem, packing of tiles, masks, dropout.
// Every tile of logits is kept transposed, keys by rows and queries in the lanes of a vector: the maximum, the sum and
// the correction of a query are then vertical, with no reduction inside a vector.
#pragma once
#include <cmath>

#include "fastlm.h"
#include "parallel.h"
#include "random.h"
#include "simd.h"
#include "tile_gemm.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t BQ = ATTENTION_TILE;  // queries of a tile
constexpr int64_t BK = ATTENTION_TILE;  // keys of a tile
constexpr int NV = BQ / W;              // vectors across a tile
constexpr float INF = __builtin_inff();

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/// Hands out parts of a scratch buffer, each on its own cache line.
struct Arena {
  float* next;
  explicit Arena(float* start) : next(start) {
    next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(start) + 63) & ~uintptr_t(63));
  }
  template <class T = float>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next);
    next += round_up(count * sizeof(T), 64) / sizeof(float);
    return part;
  }
};

struct Problem {
  const void *q, *k, *v, *mask;
  Strides qs, ks, vs, ms;
  int mask_type;  // the value of a DType, 3 for bool (true: attend), -1 for none
  const int64_t* seed;
  int64_t B, H, Hk, S, T, D, Dv;
  int64_t diagonal;  // query i sees key j where j <= i + diagonal
  float scale;
  double dropout;

  int64_t group() const { return H / Hk; }
  /// Keys that queries below `end` see.
  int64_t keys(int64_t end) const { return max64(0, min64(T, end + diagonal)); }
};

template <class T>
inline const T* at(const void* base, const Strides& s, int64_t b, int64_t h, int64_t row = 0) {
  return static_cast<const T*>(base) + b * s[0] + h * s[1] + row * s[2];
}
template <class T>
inline T* at(void* base, const Strides& s, int64_t b, int64_t h, int64_t row = 0) {
  return static_cast<T*>(base) + b * s[0] + h * s[1] + row * s[2];
}

// --- packing --------------------------------------------------------------------------------------------------------

/// Whether all lanes are finite: x - x is 0 for those, NaN for the rest.
struct Finite {
  Vec seen{};
  void see(Vec x) { seen += x - x; }
  bool all() const { return sum(seen) == 0.f; }
};

/// [rows][cols] of any dtype as float32 with row length ld, a multiple of W; the columns behind cols become 0. Returns
/// whether all are finite.
template <class T>
inline bool pack(const T* from, int64_t stride, int64_t rows, int64_t cols, float* to, int64_t ld) {
  Finite finite;
  for (int64_t r = 0; r < rows; ++r) {
    for_vectors(cols, [&](int64_t c, auto n) {
      const Vec x = load(from + r * stride + c, n);
      finite.see(x);
      store(to + r * ld + c, x);
    });
    for (int64_t c = round_up(cols, W); c < ld; c += W) store(to + r * ld + c, Vec{});
  }
  return finite.all();
}

/// [rows][cols] with row length `stride`, a multiple of W, as [cols][BQ]; the lanes behind rows become 0.
inline void transpose_tile(const float* from, int64_t stride, int64_t rows, int64_t cols, float* to) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < cols; c += W) {
      Vec x[W];
      for (int i = 0; i < W; ++i) x[i] = r + i < rows ? load(from + (r + i) * stride + c) : Vec{};
      transpose(x);
      for (int64_t i = 0; i < min64(W, cols - c); ++i) store(to + (c + i) * BQ + r, x[i]);
    }
}

/// The other way round: [cols][BQ] times a factor per lane, to rows of any dtype.
template <class T>
inline void store_transposed(const float* from, const Vec* factor, int64_t rows, int64_t cols, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < cols; c += W) {
      Vec x[W];
      for (int i = 0; i < W; ++i) x[i] = c + i < cols ? load(from + (c + i) * BQ + r) * factor[r / W] : Vec{};
      transpose(x);
      for (int64_t i = 0; i < min64(W, rows - r); ++i) {
        T* const out = to + (r + i) * stride + c;
        if (cols - c >= W)
          store(out, x[i]);
        else
          store_n(out, x[i], cols - c);
      }
    }
}

// --- masks ----------------------------------------------------------------------------------------------------------

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

/// Turns the products of a tile into masked logits, in place: x * scale + bias, -inf where the query may not see the
/// key, whatever the product is there. `visible`: lane i sees row j of the tile where j <= i + visible.
inline void mask_logits(float* x, int64_t keys, int vectors, float scale, const MaskTile& mask, int64_t visible) {
  const bool causal = visible < keys - 1;
  for (int n = 0; n < vectors; ++n) {
    const Int last = lanes(n) + static_cast<int32_t>(max64(visible, -2 * BQ));
    for (int64_t j = 0; j < keys; ++j) {
      float* const p = x + j * BQ + n * W;
      Vec t = load(p) * scale;
      if (mask.used) {
        const Vec bias = mask.per_key ? splat(mask.tile[j]) : load(mask.tile + j * BQ + n * W);
        t = bias == splat(-INF) ? bias : t + bias;
      }
      if (causal) t = last < splat_int(static_cast<int32_t>(j)) ? splat(-INF) : t;
      store(p, t);
    }
  }
}

/// e^x for x <= ~80, within about 1 ulp; 0 below -87 (no denormals: they would slow down the products that follow).
inline Vec exp_logit(Vec x) {
  const Vec t = vmax(splat(-87.f), x);  // NaN passes through
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(t * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec shift = splat(0x1.8p23f);
  const Vec n = (t * 1.44269504f + shift) - shift;
#endif
  const Vec r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.f;
#if defined(__AVX512F__)
  p = (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  p = t == t ? p * from_bits((__builtin_convertvector(t == t ? n : Vec{}, Int) + 127) << 23) : t;
#endif
  return x < splat(-87.f) ? Vec{} : p;
}

// --- dropout --------------------------------------------------------------------------------------------------------

/// Key j of query i of head h has row (b * H + h) * S + i and column j in the hash of random.h.
struct Dropout {
  uint32_t *low, *high;  // [BQ], the two halves of each query's key
  uint32_t threshold = 0;
  float keep_scale = 1.f;
  bool used = false;

  explicit Dropout(const Problem& p, Arena& arena) : low(arena.take<uint32_t>(BQ)), high(arena.take<uint32_t>(BQ)) {
    if (p.dropout <= 0) return;
    used = true;
    threshold = drop_threshold(p.dropout);
    keep_scale = static_cast<float>(1 / (1 - p.dropout));
  }
  void set_rows(const Problem& p, int64_t b, int64_t h, int64_t i0) {
    if (!used) return;
    for (int64_t i = 0; i < BQ; ++i) {
      const uint64_t key = row_key(*p.seed, (b * p.H + h) * p.S + i0 + i);
      low[i] = static_cast<uint32_t>(key);
      high[i] = static_cast<uint32_t>(key >> 32);
    }
  }
  /// x where kept, 0 where dropped, for vector n of the tile's lanes.
  Vec apply(Vec x, int n, int64_t j) const {
    UInt u, v;
    std::memcpy(&u, low + n * W, sizeof u);
    std::memcpy(&v, high + n * W, sizeof v);
    return random_bits(u ^ (static_cast<uint32_t>(j) * COLUMN), v) < threshold ? Vec{} : x;
  }
};

}  // namespace
}  // namespace fastlm::FASTLM_ISA

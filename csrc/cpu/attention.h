// What the forward and backward of attention share: the problem, packing of tiles, dropout; attention_logits.h has what
// becomes of products.
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
  bool bottom_right;
  int64_t right;
  AttentionOptions options;
  float scale;
  double dropout;
  int64_t rows = S, first = 0;  // query i of head h has number (b * H + h) * rows + first + i in lse and for dropout

  int64_t group() const { return H / Hk; }
  int64_t row(int64_t b, int64_t h, int64_t i) const { return (b * H + h) * rows + first + i; }
  /// Where query 0 stands among the keys. Query i sees the keys i + offset - left to i + offset + right.
  int64_t offset() const { return bottom_right ? T - S : 0; }
  /// Keys [first_key, keys) are all that queries [begin, end) may see; first_key stands at the start of a tile.
  int64_t first_key(int64_t begin) const { return max64(0, begin + offset() - options.left) / BK * BK; }
  int64_t keys(int64_t end) const { return max64(0, min64(T, end + offset() + right)); }
};

template <class T>
inline const T* at(const void* base, const Strides& s, int64_t b, int64_t h, int64_t row = 0) {
  return static_cast<const T*>(base) + b * s[0] + h * s[1] + row * s[2];
}
template <class T>
inline T* at(void* base, const Strides& s, int64_t b, int64_t h, int64_t row = 0) {
  return static_cast<T*>(base) + b * s[0] + h * s[1] + row * s[2];
}

// --- packed sequences -----------------------------------------------------------------------------------------------

/// Rows [first, end) of sequence n. The running sums come unchecked from a tensor: nothing outside of [0, total) is
/// read, whatever they hold.
struct Extent {
  int64_t first, end;
  Extent(const int32_t* cu, int64_t n, int64_t total)
      : first(max64(0, min64(cu[n], total))), end(max64(first, min64(cu[n + 1], total))) {}
  int64_t length() const { return end - first; }
};

/// The problem of sequence n alone: batch 0 of it.
template <class T>
inline Problem sequence(const Problem& p, int64_t n) {
  const Extent queries(p.options.cu_seqlens_q, n, p.S), keys(p.options.cu_seqlens_k, n, p.T);
  Problem one = p;
  one.S = queries.length();
  one.T = min64(keys.length(), p.options.longest_k);
  one.first = queries.first;
  one.q = at<T>(p.q, p.qs, 0, 0, queries.first);
  one.k = at<T>(p.k, p.ks, 0, 0, keys.first);
  one.v = at<T>(p.v, p.vs, 0, 0, keys.first);
  return one;
}

/// Zeros for the rows behind the last sequence.
template <class T>
inline void clear_rest(void* x, const Strides& s, const int32_t* cu, int64_t sequences, int64_t heads, int64_t total,
                       int64_t cols) {
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t r = max64(0, cu[sequences]); r < total; ++r)
      std::memset(static_cast<void*>(at<T>(x, s, 0, h, r)), 0, cols * sizeof(T));
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

/// Key j of query i of head h has row Problem::row() and column j in the hash of random.h.
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
      const uint64_t key = row_key(*p.seed, p.row(b, h, i0 + i));
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

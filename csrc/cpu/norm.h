// Forward and backward of LayerNorm (CENTER) and RMSNorm (not CENTER), with an
// optional residual addition.
//   forward   per row: [h = dropout(x) + residual], mean and sum of squared
//   deviations (two passes over the row in the
//             first-level cache: the one-pass formula cancels for large means),
//             then y for a group of rows, so that weight and bias are loaded
//             once
//   backward  per group of rows: pass one gathers mean(g), mean(g * xhat) and
//   the rows' shares of dweight and dbias,
//             which are loaded and stored once for the group; pass two writes
//             dx
//   blocks    two vectors at a time (load_pair), for which bfloat16 takes half
//   the instructions; parameters and partial
//             sums follow its order. With dropout, which counts columns, one
//             vector at a time
//   memory    forward reads x once and writes y once; backward reads x and dy
//   once and writes dx once; outputs larger
//             than the cache are streamed past it; the group after is
//             prefetched while one is worked on
//   parallel  rows; dweight and dbias go to norm_parts(M) partial sums added up
//   in order, so that the result does not
//             depend on the number of threads
//   papers    Ba et al. 2016 (arXiv:1607.06450), Zhang and Sennrich 2019
//   (arXiv:1910.07467)
#pragma once
#include <type_traits>

#include "fastlm.h"
#include "parallel.h"
#include "random.h"
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

// --- blocks of a row: two vectors, one, or a part of one
// ------------------------------------------------------------

struct Pair {
  static constexpr int COUNT = 2;
};
template <int64_t WIDTH>
struct Single {  // all W elements (WIDTH = W) or the first n of them (WIDTH = 0)
  static constexpr int COUNT = 1;
  std::conditional_t<WIDTH == W, std::integral_constant<int64_t, W>, int64_t> n;
};

template <class T>
inline void get(const T* p, Vec* v, Pair) {
  load_pair(p, v[0], v[1]);
}
template <class T, int64_t WIDTH>
inline void get(const T* p, Vec* v, Single<WIDTH> block) {
  v[0] = load(p, block.n);
}
/// Of a parameter or of partial sums, in the order of T.
template <class T>
inline void get_as(const float* p, Vec* v, Pair) {
  load_pair_as<T>(p, v[0], v[1]);
}
template <class T, int64_t WIDTH>
inline void get_as(const float* p, Vec* v, Single<WIDTH> block) {
  v[0] = load(p, block.n);
}
/// weight + offset, or ones.
template <class T, class BLOCK>
inline void get_scale(const float* weight, float offset, int64_t i, Vec* scale, BLOCK block) {
  for (int j = 0; j < BLOCK::COUNT; ++j) scale[j] = splat(1.f);
  if (!weight) return;
  get_as<T>(weight + i, scale, block);
  for (int j = 0; j < BLOCK::COUNT; ++j) scale[j] += offset;
}
template <class T, class STREAM>
inline void set(T* p, const Vec* v, Pair, STREAM streamed) {
  store_pair(p, v[0], v[1], streamed);
}
template <class T, int64_t WIDTH, class STREAM>
inline void set(T* p, const Vec* v, Single<WIDTH> block, STREAM streamed) {
  put(p, v[0], block.n, streamed);
}

/// f(i, block) for the blocks of [0, N).
template <bool PAIRS, class F>
inline void for_blocks(int64_t N, F f) {
  int64_t i = 0;
  if (PAIRS)
    for (; i + 2 * W <= N; i += 2 * W) f(i, Pair{});
  for (; i + W <= N; i += W) f(i, Single<W>{});
  if (i < N) f(i, Single<0>{N - i});
}
/// f(i, block, sums) for the blocks of [0, N), which are added up in four
/// running sums: the additions of one would wait for each other, and their
/// rounding errors would all lean one way.
template <bool PAIRS, class F>
inline void sum_blocks(int64_t N, F f) {
  int64_t i = 0;
  if (PAIRS) {
    for (; i + 4 * W <= N; i += 4 * W) {
      f(i, Pair{}, 0);
      f(i + 2 * W, Pair{}, 2);
    }
    if (i + 2 * W <= N) f(i, Pair{}, 0), i += 2 * W;
  } else {
    for (; i + 2 * W <= N; i += 2 * W) {
      f(i, Single<W>{}, 0);
      f(i + W, Single<W>{}, 1);
    }
  }
  if (i + W <= N) f(i, Single<W>{}, 2), i += W;
  if (i < N) f(i, Single<0>{N - i}, 3);
}
inline float sum(const Vec (&sums)[4]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

/// What the cache line of p, at the start of a block of T, brings in ahead of
/// its use.
template <class T, class BLOCK>
inline void fetch(const T* p, BLOCK) {
  for (size_t line = 0; line < BLOCK::COUNT * W * sizeof(T); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + line);
}

// --- forward
// --------------------------------------------------------------------------------------------------------

/// One row: h = dropout(x) + residual where there is one, then mean and 1 /
/// standard deviation. A function of its own, so that a row gives the same bits
/// in a group of any size.
template <bool CENTER, bool PAIRS, class T>
__attribute__((noinline)) void norm_statistics(const T* x, int64_t x_ahead, const T* residual, int64_t residual_ahead,
                                               const RowDropout* kept, T* h, int64_t N, float eps, float& mean,
                                               float& rstd) {
  Vec squares[4] = {}, sums[4] = {};
  const auto gather = [&](const Vec* v, int at, int count) {
    for (int j = 0; j < count; ++j)
      if (CENTER)
        sums[at + j] += v[j];
      else
        squares[at + j] += v[j] * v[j];
  };
  if (residual) {
    sum_blocks<PAIRS>(N, [&](int64_t i, auto block, int at) {
      constexpr int COUNT = decltype(block)::COUNT;
      Vec v[COUNT], w[COUNT];
      get(x + i, v, block);
      get(residual + i, w, block);
      if (!PAIRS) v[0] = (*kept)(v[0], i);
      for (int j = 0; j < COUNT; ++j) v[j] += w[j];
      if constexpr (COUNT == 2)  // sums of two numbers of bfloat16 are ties often
        store_pair(h + i, v[0], v[1], std::false_type{}, std::true_type{});
      else
        set(h + i, v, block, std::false_type{});
      get(h + i, v, block);  // as rounded
      gather(v, at, COUNT);
      fetch(x + x_ahead + i, block);
      fetch(residual + residual_ahead + i, block);
    });
  } else {
    sum_blocks<PAIRS>(N, [&](int64_t i, auto block, int at) {
      constexpr int COUNT = decltype(block)::COUNT;
      Vec v[COUNT];
      get(x + i, v, block);
      gather(v, at, COUNT);
    });
  }
  mean = 0.f;
  float total = sum(squares);
  if constexpr (CENTER) {
    const T* row = residual ? h : x;
    const float first = sum(sums) / N;
    // The deviations also correct the mean, whose float32 sum is off by several
    // ulp when the mean is large.
    Vec deviations[4] = {}, spread[4] = {};
    sum_blocks<PAIRS>(N, [&](int64_t i, auto block, int at) {
      constexpr int COUNT = decltype(block)::COUNT;
      Vec v[COUNT];
      if constexpr (std::is_same<decltype(block), Single<0>>::value)
        v[0] = load_n(row + i, block.n,
                      first);  // padding lanes deviate by 0, not by -mean
      else
        get(row + i, v, block);
      for (int j = 0; j < COUNT; ++j) {
        const Vec d = v[j] - first;
        deviations[at + j] += d;
        spread[at + j] += d * d;
      }
    });
    const float shift = sum(deviations) / N;
    mean = first + shift;
    total = sum(spread) - shift * shift * N;
  }
  // In float64, rounded once: a row shares its error.
  rstd = static_cast<float>(1 / std::sqrt(static_cast<double>(std::fmax(total, 0.f)) / N + eps));
}

template <bool CENTER, bool PAIRS, int ROWS, class STREAM, class T>
inline void norm_forward_rows(STREAM streamed, const T* x, int64_t x_stride, const T* residual, int64_t residual_stride,
                              const float* weight, float offset, const float* bias, const int64_t* seed, double dropout,
                              T* h, T* y, float* mean, float* rstd, int64_t N, float eps, int64_t m, int64_t last) {
  float mu[ROWS], r[ROWS];
  // The next group is fetched while this one, already in the cache, is worked
  // on: both would otherwise take turns.
  const int64_t ahead = m + 2 * ROWS <= last ? ROWS : 0;
  for (int k = 0; k < ROWS; ++k) {
    const RowDropout kept(seed ? *seed : 0, dropout, m + k);
    norm_statistics<CENTER, PAIRS>(x + (m + k) * x_stride, ahead * x_stride,
                                   residual ? residual + (m + k) * residual_stride : nullptr, ahead * residual_stride,
                                   &kept, h + (m + k) * N, N, eps, mu[k], r[k]);
    if (CENTER) mean[m + k] = mu[k];
    rstd[m + k] = r[k];
  }
  const T* rows = residual ? h + m * N : x + m * x_stride;
  const int64_t stride = residual ? N : x_stride;
  for_blocks<PAIRS>(N, [&](int64_t i, auto block) {
    constexpr int COUNT = decltype(block)::COUNT;
    // Without branches below: what is contracted to an FMA is then the same in groups of any size.
    Vec scale[COUNT], shift[COUNT];
    get_scale<T>(weight, offset, i, scale, block);
    for (int j = 0; j < COUNT; ++j) shift[j] = Vec{};
    if (bias) get_as<T>(bias + i, shift, block);
    for (int k = 0; k < ROWS; ++k) {
      Vec v[COUNT];
      get(rows + k * stride + i, v, block);
      for (int j = 0; j < COUNT; ++j) v[j] = (v[j] - mu[k]) * r[k] * scale[j] + shift[j];
      set(y + (m + k) * N + i, v, block, streamed);
      if (!residual) fetch(rows + (ahead + k) * stride + i, block);
    }
  });
}

/// f(std::integral_constant<int, ROWS>) for the rows of [m, end), in groups:
/// those of few kilobytes four at a time. Four longer rows would push each
/// other out of the first-level cache between the passes.
template <class F>
inline void in_groups(int64_t bytes, int64_t m, int64_t end, F f) {
  const auto groups = [&](auto count) {
    for (; m + count <= end; m += count) f(count, m);
  };
  if (bytes <= 4096) groups(std::integral_constant<int, 4>{});
  groups(std::integral_constant<int, 2>{});
  groups(std::integral_constant<int, 1>{});
}

template <bool CENTER, class T>
void norm_forward(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* weight,
                  float offset, const float* bias, const int64_t* seed, double dropout, T* h, T* y, float* mean,
                  float* rstd, int64_t M, int64_t N, float eps, int threads) {
  parallel_for(threads, M, 1 + 16384 / (N + 1), [=](int64_t begin, int64_t end) {
    with_flag(stream_ok<T, 2>(y, M, N, N), [=](auto streamed) {
      with_flag(!seed, [=](auto pairs) {
        in_groups(N * sizeof(T), begin, end, [=](auto count, int64_t m) {
          norm_forward_rows<CENTER, decltype(pairs)::value, decltype(count)::value>(
              streamed, x, x_stride, residual, residual_stride, weight, offset, bias, seed, dropout, h, y, mean, rstd,
              N, eps, m, end);
        });
      });
      if (streamed) stream_fence();
    });
  });
}

// --- backward
// -------------------------------------------------------------------------------------------------------

/// The backward of ROWS rows from row m on; adds to dw and db where they are
/// not null, in the order of T's blocks.
template <bool CENTER, bool PAIRS, int ROWS, class STREAM, class T>
inline void norm_backward_rows(STREAM streamed, const T* dy, int64_t dy_stride, const T* x, int64_t x_stride,
                               const float* weight, float offset, const float* mean, const float* rstd, const T* dh,
                               const int64_t* seed, double dropout, T* dx, T* dresidual, float* dw, float* db,
                               int64_t N, int64_t m, int64_t last) {
  Vec sum_g[ROWS] = {}, sum_gx[ROWS] = {};
  float mu[ROWS], r[ROWS];
  for (int k = 0; k < ROWS; ++k) {
    mu[k] = CENTER ? mean[m + k] : 0.f;
    r[k] = rstd[m + k];
  }
  const T *g_rows = dy + m * dy_stride, *x_rows = x + m * x_stride;
  for_blocks<PAIRS>(N, [&](int64_t i, auto block) {
    constexpr int COUNT = decltype(block)::COUNT;
    Vec scale[COUNT], dw_i[COUNT], db_i[COUNT];
    for (int j = 0; j < COUNT; ++j) dw_i[j] = db_i[j] = Vec{};
    get_scale<T>(weight, offset, i, scale, block);
    if (dw) get(dw + i, dw_i, block);
    if (db) get(db + i, db_i, block);
    for (int k = 0; k < ROWS; ++k) {
      Vec g[COUNT], v[COUNT];
      get(g_rows + k * dy_stride + i, g, block);
      get(x_rows + k * x_stride + i, v, block);
      for (int j = 0; j < COUNT; ++j) {
        const Vec xhat = (v[j] - mu[k]) * r[k];
        dw_i[j] += g[j] * xhat;
        db_i[j] += g[j];
        const Vec scaled = g[j] * scale[j];
        if (CENTER) sum_g[k] += scaled;
        sum_gx[k] += scaled * xhat;
      }
    }
    if (dw) set(dw + i, dw_i, block, std::false_type{});
    if (db) set(db + i, db_i, block, std::false_type{});
  });
  // dx = (g - mean(g)) r - (x - mean) r^2 mean(g xhat)
  float c1[ROWS], c2[ROWS];
  for (int k = 0; k < ROWS; ++k) {
    c1[k] = CENTER ? sum(sum_g[k]) / N : 0.f;
    c2[k] = sum(sum_gx[k]) / N * r[k] * r[k];
  }
  const int64_t ahead = m + 2 * ROWS <= last ? ROWS : 0;
  for (int k = 0; k < ROWS; ++k) {
    const T *g_row = g_rows + k * dy_stride, *x_row = x_rows + k * x_stride, *h_row = dh + (m + k) * N;
    T* out = dx + (m + k) * N;
    const auto write = [&](auto finish) {
      for_blocks<PAIRS>(N, [&](int64_t i, auto block) {
        constexpr int COUNT = decltype(block)::COUNT;
        Vec g[COUNT], v[COUNT], scale[COUNT], upstream[COUNT];
        get(g_row + i, g, block);
        get(x_row + i, v, block);
        get_scale<T>(weight, offset, i, scale, block);
        if (dh) get(h_row + i, upstream, block);
        for (int j = 0; j < COUNT; ++j) {
          g[j] = CENTER ? g[j] * scale[j] - c1[k] : g[j] * scale[j];
          v[j] = g[j] * r[k] - (v[j] - mu[k]) * c2[k];
          if (dh) v[j] += upstream[j];
        }
        finish(v, i, block);
        set(out + i, v, block, streamed);
        fetch(g_row + ahead * dy_stride + i, block);
        fetch(x_row + ahead * x_stride + i, block);
        if (dh) fetch(h_row + ahead * N + i, block);
      });
    };
    if constexpr (PAIRS) {
      write([](Vec*, int64_t, auto) {});
    } else {
      const RowDropout kept(*seed, dropout, m + k);
      write([&](Vec* d, int64_t i, auto block) {
        set(dresidual + (m + k) * N + i, d, block, streamed);
        d[0] = kept(d[0], i);
      });
    }
  }
}

template <bool CENTER, class T>
void norm_backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const float* weight, float offset,
                   const float* mean, const float* rstd, const T* dh, const int64_t* seed, double dropout, T* dx,
                   T* dresidual, float* dweight, float* dbias, float* scratch, int64_t M, int64_t N, int threads) {
  const int64_t parts = norm_parts(M);
  float* const part_dw = scratch;
  float* const part_db = scratch + parts * N;
  // One part is one item of work, so a part is always summed by one thread in
  // row order.
  parallel_for(M * N < 32768 ? 1 : threads, parts, 1, [=](int64_t first, int64_t last) {
    with_flag(stream_ok<T, 2>(dx, M, N, N), [=](auto streamed) {
      with_flag(!seed, [=](auto pairs) {
        for (int64_t part = first; part < last; ++part) {
          float* dw = dweight ? part_dw + part * N : nullptr;
          float* db = dbias ? part_db + part * N : nullptr;
          if (dw) std::memset(dw, 0, N * sizeof(float));
          if (db) std::memset(db, 0, N * sizeof(float));
          const int64_t end = M * (part + 1) / parts;
          in_groups(2 * N * sizeof(T), M * part / parts, end, [=](auto count, int64_t m) {
            norm_backward_rows<CENTER, decltype(pairs)::value, decltype(count)::value>(
                streamed, dy, dy_stride, x, x_stride, weight, offset, mean, rstd, dh, seed, dropout, dx, dresidual, dw,
                db, N, m, end);
          });
        }
      });
      if (streamed) stream_fence();
    });
  });
  with_flag(!seed, [=](auto pairs) {
    const auto add = [=](float* total, const float* shares) {
      for_blocks<decltype(pairs)::value>(N, [&](int64_t i, auto block) {
        constexpr int COUNT = decltype(block)::COUNT;
        Vec v[COUNT], share[COUNT];
        get(shares + i, v, block);
        for (int64_t part = 1; part < parts; ++part) {
          get(shares + part * N + i, share, block);
          for (int j = 0; j < COUNT; ++j) v[j] += share[j];
        }
        if constexpr (COUNT == 2)
          store_pair_as<T>(total + i, v[0], v[1]);
        else
          set(total + i, v, block, std::false_type{});
      });
    };
    if (dweight) add(dweight, part_dw);
    if (dbias) add(dbias, part_db);
  });
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

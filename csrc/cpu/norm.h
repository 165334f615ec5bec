// Forward and backward of LayerNorm (CENTER) and RMSNorm (not CENTER), with an optional residual addition.
//   forward   per row: [h = dropout(x) + residual], mean and sum of squared deviations (two passes over the row in the
//             first-level cache: the one-pass formula cancels for large means), then y
//   backward  per group of rows: pass one gathers mean(g), mean(g * xhat) and the rows' shares of dweight and dbias,
//             which are loaded and stored once for the group; pass two writes dx and prefetches the next group
//   memory    forward reads x once and writes y once; backward reads x and dy once and writes dx once; outputs larger
//             than the cache are streamed past it
//   parallel  rows; dweight and dbias go to norm_parts(M) partial sums added up in order, so that the result does not
//             depend on the number of threads
//   papers    Ba et al. 2016 (arXiv:1607.06450), Zhang and Sennrich 2019 (arXiv:1910.07467)
//   lost      two vectors at a time and four rows for one load of weight and bias: at 8192 x 1024 5 to 12 % faster in
//             bfloat16, 12 to 29 % slower in float32, groups of one row alike
#pragma once
#include <type_traits>

#include "fastlm.h"
#include "parallel.h"
#include "random.h"
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

template <bool CENTER, class STREAM, class T>
void norm_forward_rows(STREAM streamed, const T* x, int64_t x_stride, const T* residual, int64_t residual_stride,
                       const float* weight, float offset, const float* bias, const int64_t* seed, double dropout, T* h,
                       T* y, float* mean, float* rstd, int64_t N, float eps, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* row = x + m * x_stride;
    // The next row is fetched while this one, already in the cache, is worked on: both would otherwise take turns.
    const int64_t ahead = m + 1 < end ? x_stride : 0;
    if (residual) {
      const T* other = residual + m * residual_stride;
      const int64_t other_ahead = m + 1 < end ? residual_stride : 0;
      T* out = h + m * N;
      const auto add = [&](auto kept) {
        for_vectors(N, [&](int64_t i, auto n) {
          store(out + i, kept(load(row + i, n), i) + load(other + i, n), n);
          __builtin_prefetch(row + ahead + i);
          __builtin_prefetch(other + other_ahead + i);
        });
      };
      if (seed)
        add(RowDropout(*seed, dropout, m));
      else
        add([](Vec v, int64_t) { return v; });
      row = out;
    }
    float mu = 0.f;
    Vec squares{};
    if constexpr (CENTER) {
      mu = sum(sum_vectors(N, [&](int64_t i, auto n) { return load(row + i, n); })) / N;
      // The deviations also correct the mean, whose float32 sum is off by several ulp when the mean is large.
      Vec deviations{}, more_deviations{}, more_squares{};
      int64_t i = 0;
      for (; i + 2 * W <= N; i += 2 * W) {
        const Vec d = load(row + i) - mu, e = load(row + i + W) - mu;
        deviations += d;
        more_deviations += e;
        squares += d * d;
        more_squares += e * e;
      }
      for (; i < N; i += W) {  // padding lanes deviate by 0, not by -mu
        const Vec d = load_n(row + i, N - i < W ? N - i : W, mu) - mu;
        deviations += d;
        squares += d * d;
      }
      const float shift = sum(deviations + more_deviations) / N;
      squares += more_squares;
      mu += shift;
      squares[0] -= shift * shift * N;
    } else {
      squares = sum_vectors(N, [&](int64_t i, auto n) {
        const Vec v = load(row + i, n);
        return v * v;
      });
    }
    const float r = 1.f / std::sqrt(std::fmax(sum(squares), 0.f) / N + eps);
    T* out = y + m * N;
    for_vectors(N, [&](int64_t i, auto n) {
      Vec v = (load(row + i, n) - mu) * r;
      if (weight) v *= load(weight + i, n) + offset;
      if (bias) v += load(bias + i, n);
      put(out + i, v, n, streamed);
      if (!residual) __builtin_prefetch(row + ahead + i);
    });
    if (CENTER) mean[m] = mu;
    rstd[m] = r;
  }
}

template <bool CENTER, class T>
void norm_forward(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* weight,
                  float offset, const float* bias, const int64_t* seed, double dropout, T* h, T* y, float* mean,
                  float* rstd, int64_t M, int64_t N, float eps, int threads) {
  parallel_for(threads, M, 1 + 16384 / (N + 1), [=](int64_t begin, int64_t end) {
    with_flag(stream_ok(y, M, N, N), [=](auto streamed) {
      norm_forward_rows<CENTER>(streamed, x, x_stride, residual, residual_stride, weight, offset, bias, seed, dropout,
                                h, y, mean, rstd, N, eps, begin, end);
      if (streamed) stream_fence();
    });
  });
}

/// The backward of ROWS rows from row m on; adds to dw and db where they are not null.
template <bool CENTER, int ROWS, class STREAM, class T>
inline void norm_backward_rows(STREAM streamed, const T* dy, int64_t dy_stride, const T* x, int64_t x_stride,
                               const float* weight, float offset, const float* mean, const float* rstd, const T* dh,
                               const int64_t* seed, double dropout, T* dx, T* dresidual, float* dw, float* db,
                               int64_t N, int64_t m, int64_t last) {
  Vec sum_g[ROWS] = {}, sum_gx[ROWS] = {};
  float mu[ROWS], r[ROWS], c1[ROWS], c2[ROWS];
  for (int k = 0; k < ROWS; ++k) {
    mu[k] = CENTER ? mean[m + k] : 0.f;
    r[k] = rstd[m + k];
  }
  const T *g_rows = dy + m * dy_stride, *x_rows = x + m * x_stride;
  for_vectors(N, [&](int64_t i, auto n) {
    const Vec scale = weight ? load(weight + i, n) + offset : splat(1.f);
    Vec dw_i = dw ? load(dw + i, n) : Vec{}, db_i = db ? load(db + i, n) : Vec{};
    for (int k = 0; k < ROWS; ++k) {
      const Vec g = load(g_rows + k * dy_stride + i, n);
      const Vec xhat = (load(x_rows + k * x_stride + i, n) - mu[k]) * r[k];
      dw_i += g * xhat;
      db_i += g;
      const Vec scaled = g * scale;
      if (CENTER) sum_g[k] += scaled;
      sum_gx[k] += scaled * xhat;
    }
    if (dw) store(dw + i, dw_i, n);
    if (db) store(db + i, db_i, n);
  });
  for (int k = 0; k < ROWS; ++k) {
    c1[k] = CENTER ? sum(sum_g[k]) / N : 0.f;
    c2[k] = sum(sum_gx[k]) / N;
  }
  const int64_t g_ahead = m + 2 * ROWS <= last ? ROWS * dy_stride : 0;
  const int64_t x_ahead = m + 2 * ROWS <= last ? ROWS * x_stride : 0;
  for (int k = 0; k < ROWS; ++k) {
    const T *g_row = g_rows + k * dy_stride, *x_row = x_rows + k * x_stride, *h_row = dh + (m + k) * N;
    T* out = dx + (m + k) * N;
    const auto write = [&](auto finish) {
      for_vectors(N, [&](int64_t i, auto n) {
        Vec g = load(g_row + i, n);
        const Vec xhat = (load(x_row + i, n) - mu[k]) * r[k];
        if (weight) g *= load(weight + i, n) + offset;
        Vec d = (g - c1[k] - xhat * c2[k]) * r[k];
        if (dh) d += load(h_row + i, n);
        put(out + i, finish(d, i, n), n, streamed);
        __builtin_prefetch(g_row + g_ahead + i);
        __builtin_prefetch(x_row + x_ahead + i);
      });
    };
    if (seed) {
      const RowDropout kept(*seed, dropout, m + k);
      write([&](Vec d, int64_t i, auto n) {
        put(dresidual + (m + k) * N + i, d, n, streamed);
        return kept(d, i);
      });
    } else {
      write([](Vec d, int64_t, auto) { return d; });
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
  // One part is one item of work, so a part is always summed by one thread in row order.
  parallel_for(M * N < 32768 ? 1 : threads, parts, 1, [=](int64_t first, int64_t last) {
    with_flag(stream_ok(dx, M, N, N), [=](auto streamed) {
      for (int64_t part = first; part < last; ++part) {
        float* dw = dweight ? part_dw + part * N : nullptr;
        float* db = dbias ? part_db + part * N : nullptr;
        if (dw) std::memset(dw, 0, N * sizeof(float));
        if (db) std::memset(db, 0, N * sizeof(float));
        int64_t m = M * part / parts;
        const int64_t end = M * (part + 1) / parts;
        const auto rows = [&](auto count) {
          constexpr int ROWS = decltype(count)::value;
          for (; m + ROWS <= end; m += ROWS)
            norm_backward_rows<CENTER, ROWS>(streamed, dy, dy_stride, x, x_stride, weight, offset, mean, rstd, dh, seed,
                                             dropout, dx, dresidual, dw, db, N, m, end);
        };
        // Four long rows of dy and x would push each other out of the first-level cache between the passes.
        if (N * sizeof(T) <= 2048) rows(std::integral_constant<int, 4>{});
        rows(std::integral_constant<int, 2>{});
        rows(std::integral_constant<int, 1>{});
      }
      if (streamed) stream_fence();
    });
  });
  for (int64_t part = 0; part < parts; ++part) {
    const auto add = [&](float* total, const float* share) {
      for_vectors(N, [&](int64_t i, auto n) {
        store(total + i, part == 0 ? load(share + i, n) : load(total + i, n) + load(share + i, n), n);
      });
    };
    if (dweight) add(dweight, part_dw + part * N);
    if (dbias) add(dbias, part_db + part * N);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

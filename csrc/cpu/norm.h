// Forward and backward of LayerNorm (CENTER) and RMSNorm (not CENTER), with an optional residual addition.
//   forward   per row: [h = x + residual], mean and sum of squared deviations (two passes over the row in the
//             first-level cache: the one-pass formula cancels for large means), then y
//   backward  per row: pass one gathers mean(g), mean(g * xhat) and the row's share of dweight and dbias, pass two
//             writes dx
//   memory    forward reads x once and writes y once; backward reads x and dy once and writes dx once
//   parallel  rows; dweight and dbias go to norm_parts(M) partial sums added up in order, so that the result does not
//             depend on the number of threads
//   papers    Ba et al. 2016 (arXiv:1607.06450), Zhang and Sennrich 2019 (arXiv:1910.07467)
#pragma once
#include <type_traits>

#include "fastlm.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

template <bool CENTER, class T>
void norm_forward(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* weight,
                  float offset, const float* bias, T* h, T* y, float* mean, float* rstd, int64_t M, int64_t N,
                  float eps, int threads) {
  parallel_for(threads, M, 1 + 16384 / (N + 1), [=](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* row = x + m * x_stride;
      Vec squares{};
      if (residual) {
        const T* other = residual + m * residual_stride;
        T* out = h + m * N;
        for_vectors(N, [&](int64_t i, auto n) { store(out + i, load(row + i, n) + load(other + i, n), n); });
        row = out;
      }
      float mu = 0.f;
      if constexpr (CENTER) {
        mu = sum(sum_vectors(N, [&](int64_t i, auto n) { return load(row + i, n); })) / N;
        // The deviations also correct the mean, whose float32 sum is off by several ulp when the mean is large.
        Vec deviations{};
        const auto gather = [&](Vec d) {
          deviations += d;
          squares += d * d;
        };
        int64_t i = 0;
        for (; i + W <= N; i += W) gather(load(row + i) - mu);
        if (i < N) gather(load_n(row + i, N - i, mu) - mu);  // padding lanes deviate by 0, not by -mu
        const float shift = sum(deviations) / N;
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
        store(out + i, v, n);
      });
      if (CENTER) mean[m] = mu;
      rstd[m] = r;
    }
  });
}

template <bool CENTER, class T>
void norm_backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const float* weight, float offset,
                   const float* mean, const float* rstd, const T* dh, T* dx, float* dweight, float* dbias,
                   float* scratch, int64_t M, int64_t N, int threads) {
  const int64_t parts = norm_parts(M);
  float* const part_dw = scratch;
  float* const part_db = scratch + parts * N;
  // One part is one item of work, so a part is always summed by one thread in row order.
  parallel_for(M * N < 32768 ? 1 : threads, parts, 1, [=](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* dw = dweight ? part_dw + part * N : nullptr;
      float* db = dbias ? part_db + part * N : nullptr;
      if (dw) std::memset(dw, 0, N * sizeof(float));
      if (db) std::memset(db, 0, N * sizeof(float));
      for (int64_t m = M * part / parts; m < M * (part + 1) / parts; ++m) {
        const T *g_row = dy + m * dy_stride, *x_row = x + m * x_stride;
        const float mu = CENTER ? mean[m] : 0.f, r = rstd[m];
        Vec sum_g{}, sum_gx{};
        for_vectors(N, [&](int64_t i, auto n) {
          Vec g = load(g_row + i, n);
          const Vec xhat = (load(x_row + i, n) - mu) * r;
          if (dw) store(dw + i, load(dw + i, n) + g * xhat, n);
          if (db) store(db + i, load(db + i, n) + g, n);
          if (weight) g *= load(weight + i, n) + offset;
          if (CENTER) sum_g += g;
          sum_gx += g * xhat;
        });
        const float c1 = CENTER ? sum(sum_g) / N : 0.f, c2 = sum(sum_gx) / N;
        for_vectors(N, [&](int64_t i, auto n) {
          Vec g = load(g_row + i, n);
          const Vec xhat = (load(x_row + i, n) - mu) * r;
          if (weight) g *= load(weight + i, n) + offset;
          Vec d = (g - c1 - xhat * c2) * r;
          if (dh) d += load(dh + m * N + i, n);
          store(dx + m * N + i, d, n);
        });
      }
    }
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

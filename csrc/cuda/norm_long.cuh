// The kernels of norm.cu for rows that are too long for registers.
#pragma once
#include "cuda/norm.cuh"

namespace fastlm::cuda {

/// The mean and the sum of squared deviations of a thread's elements so far (Chan et al. 1979); without a mean the sum
/// of the squares.
struct Moments {
  float count = 0.f, mean = 0.f, squares = 0.f;

  __device__ __forceinline__ void add(float n, float total, float of_squares) {
    if (n == 0.f) return;
    const float both = count + n, delta = total / n - mean, share = n / both;
    squares += fmaf(delta * delta, count * share, of_squares);
    mean = fmaf(delta, share, mean);
    count = both;
  }
};

/// A block for each row: once for h and the statistics, again for y from shared memory or, where the row does not fit,
/// from the L2 cache.
template <class T, bool ALIGNED>
__device__ __forceinline__ void norm_forward_long_kernel(const NormForward& a) {
  constexpr int W = WIDTH<T>, K = 2, STEP = NORM_LONG_THREADS * W;
  RowSum sum({9, 0});
  const int64_t row = blockIdx.x, n = a.N;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
  T* h = static_cast<T*>(a.h) + row * n;
  Words* const kept = shared<Words>(NORM_ROOM) + threadIdx.x;
  const RowDropout dropout(a.seed ? *a.seed : 0, row, a.threshold, a.scale);
  Moments moments;
  for (int64_t first = threadIdx.x * W; first < n; first += K * STEP) {
    Words v[K];
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) v[k] = load_piece<T, ALIGNED, false>(x, first + k * STEP, n);
    if (a.residual) {
      Words other[K];
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) other[k] = load_piece<T, ALIGNED>(residual, first + k * STEP, n);
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        v[k] = added<T>(v[k], other[k], a.seed != nullptr, dropout, first + k * STEP);
        store_piece<T, ALIGNED>(h, first + k * STEP, n, v[k]);
      }
    }
    if (a.held) {
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        if (first + k * STEP < n) kept[(first / STEP + k) * NORM_LONG_THREADS] = v[k];
      }
    }
    float total = 0.f, squares = 0.f;
    int count = 0;
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      keep_packed(v[k]);
      float value[W];
      unpack<T>(v[k], value);
      FASTLM_UNROLL
      for (int i = 0; i < W; ++i) {
        total += value[i];
        squares = fmaf(value[i], value[i], squares);
        count += exists<ALIGNED>(first + k * STEP, i, n);
      }
    }
    if (a.mean) {
      const float average = total / static_cast<float>(count);
      squares = 0.f;
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        keep_packed(v[k]);
        float value[W];
        unpack<T>(v[k], value);
        FASTLM_UNROLL
        for (int i = 0; i < W; ++i) {
          const float d = exists<ALIGNED>(first + k * STEP, i, n) ? value[i] - average : 0.f;
          squares = fmaf(d, d, squares);
        }
      }
      moments.add(static_cast<float>(count), total, squares);
    } else {
      moments.squares += squares;
    }
  }
  const float count = static_cast<float>(n);
  float mean = 0.f, shift = 0.f, square;
  if (a.mean) {
    mean = sum(moments.mean * moments.count) / count;
    const float d = moments.mean - mean;
    const Pair both = sum(Pair{d * moments.count, fmaf(d * d, moments.count, moments.squares)});
    shift = both.a / count;
    square = fmaxf(fmaf(-shift, shift, both.b / count), 0.f);
  } else {
    square = sum(moments.squares) / count;
  }
  const float rstd = norm_rstd(square, a.eps);
  if (threadIdx.x == 0) {
    a.rstd[row] = rstd;
    if (a.mean) a.mean[row] = mean + shift;
  }
  const T* source = a.residual ? h : x;  // each thread reads what it wrote itself
  T* y = static_cast<T*>(a.y) + row * n;
  for (int64_t first = threadIdx.x * W; first < n; first += K * STEP) {
    Words v[K];
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      if (!a.held)
        v[k] = load_piece<T, ALIGNED, false>(source, first + k * STEP, n);
      else if (first + k * STEP < n)
        v[k] = kept[(first / STEP + k) * NORM_LONG_THREADS];
    }
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t column = first + k * STEP;
      if (column < n)
        store_piece<T, ALIGNED>(y, column, n,
                                normalised<T, ALIGNED, false>(a, v[k], column, n, mean, rstd, shift * rstd));
    }
  }
}

/// A block for each row: once for its two sums, again for dx from shared memory or, where x and dy do not fit, from the
/// L2 cache.
template <class T, bool ALIGNED>
__device__ __forceinline__ void norm_backward_long_kernel(const NormBackward& a) {
  constexpr int W = WIDTH<T>, K = 2, STEP = NORM_LONG_THREADS * W;
  RowSum sum({9, 0});
  const int64_t row = blockIdx.x, n = a.N;
  const T* x_row = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* g_row = static_cast<const T*>(a.dy) + row * a.dy_stride;
  const T* h_row = static_cast<const T*>(a.dh) + row * n;
  const float mean = a.mean ? a.mean[row] : 0.f, rstd = a.rstd[row], count = static_cast<float>(n);
  Words* const kept = shared<Words>(NORM_ROOM) + threadIdx.x;
  const auto pieces = [&](Words x_piece, Words g_piece, int64_t column, float (&xhat)[W], float (&g)[W]) {
    float x[W], weight[W];
    unpack<T>(x_piece, x);
    unpack<T>(g_piece, g);
    if (a.weight) load_parameter<T, ALIGNED>(a.weight, a.weight_dtype, column, n, weight);
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) {
      xhat[i] = (x[i] - mean) * rstd;
      if (a.weight) g[i] *= weight[i] + a.offset;
    }
  };
  Pair sums{0.f, 0.f};
  for (int64_t first = threadIdx.x * W; first < n; first += K * STEP) {
    Words x[K], g[K];
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      x[k] = load_piece<T, ALIGNED, false>(x_row, first + k * STEP, n);
      g[k] = load_piece<T, ALIGNED, false>(g_row, first + k * STEP, n);
    }
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t column = first + k * STEP;
      if (column >= n) continue;
      if (a.held) {
        kept[(2 * (first / STEP + k)) * NORM_LONG_THREADS] = x[k];
        kept[(2 * (first / STEP + k) + 1) * NORM_LONG_THREADS] = g[k];
      }
      float xhat[W], scaled[W];
      pieces(x[k], g[k], column, xhat, scaled);
      FASTLM_UNROLL
      for (int i = 0; i < W; ++i) {
        sums.a += scaled[i];
        sums.b = fmaf(scaled[i], xhat[i], sums.b);
      }
    }
  }
  sums = sum(sums);
  const float c1 = a.mean ? sums.a / count : 0.f, c2 = sums.b / count;
  for (int64_t column = threadIdx.x * W; column < n; column += STEP) {
    Words x, g, dh{0, 0, 0, 0};
    if (a.held) {
      x = kept[(2 * (column / STEP)) * NORM_LONG_THREADS];
      g = kept[(2 * (column / STEP) + 1) * NORM_LONG_THREADS];
    } else {
      x = load_piece<T, ALIGNED, false>(x_row, column, n);
      g = load_piece<T, ALIGNED, false>(g_row, column, n);
    }
    if (a.dh) dh = load_piece<T, ALIGNED>(h_row, column, n);
    float xhat[W], d[W];
    pieces(x, g, column, xhat, d);
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) d[i] = fmaf(-xhat[i], c2, d[i] - c1) * rstd;
    store_gradient<T, ALIGNED>(a, row, column, n, d, dh);
  }
}

/// The parts of dweight and dbias of long rows: a piece of columns for each thread, from every so many rows.
template <class T, bool ALIGNED>
__device__ __forceinline__ void norm_columns_kernel(const NormBackward& a) {
  constexpr int W = WIDTH<T>, ROWS = 4;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * NORM_COLUMN_THREADS + threadIdx.x) * W, n = a.N;
  float sum_w[W], sum_b[W];
  FASTLM_UNROLL
  for (int i = 0; i < W; ++i) sum_w[i] = sum_b[i] = 0.f;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * ROWS; first < a.M;
       first += static_cast<int64_t>(gridDim.y) * ROWS) {
    Words x[ROWS], g[ROWS];
    float mean[ROWS], rstd[ROWS];
    FASTLM_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      const int64_t row = first + k, there = row < a.M ? n : 0;
      x[k] = load_piece<T, ALIGNED>(static_cast<const T*>(a.x) + row * a.x_stride, column, there);
      g[k] = load_piece<T, ALIGNED>(static_cast<const T*>(a.dy) + row * a.dy_stride, column, there);
      mean[k] = a.mean && there ? a.mean[row] : 0.f;
      rstd[k] = there ? a.rstd[row] : 0.f;
    }
    FASTLM_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      float x_piece[W], g_piece[W];
      unpack<T>(x[k], x_piece);
      unpack<T>(g[k], g_piece);
      FASTLM_UNROLL
      for (int i = 0; i < W; ++i) {
        sum_b[i] += g_piece[i];
        sum_w[i] = fmaf(g_piece[i], (x_piece[i] - mean[k]) * rstd[k], sum_w[i]);
      }
    }
  }
  FASTLM_UNROLL
  for (int i = 0; i < W; ++i) {
    if (column + i < n) {
      if (a.weight_parts) a.weight_parts[blockIdx.y * n + column + i] = sum_w[i];
      if (a.bias_parts) a.bias_parts[blockIdx.y * n + column + i] = sum_b[i];
    }
  }
}

}  // namespace fastlm::cuda

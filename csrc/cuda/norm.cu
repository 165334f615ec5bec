// layer_norm and rms_norm, with the addition of a residual and its dropout: one set of kernels, in which rms_norm is
// the case without a mean.
//
// Forward     A row stays in registers as it came, 64 bytes a thread; 1 to 512 threads have one, several rows share a
//             block. Its mean, then the deviations, whose sum corrects the mean, then y with the parameters from the
//             cache. The team of threads depends on N alone, so a row has the same bits in a batch of any size.
// Backward    Blocks stay for the whole call and go through their rows. A thread keeps the weight and the float32 sums
//             of dweight and dbias for its 32 bytes of columns in registers; the next rows are on their way to shared
//             memory meanwhile (cp.async, each thread its own pieces, so no barrier), up to three ahead. A block leaves
//             one part of each sum; a second kernel adds the parts in order. No atomics: the same bits every time.
// Long rows   From sm_90 on 2 to 8 blocks of a cluster share a row and add up over distributed shared memory: forward
//             to 131072 elements of 2 bytes, backward to 65536. Else a block goes through the row in pieces (statistics
//             by Chan et al. 1979) and again from shared memory, or from the L2 cache where the row does not fit;
//             dweight and dbias are a kernel of their own there.
// Bytes       forward: x (and residual) read, y (and h) written, once. backward: x, dy (and dh) read, dx (and with
//             dropout dresidual) written, once; long rows in pieces read x and dy once more for dweight and dbias.
//             Parts: two float32 rows a multiprocessor, which stay in the L2 cache.
// Papers      Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
//
// What bounds it: 132 multiprocessors of an H200 share 4.8 TB/s, 36 bytes a nanosecond each; at 0.8 us of latency that
// takes 29 KB on their way at all times. Forward: 64 registers, so 1024 threads of 64 bytes, 64 KB when all load; a
// block of 128 threads at a time replaces one that is done, and while some load others compute. M = 4096, N = 768 or
// 1024: 1024 blocks of four rows, one wave of 7.8 blocks a multiprocessor; floor of 1024 bfloat16 16.8 MB, 3.5 us.
// Backward: 128 registers, so 512 threads, each with 64 bytes (x and dy) a row and up to three rows ahead: 96 KB. The
// same sizes: 256 blocks of four tiles of four rows; floor 25.2 MB, 5.2 us, and 2.1 MB of parts to the L2 cache and
// back.
// Issue slots are as near: 36 bytes a nanosecond are 5.2 elements a cycle forward and 3.4 backward in bfloat16, which
// leaves 25 and 37 instructions of 128 lanes for each. Counted along the path of layer_norm with both parameters in
// the binary for sm_90a (N = 1024): about 23 and 33. In float32 there is twice the room.
//
// Tried and lost, by what the compiler makes of it for sm_80 to sm_120: the float32 values kept beside the packed ones
// forward (64 registers and spills, 54 without: keep_packed); x and residual loaded all at once (spills with dropout);
// 64 bytes of columns a thread in the backward (16 spilled registers in float32; 32 bytes keep both sums); x and dy
// kept packed in the backward and rows copied ahead by address (49 instructions an element); parameters of every dtype
// in one loop of the forward (27).
//
// Never run on a GPU.
#include "cuda/norm.cuh"
#include "cuda/norm_long.cuh"

namespace fastlm::cuda {

// --- forward ---------------------------------------------------------------------------------------------------------

/// Rows in registers, 2^group_bits threads (of each block of a cluster) for each.
template <class T, bool ALIGNED, bool ADD>
__device__ __forceinline__ void norm_forward_kernel(const NormForward& a) {
  constexpr int W = WIDTH<T>, K = NORM_WORDS;
  const NormPlace<T> at(a.team, K);
  RowSum sum(a.team);
  const int64_t row = at.tile * (blockDim.x >> a.team.group_bits) + at.slot;
  const int n = row < a.M ? static_cast<int>(a.N) : 0;
  const float count = static_cast<float>(a.N);
  Words v[K];
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  if (ADD && a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* h = static_cast<T*>(a.h) + row * a.N;
    const RowDropout dropout(a.seed ? *a.seed : 0, row, a.threshold, a.scale);
    FASTLM_UNROLL
    for (int first = 0; first < K; first += 2) {  // two of each at a time: with all at once registers spill
      Words other[2];
      FASTLM_UNROLL
      for (int k = 0; k < 2; ++k) {
        v[first + k] = load_piece<T, ALIGNED>(x, at.column + (first + k) * at.step, n);
        other[k] = load_piece<T, ALIGNED>(residual, at.column + (first + k) * at.step, n);
      }
      FASTLM_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int column = at.column + (first + k) * at.step;
        v[first + k] = added<T>(v[first + k], other[k], a.seed != nullptr, dropout, column);
        store_piece<T, ALIGNED>(h, column, n, v[first + k]);
      }
    }
  } else {
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) v[k] = load_piece<T, ALIGNED>(x, at.column + k * at.step, n);
  }

  float mean = 0.f, shift = 0.f, square;
  if (a.mean) {
    float total = 0.f;
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      keep_packed(v[k]);
      float value[W];
      unpack<T>(v[k], value);
      FASTLM_UNROLL
      for (int i = 0; i < W; ++i) total += value[i];
    }
    mean = sum(total) / count;
    Pair moments{0.f, 0.f};
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      if (ALIGNED && at.column + k * at.step >= n) continue;
      keep_packed(v[k]);
      float value[W];
      unpack<T>(v[k], value);
      FASTLM_UNROLL
      for (int i = 0; i < W; ++i) {
        const float d = exists<ALIGNED>(at.column + k * at.step, i, n) ? value[i] - mean : 0.f;
        moments.a += d;
        moments.b = fmaf(d, d, moments.b);
      }
    }
    moments = sum(moments);
    shift = moments.a / count;
    square = fmaxf(fmaf(-shift, shift, moments.b / count), 0.f);
  } else {
    float total = 0.f;
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      keep_packed(v[k]);
      float value[W];
      unpack<T>(v[k], value);
      FASTLM_UNROLL
      for (int i = 0; i < W; ++i) total = fmaf(value[i], value[i], total);
    }
    square = sum(total) / count;
  }
  const float rstd = norm_rstd(square, a.eps);
  if (at.column == 0 && n > 0) {
    a.rstd[row] = rstd;
    if (a.mean) a.mean[row] = mean + shift;
  }
  T* y = static_cast<T*>(a.y) + row * a.N;
  if (ALIGNED && plain_parameters<T>(a)) {
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      const int column = at.column + k * at.step;
      keep_packed(v[k]);
      if (column < n)
        store_piece<T, ALIGNED>(y, column, n,
                                normalised<T, ALIGNED, true>(a, v[k], column, n, mean, rstd, shift * rstd));
    }
  } else {
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      const int column = at.column + k * at.step;
      keep_packed(v[k]);
      if (column < n)
        store_piece<T, ALIGNED>(y, column, n,
                                normalised<T, ALIGNED, false>(a, v[k], column, n, mean, rstd, shift * rstd));
    }
  }
  sum.leave();
}

// --- backward --------------------------------------------------------------------------------------------------------

/// Every so many tiles of rows in registers: dx (and dresidual), and one part of dweight and dbias for each block (each
/// cluster).
template <class T, bool ALIGNED>
__device__ __forceinline__ void norm_backward_kernel(const NormBackward& a) {
  constexpr int W = WIDTH<T>, K = NORM_BACKWARD_WORDS, E = K * W;
  const NormPlace<T> at(a.team, K);
  RowSum sum(a.team);
  const int n = static_cast<int>(a.N), height = static_cast<int>(blockDim.x) >> a.team.group_bits;
  const float inverse = 1.f / static_cast<float>(n);
  float weight[E], sum_w[E], sum_b[E];
  FASTLM_UNROLL
  for (int k = 0; k < K; ++k) {
    float piece[W];
    if (a.weight) load_parameter<T, ALIGNED>(a.weight, a.weight_dtype, at.column + k * at.step, n, piece);
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) {
      weight[k * W + i] = a.weight ? piece[i] + a.offset : 1.f;
      sum_w[k * W + i] = sum_b[k * W + i] = 0.f;
    }
  }

  // The ring of rows in shared memory: every thread copies and reads its own pieces alone. What lies behind the end of
  // a row is 0 there from the start and never copied.
  const int streams = a.dh ? 3 : 2, pitch = static_cast<int>(blockDim.x), stage_words = streams * K * pitch;
  Words* const ring = shared<Words>(NORM_ROOM) + threadIdx.x;
  const int64_t stride = at.tiles * height;
  int64_t row = at.tile * height + at.slot;
  const T* x_row = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* g_row = static_cast<const T*>(a.dy) + row * a.dy_stride;
  const auto copy = [&](Words* to, const T* from, int column) {
    if constexpr (ALIGNED) {
      copy_async(to, from + column);
    } else {
      *to = load_piece<T, false>(from, column, n);
    }
  };
  const auto fetch = [&](Words* stage, int64_t coming) {
    if (coming < a.M) {
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        const int column = at.column + k * at.step;
        if (column < n) {
          copy(stage + k * pitch, x_row, column);
          copy(stage + (K + k) * pitch, g_row, column);
          if (a.dh) copy(stage + (2 * K + k) * pitch, static_cast<const T*>(a.dh) + coming * n, column);
        }
      }
    }
    copy_commit();
    x_row += stride * a.x_stride;
    g_row += stride * a.dy_stride;
  };
  for (int s = 0; s < a.stages; ++s) {
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) {
      if (at.column + k * at.step >= n) {
        for (int t = 0; t < streams; ++t) ring[s * stage_words + (t * K + k) * pitch] = {0, 0, 0, 0};
      }
    }
    fetch(ring + s * stage_words, row + s * stride);
  }
  float mean = 0.f, rstd = 0.f;  // of the row to come
  if (row < a.M) {
    if (a.mean) mean = a.mean[row];
    rstd = a.rstd[row];
  }
  int turn = 0;
  for (; row - at.slot < a.M; row += stride) {
    Words* const stage = ring + turn;
    const bool there = row < a.M;
    const float mu = mean, r = rstd;
    if (row + stride < a.M) {
      if (a.mean) mean = a.mean[row + stride];
      rstd = a.rstd[row + stride];
    }
    if (a.stages == 1) {
      copy_wait<0>();
    } else if (a.stages == 2) {
      copy_wait<1>();
    } else {
      copy_wait<2>();
    }
    float xhat[E], scaled[E];
    Pair sums{0.f, 0.f};
    if (there) {
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        float x[W], g[W];
        unpack<T>(stage[k * pitch], x);
        unpack<T>(stage[(K + k) * pitch], g);
        FASTLM_UNROLL
        for (int i = 0; i < W; ++i) {
          const int e = k * W + i;
          xhat[e] = (x[i] - mu) * r;
          scaled[e] = g[i] * weight[e];
          sum_b[e] += g[i];
          sum_w[e] = fmaf(g[i], xhat[e], sum_w[e]);
          sums.a += scaled[e];
          sums.b = fmaf(scaled[e], xhat[e], sums.b);
        }
      }
    }
    sums = sum(sums);
    if (there) {
      const float c1 = a.mean ? sums.a * inverse : 0.f, c2 = sums.b * inverse;
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        const int column = at.column + k * at.step;
        if (column < n) {
          float d[W];
          FASTLM_UNROLL
          for (int i = 0; i < W; ++i) d[i] = fmaf(-xhat[k * W + i], c2, scaled[k * W + i] - c1) * r;
          const Words dh = a.dh ? stage[(2 * K + k) * pitch] : Words{0, 0, 0, 0};
          store_gradient<T, ALIGNED>(a, row, column, n, d, dh);
        }
      }
    }
    fetch(stage, row + a.stages * stride);  // all of it has been read by now
    turn = turn + stage_words == a.stages * stage_words ? 0 : turn + stage_words;
  }
  sum.leave();
  if (!a.weight_parts && !a.bias_parts) return;

  // The rows of a tile are added in shared memory, in which the ring is no longer needed.
  copy_wait<0>();
  const int columns = E << a.team.group_bits, local = (threadIdx.x & ((1 << a.team.group_bits) - 1)) * W;
  float* const slots = shared<float>(NORM_ROOM);
  const auto add_rows = [&](const float (&sums)[E], float* parts) {
    __syncthreads();
    FASTLM_UNROLL
    for (int e = 0; e < E; e += 4) {
      store_words(slots + at.slot * columns + local + e / W * at.step + e % W,
                  {__float_as_uint(sums[e]), __float_as_uint(sums[e + 1]), __float_as_uint(sums[e + 2]),
                   __float_as_uint(sums[e + 3])});
    }
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
      float total = 0.f;
      for (int s = 0; s < height; ++s) total += slots[s * columns + c];
      const int column = at.rank * columns + c;
      if (column < n) parts[at.tile * a.N + column] = total;
    }
  };
  if (a.weight_parts) add_rows(sum_w, a.weight_parts);
  if (a.bias_parts) add_rows(sum_b, a.bias_parts);
}

/// The sum of the parts, for 32 columns a block: each warp every so many of them, then the warps in order.
__device__ __forceinline__ void norm_parts_kernel(const NormParts& a) {
  constexpr int WARPS = NORM_PARTS_THREADS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const bool inside = column < a.N;
  const float* parts = a.parts + blockIdx.y * a.count * a.N + column;
  float total = 0.f;
#ifndef FASTLM_EMULATED
#pragma unroll 4
#endif
  for (int64_t part = warp; part < a.count; part += WARPS) {
    if (inside) total += parts[part * a.N];
  }
  float* const room = shared<float>();
  room[warp * 32 + lane] = total;
  __syncthreads();
  if (warp > 0 || !inside) return;
  for (int w = 1; w < WARPS; ++w) total += room[w * 32 + lane];
  void* const to = a.outputs[blockIdx.y];
  if (a.dtype == DType::float32) {
    static_cast<float*>(to)[column] = total;
  } else if (a.dtype == DType::bfloat16) {
    static_cast<bfloat16*>(to)[column] = round_to<bfloat16>(total);
  } else {
    static_cast<float16*>(to)[column] = round_to<float16>(total);
  }
}

FASTLM_KERNEL(norm_forward, 0, 512, 1, NormForward, norm_forward_kernel<Scalar, false, true>)
FASTLM_KERNEL(norm_forward, 1, 512, 2, NormForward, norm_forward_kernel<Scalar, true, false>)
FASTLM_KERNEL(norm_forward, 2, 512, 2, NormForward, norm_forward_kernel<Scalar, true, true>)
FASTLM_KERNEL(norm_forward_long, 0, 512, 1, NormForward, norm_forward_long_kernel<Scalar, false>)
FASTLM_KERNEL(norm_forward_long, 1, 512, 2, NormForward, norm_forward_long_kernel<Scalar, true>)
FASTLM_KERNEL(norm_backward, 0, 512, 1, NormBackward, norm_backward_kernel<Scalar, false>)
FASTLM_KERNEL(norm_backward, 1, 512, 1, NormBackward, norm_backward_kernel<Scalar, true>)
FASTLM_KERNEL(norm_backward_long, 0, 512, 1, NormBackward, norm_backward_long_kernel<Scalar, false>)
FASTLM_KERNEL(norm_backward_long, 1, 512, 2, NormBackward, norm_backward_long_kernel<Scalar, true>)
FASTLM_KERNEL(norm_columns, 0, 256, 2, NormBackward, norm_columns_kernel<Scalar, false>)
FASTLM_KERNEL(norm_columns, 1, 256, 2, NormBackward, norm_columns_kernel<Scalar, true>)
FASTLM_KERNEL(norm_parts, 0, 512, 2, NormParts, norm_parts_kernel)

}  // namespace fastlm::cuda

// Rows of a matrix over lanes, blocks and clusters: how a row is cut into accesses, and what is reduced over it.
#pragma once
#include "cuda/device.cuh"
#include "cuda/row.h"

namespace fastlm::cuda {

// --- cuts ------------------------------------------------------------------------------------------------------------

/// A word in registers, whose element j is at p[j]; `left` elements of the row begin at p, under Cut::elements maybe
/// fewer than a word has. The missing ones are `fill`.
template <class T, Cut CUT>
__device__ __forceinline__ Words load_word(const T* p, int64_t left, T fill) {
  if constexpr (CUT != Cut::elements) {
    return load_words_once(p);
  } else {
    float value[WIDTH<T>];  // packing undoes what to_float did: every T survives
    FASTLM_UNROLL
    for (int j = 0; j < WIDTH<T>; ++j) value[j] = to_float(j < left ? p[j] : fill);
    return pack<T>(value);
  }
}
template <class T, Cut CUT>
__device__ __forceinline__ void store_word(T* p, int64_t left, const float (&in)[WIDTH<T>]) {
  if constexpr (CUT != Cut::elements) {
    store_words_global(p, pack<T>(in));
  } else {
    FASTLM_UNROLL
    for (int j = 0; j < WIDTH<T>; ++j)
      if (j < left) p[j] = round_to<T>(in[j]);
  }
}

/// Where the words of one row lie. Under Cut::shifted the elements before its first multiple of 16 bytes and those
/// behind its last, fewer than 2 * WIDTH<T> together, go to the row's first threads, one each: edge(). The same columns
/// then fall to other threads in a row that starts elsewhere, so a sum over them may differ in the last bit; under the
/// other two they fall alike.
template <class T, Cut CUT>
struct Span {
  int64_t n;
  int head = 0;  // elements before the first word
  int words;

  __device__ __forceinline__ Span(const T* row, int64_t n) : n(n) {
    if constexpr (CUT == Cut::shifted) {
      head = -static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (WIDTH<T> - 1);
      if (head > n) head = static_cast<int>(n);
    }
    words = static_cast<int>((n - head + (CUT == Cut::elements ? WIDTH<T> - 1 : 0)) / WIDTH<T>);
  }
  /// Column of a word's first element.
  __device__ __forceinline__ int64_t column(int64_t word) const { return head + word * WIDTH<T>; }
  /// Column of the one element that this thread of the row takes beside its words; n or above for none.
  __device__ __forceinline__ int64_t edge(int thread) const {
    return thread < head ? thread : static_cast<int64_t>(words) * WIDTH<T> + thread;
  }
};

// --- reductions ------------------------------------------------------------------------------------------------------

/// The largest of some numbers, and the sum of exp(number - largest) (online softmax, Milakov and Gimelshein 2018,
/// arXiv:1805.02867). A NaN or +inf among them makes the sum NaN.
struct MaxSum {
  // Not -inf, which less itself would be NaN: then a thread without numbers would spoil those of others.
  float max = -3.4028234663852886e38f;
  float sum = 0;
};

/// Exactly symmetric, so that every lane of a butterfly gets the same bits.
struct JoinMaxSum {
  __device__ __forceinline__ MaxSum operator()(MaxSum a, MaxSum b) const {
    const bool above = b.max > a.max;
    const MaxSum large = above ? b : a, small = above ? a : b;
    return {large.max, large.sum + small.sum * exp_fast(small.max - large.max)};
  }
};

__device__ __forceinline__ MaxSum exchange(MaxSum value, int lanes) {
  return {__shfl_xor_sync(FULL, value.max, lanes), __shfl_xor_sync(FULL, value.sum, lanes)};
}

/// Of COUNT values at once, each over the same number of neighbouring lanes (a power of two known at run time).
template <int COUNT, class T, class Combine>
__device__ __forceinline__ void lanes_reduce(T (&values)[COUNT], int lanes, Combine combine) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    FASTLM_UNROLL
    for (int i = 0; i < COUNT; ++i) values[i] = combine(values[i], exchange(values[i], step));
  }
}

/// Over all threads of a block or, for cluster > 1, of the cluster, whose blocks must have called cluster_begin() at
/// their start; every thread gets the same bits. room: cluster * blockDim.x / 32 values in shared memory, which stay in
/// use, so that every reduction of a kernel needs its own; the first one waits for the cluster's blocks to run. none:
/// what combine leaves the other value with. Every warp gives its value to each block of the cluster, so that one
/// barrier is enough and nothing is read from another block, which may thus end.
template <class T, class Combine>
__device__ __forceinline__ T row_reduce(T value, Combine combine, T* room, int cluster, T none = {},
                                        bool first = true) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  value = warp_reduce(value, combine);
  if (cluster == 1) {
    if (lane == 0) room[warp] = value;
    __syncthreads();
  } else {
    if (first) cluster_wait();
    if (lane < cluster) *cluster_peer(room + cluster_rank() * warps + warp, lane) = value;
    cluster_sync();
  }
  T result = none;
  for (int i = lane; i < cluster * warps; i += 32) result = combine(result, room[i]);
  return warp_reduce(result, combine);
}

}  // namespace fastlm::cuda

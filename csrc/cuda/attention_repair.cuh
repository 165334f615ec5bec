// Rows that 0 * NaN spoiled. A weight of 0 hides a key from a product of tiles only as long as its key and value are
// finite. Where a row came out NaN although the logarithm of its sum is finite, the NaN is of what it sees or of what
// it must not: it is computed once more, key by key, from what it sees alone. A warp for a row, from global memory: as
// slow as that sounds, and run by nobody whose numbers are finite.
#pragma once
#include "cuda/attention.cuh"

namespace fastlm::cuda {

/// One query of a head: its logits, one key at a time. Every lane of a warp together; lane l has columns 8 l ... 8 l
/// + 7.
template <class T>
struct OneQuery {
  const AttentionArguments& a;
  const Extent& e;
  General general;
  int head, kv_head, i;
  float q[8];

  __device__ OneQuery(const AttentionArguments& a, const Extent& e, int head, int i)
      : a(a), e(e), general(a, e, head), head(head), kv_head(head / (a.heads / a.kv_heads)), i(i) {
    read(q, rows_of(static_cast<const T*>(a.q), a.q_at, e.batch, head, e.start_q + static_cast<int64_t>(i)), a.d);
  }
  static __device__ int column() { return 8 * (static_cast<int>(threadIdx.x) % 32); }
  /// This lane's part of a row; zeros behind its end.
  static __device__ void read(float (&x)[8], const T* row, int width) {
    if (column() < width) {
      unpack<T>(load_words(row + column()), x);
    } else {
      for (float& value : x) value = 0;
    }
  }
  __device__ void key(float (&x)[8], int j) const {
    read(x, rows_of(static_cast<const T*>(a.k), a.k_at, e.batch, kv_head, e.start_k + static_cast<int64_t>(j)), a.d);
  }
  __device__ void value(float (&x)[8], int j) const {
    read(x, rows_of(static_cast<const T*>(a.v), a.v_at, e.batch, kv_head, e.start_k + static_cast<int64_t>(j)),
         a.width_v);
  }
  static __device__ float dot(const float (&x)[8], const float (&y)[8]) {
    float sum = 0;
    for (int c = 0; c < 8; ++c) sum += x[c] * y[c];
    return warp_reduce(sum, Sum{});
  }
  /// The keys that positions let it see: first() ... last() - 1.
  __device__ int first() const { return a.before ? max_of(i - e.before, 0) : 0; }
  __device__ int last() const { return a.after ? min_of(i + e.after + 1, e.len_k) : e.len_k; }
  /// In units of log2, -inf where it is hidden.
  __device__ float logit(const float (&k)[8], int j, float& steep) const {
    float x[1] = {dot(q, k)}, s[1];
    general.template logits<false, true>(x, s, i, j, true);
    steep = s[0];
    return x[0];
  }
};

template <class T>
__device__ __forceinline__ void write_row(T* row, const float (&x)[8], int width) {
  if (OneQuery<T>::column() < width) store_words(row + OneQuery<T>::column(), pack<T>(x));
}
/// Whether the row holds a NaN: the same answer for every lane.
template <class T>
__device__ __forceinline__ bool spoiled(const T* row, int width) {
  float x[8];
  OneQuery<T>::read(x, row, width);
  bool nan = false;
  for (float value : x) nan |= value != value;
  return __ballot_sync(FULL, nan) != 0;
}

/// Row i of out, written by this block and a barrier ago, where it is spoiled.
template <class T>
__device__ void repair_out(const AttentionArguments& a, const Extent& e, int head, int i) {
  T* const row = rows_of(static_cast<T*>(a.out), a.out_at, e.batch, head, e.start_q + static_cast<int64_t>(i));
  const int64_t number = row_of(a, e, head) + i;
  const float total = a.lse[number] * LOG2_E;
  if (!(fabsf(total) < INF) || !spoiled(row, a.width_v)) return;
  const OneQuery<T> query(a, e, head, i);
  float sum[8] = {}, k[8], v[8], steep;
  for (int j = query.first(); j < query.last(); ++j) {
    query.key(k, j);
    const float x = query.logit(k, j, steep);
    if (x == -INF) continue;
    float p = exp2_fast(x - total) * a.keep_factor;
    if (a.threshold && RowDropout(*a.seed, number, a.threshold, 1.f).dropped(j)) p = 0;
    query.value(v, j);
    for (int c = 0; c < 8; ++c) sum[c] += p * v[c];
  }
  write_row(row, sum, a.width_v);
}

/// Row i of dq, where it is spoiled. a.shift and a.delta are what prepare made.
template <class T>
__device__ void repair_dq(const AttentionArguments& a, const Extent& e, int head, int i) {
  T* const row = rows_of(static_cast<T*>(a.dq), a.dq_at, e.batch, head, e.start_q + static_cast<int64_t>(i));
  const int64_t number = row_of(a, e, head) + i;
  const float total = a.shift[number], delta = a.delta[number];
  if (!(fabsf(total) < INF) || !(fabsf(delta) < INF) || !spoiled(row, a.d)) return;
  const OneQuery<T> query(a, e, head, i);
  float sum[8] = {}, grad[8], k[8], v[8], steep;
  OneQuery<T>::read(
      grad, rows_of(static_cast<const T*>(a.dout), a.dout_at, e.batch, head, e.start_q + static_cast<int64_t>(i)),
      a.width_v);
  for (int j = query.first(); j < query.last(); ++j) {
    query.key(k, j);
    const float x = query.logit(k, j, steep);
    if (x == -INF) continue;
    query.value(v, j);
    float dp = OneQuery<T>::dot(grad, v) * a.keep_factor;
    if (a.threshold && RowDropout(*a.seed, number, a.threshold, 1.f).dropped(j)) dp = 0;
    const float ds = exp2_fast(x - total) * (dp - delta) * steep * a.scale;
    for (int c = 0; c < 8; ++c) sum[c] += ds * k[c];
  }
  write_row(row, sum, a.d);
}

}  // namespace fastlm::cuda

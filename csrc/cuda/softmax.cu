// softmax and log_softmax. Reads x and writes y (backward: reads y and dy, writes dx), each once:
//
//   few, many   rows of up to 32 lanes: few holds a word (16 bytes) of several rows in each lane, many several words of
//               one; a warp needs no barrier
//   block       a row for a block, or for a cluster of up to 8 blocks (sm_90), in registers: 8 words a thread forward,
//   4
//               of y and of dy backward. 8 blocks of 512 threads hold 262144 bfloat16, of 1024 as many float32. What a
//               row has above that, or above 1024 threads without clusters, waits in shared memory, which every
//               thread fills for itself (cp.async) and so needs no barrier for
//   twice       longer rows: a block or cluster reads the row for its statistics and again, mostly from the L2 cache,
//               for the result
//
// Rows that start anywhere are read 16 bytes at a time too, between their edges, as long as all tensors start alike
// (row.cuh); else each thread moves the same elements one by one, so that the sums have the same bits. Across threads
// go pairs of the largest element and the sum of exp(x - largest) in one reduction (online softmax, Milakov and
// Gimelshein 2018, arXiv:1805.02867); the exponentials are computed again for the result, because the words take half
// the registers of float32: 2 of them and about 10 other instructions for 4 bytes moved, half of what an H100 issues
// meanwhile.
//
// Floor: 4 bytes an element of 16 bits forward and 6 backward over the bandwidth. In flight: at 64 registers a
// multiprocessor has 1024 threads, which ask for 128 bytes each at once: 128 KB against the 29 KB that 4.8 TB/s need,
// so that blocks which compute or store leave enough.
//
// Never run on a GPU.
#include "cuda/softmax.h"

#include "cuda/row.cuh"

namespace fastlm::cuda {

/// What the result of a row needs beside its elements.
struct SoftmaxRow {
  float top, factor;  // forward: the largest element; 1 / sum, or its logarithm. backward: factor is the sum
};

template <bool BACKWARD>
__device__ __forceinline__ float softmax_result(float x, float y, SoftmaxRow row, int log) {
  if constexpr (BACKWARD) return log ? x - exp_fast(y) * row.factor : y * (x - row.factor);
  return log ? (x - row.top) - row.factor : exp_fast(x - row.top) * row.factor;
}

template <class T>
__device__ __forceinline__ T softmax_fill(bool backward) {
  return round_to<T>(backward ? 0.0f : __int_as_float(static_cast<int>(0xff800000u)));  // -inf
}

/// A word of x, or of dy and y.
template <class T, Cut CUT, bool BACKWARD>
struct SoftmaxWord {
  Words x, y;

  __device__ __forceinline__ void load(const T* from, const T* from_y, int64_t left) {
    x = load_word<T, CUT>(from, left, softmax_fill<T>(BACKWARD));
    if constexpr (BACKWARD) y = load_word<T, CUT>(from_y, left, softmax_fill<T>(true));
  }
  __device__ __forceinline__ void unpack(float (&value)[WIDTH<T>], float (&other)[WIDTH<T>]) const {
    cuda::unpack<T>(x, value);
    if constexpr (BACKWARD) cuda::unpack<T>(y, other);
  }
  __device__ __forceinline__ void finish(T* out, int64_t left, SoftmaxRow row, int log) const {
    float value[WIDTH<T>], other[WIDTH<T>] = {};
    unpack(value, other);
    FASTLM_UNROLL
    for (int j = 0; j < WIDTH<T>; ++j) value[j] = softmax_result<BACKWARD>(value[j], other[j], row, log);
    store_word<T, CUT>(out, left, value);
  }
};

/// The element of a row's edge that a thread has, -inf (backward: 0) for none.
template <class T, bool BACKWARD>
struct SoftmaxEdge {
  float x = to_float(softmax_fill<T>(BACKWARD)), y = 0;

  __device__ __forceinline__ void load(const T* from, const T* from_y, int64_t column, int64_t n) {
    if (column >= n) return;
    x = to_float(from[column]);
    if constexpr (BACKWARD) y = to_float(from_y[column]);
  }
  __device__ __forceinline__ void finish(T* out, int64_t column, int64_t n, SoftmaxRow row, int log) const {
    if (column < n) out[column] = round_to<T>(softmax_result<BACKWARD>(x, y, row, log));
  }
};

/// Rows of up to 32 lanes: WORDS words of ROWS rows in each lane.
template <class T, Cut CUT, bool BACKWARD, int WORDS, int ROWS>
__device__ __forceinline__ void softmax_warp(const SoftmaxArguments& a) {
  const int lanes = 1 << a.lane_bits, lane = threadIdx.x & (lanes - 1), in_block = SOFTMAX_THREADS >> a.lane_bits;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * ROWS * in_block + (threadIdx.x >> a.lane_bits);
  const auto x = [&](int r) { return static_cast<const T*>(a.x) + (first + r * in_block) * a.stride; };
  const auto y = [&](int r) { return static_cast<const T*>(a.y) + (first + r * in_block) * a.n; };
  const auto span = [&](int r) { return Span<T, CUT>(x(r), first + r * in_block < a.m ? a.n : 0); };

  SoftmaxWord<T, CUT, BACKWARD> word[ROWS][WORDS];
  SoftmaxEdge<T, BACKWARD> edge[ROWS];
  FASTLM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const Span<T, CUT> s = span(r);
    FASTLM_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      const int i = k * lanes + lane;
      const int64_t column = s.column(i);
      if (i < s.words) word[r][k].load(x(r) + column, y(r) + column, s.n - column);
    }
    if constexpr (CUT == Cut::shifted) edge[r].load(x(r), y(r), s.edge(lane), s.n);
  }

  float top[ROWS], total[ROWS];
  if constexpr (!BACKWARD) {
    FASTLM_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      top[r] = edge[r].x;
      FASTLM_UNROLL
      for (int k = 0; k < WORDS; ++k) {
        float value[WIDTH<T>];
        if (k * lanes + lane >= span(r).words) continue;
        cuda::unpack<T>(word[r][k].x, value);
        FASTLM_UNROLL
        for (int j = 0; j < WIDTH<T>; ++j) top[r] = fmaxf(top[r], value[j]);
      }
    }
    lanes_reduce(top, lanes, Max{});
  }
  FASTLM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    if constexpr (CUT != Cut::shifted) {
      total[r] = 0;
    } else if constexpr (BACKWARD) {
      total[r] = a.log ? edge[r].x : edge[r].x * edge[r].y;
    } else {
      total[r] = span(r).edge(lane) < span(r).n ? exp_fast(edge[r].x - top[r]) : 0;
    }
    FASTLM_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      float value[WIDTH<T>], other[WIDTH<T>];
      if (k * lanes + lane >= span(r).words) continue;
      word[r][k].unpack(value, other);
      FASTLM_UNROLL
      for (int j = 0; j < WIDTH<T>; ++j) {
        if constexpr (BACKWARD) {
          total[r] += a.log ? value[j] : value[j] * other[j];
        } else {
          total[r] += exp_fast(value[j] - top[r]);
        }
      }
    }
  }
  lanes_reduce(total, lanes, Sum{});

  FASTLM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const Span<T, CUT> s = span(r);
    SoftmaxRow row{0, total[r]};
    if constexpr (!BACKWARD) row = {top[r], a.log ? logf(total[r]) : 1.0f / total[r]};
    T* out = static_cast<T*>(a.out) + (first + r * in_block) * a.n;
    FASTLM_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      const int i = k * lanes + lane;
      if (i < s.words) word[r][k].finish(out + s.column(i), s.n - s.column(i), row, a.log);
    }
    if constexpr (CUT == Cut::shifted) edge[r].finish(out, s.edge(lane), s.n, row, a.log);
  }
}

/// A thread's share of a row's statistics, to which words are added.
template <class T, bool BACKWARD>
struct SoftmaxSum {
  float sum = 0;

  /// The words whose number, counted in steps from this thread's own, is below `end`.
  template <Cut CUT, int WORDS>
  __device__ __forceinline__ void add(const SoftmaxWord<T, CUT, BACKWARD> (&word)[WORDS], int64_t end, int step,
                                      int log) {
    FASTLM_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      float value[WIDTH<T>], other[WIDTH<T>];
      if (static_cast<int64_t>(k) * step >= end) continue;
      word[k].unpack(value, other);
      FASTLM_UNROLL
      for (int j = 0; j < WIDTH<T>; ++j) sum += log ? value[j] : value[j] * other[j];
    }
  }
  __device__ __forceinline__ void add(SoftmaxEdge<T, BACKWARD> edge, int log) { sum += log ? edge.x : edge.x * edge.y; }
  __device__ __forceinline__ SoftmaxRow over_row(int cluster, int) const {
    return {0, row_reduce(sum, Sum{}, shared<float>(), cluster)};
  }
};
template <class T>
struct SoftmaxSum<T, false> {
  MaxSum sum;

  template <Cut CUT, int WORDS>
  __device__ __forceinline__ void add(const SoftmaxWord<T, CUT, false> (&word)[WORDS], int64_t end, int step, int) {
    float value[WIDTH<T>], top = sum.max;
    FASTLM_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      if (static_cast<int64_t>(k) * step >= end) continue;
      cuda::unpack<T>(word[k].x, value);
      FASTLM_UNROLL
      for (int j = 0; j < WIDTH<T>; ++j) top = fmaxf(top, value[j]);
    }
    sum.sum *= exp_fast(sum.max - top);
    sum.max = top;
    FASTLM_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      if (static_cast<int64_t>(k) * step >= end) continue;
      cuda::unpack<T>(word[k].x, value);
      FASTLM_UNROLL
      for (int j = 0; j < WIDTH<T>; ++j) sum.sum += exp_fast(value[j] - top);
    }
  }
  __device__ __forceinline__ void add(SoftmaxEdge<T, false> edge, int) {
    const float top = fmaxf(sum.max, edge.x);
    sum = {top, sum.sum * exp_fast(sum.max - top) + exp_fast(edge.x - top)};
  }
  __device__ __forceinline__ SoftmaxRow over_row(int cluster, int log) const {
    const MaxSum all = row_reduce(sum, JoinMaxSum{}, shared<MaxSum>(), cluster);
    return {all.max, log ? logf(all.sum) : 1.0f / all.sum};
  }
};

/// One row, for a block or a cluster.
template <class T, Cut CUT>
struct SoftmaxPlace {
  const T *x, *y;
  T* out;
  int thread, threads;  // of the row
  Span<T, CUT> span;

  __device__ __forceinline__ explicit SoftmaxPlace(const SoftmaxArguments& a)
      : SoftmaxPlace(a, blockIdx.x / static_cast<unsigned>(a.cluster)) {}

 private:
  __device__ __forceinline__ SoftmaxPlace(const SoftmaxArguments& a, int64_t row)
      : x(static_cast<const T*>(a.x) + row * a.stride),
        y(static_cast<const T*>(a.y) + row * a.n),
        out(static_cast<T*>(a.out) + row * a.n),
        thread(static_cast<int>(blockIdx.x % static_cast<unsigned>(a.cluster) * blockDim.x + threadIdx.x)),
        threads(static_cast<int>(a.cluster * blockDim.x)),
        span(x, a.n) {}

 public:
  template <bool BACKWARD>
  __device__ __forceinline__ void load(SoftmaxWord<T, CUT, BACKWARD>& word, int64_t i) const {
    const int64_t column = span.column(i);
    if (i < span.words) word.load(x + column, y + column, span.n - column);
  }
  template <bool BACKWARD>
  __device__ __forceinline__ void finish(const SoftmaxWord<T, CUT, BACKWARD>& word, int64_t i, SoftmaxRow row,
                                         int log) const {
    const int64_t column = span.column(i);
    if (i < span.words) word.finish(out + column, span.n - column, row, log);
  }
};

template <class T, Cut CUT, bool BACKWARD>
__device__ __forceinline__ void softmax_block(const SoftmaxArguments& a) {
  constexpr int WORDS = SOFTMAX_WORDS<BACKWARD>, TENSORS = BACKWARD ? 2 : 1;
  if (a.cluster > 1) cluster_begin();
  const SoftmaxPlace<T, CUT> at(a);
  const auto& s = at.span;
  // Behind the room of row_reduce; a thread's own words are a block's threads apart.
  Words* stash = shared<Words>(ROW_ROOM * sizeof(MaxSum)) + threadIdx.x;
  const int apart = static_cast<int>(blockDim.x);

  SoftmaxWord<T, CUT, BACKWARD> word[WORDS];
  FASTLM_UNROLL
  for (int k = 0; k < WORDS; ++k) {
    at.load(word[k], k * at.threads + at.thread);
  }
  for (int k = 0; k < a.stashed; ++k) {
    const int i = (WORDS + k) * at.threads + at.thread;
    if (i >= s.words) break;
    if constexpr (CUT == Cut::elements) {
      SoftmaxWord<T, CUT, BACKWARD> kept;
      at.load(kept, i);
      stash[TENSORS * k * apart] = kept.x;
      if constexpr (BACKWARD) stash[(TENSORS * k + 1) * apart] = kept.y;
    } else {
      copy_async(stash + TENSORS * k * apart, at.x + s.column(i));
      if constexpr (BACKWARD) copy_async(stash + (TENSORS * k + 1) * apart, at.y + s.column(i));
    }
  }
  const int64_t column = s.edge(at.thread);
  SoftmaxEdge<T, BACKWARD> edge;
  if constexpr (CUT == Cut::shifted) edge.load(at.x, at.y, column, s.n);

  SoftmaxSum<T, BACKWARD> sum;
  sum.add(word, s.words - at.thread, at.threads, a.log);
  copy_commit();
  copy_wait<0>();
  const auto stashed = [&](int k) {
    SoftmaxWord<T, CUT, BACKWARD> kept;
    kept.x = stash[TENSORS * k * apart];
    if constexpr (BACKWARD) kept.y = stash[(TENSORS * k + 1) * apart];
    return kept;
  };
  for (int k = 0; k < a.stashed && (WORDS + k) * at.threads + at.thread < s.words; ++k) {
    const SoftmaxWord<T, CUT, BACKWARD> one[1] = {stashed(k)};
    sum.add(one, 1, 0, a.log);
  }
  if constexpr (CUT == Cut::shifted) sum.add(edge, a.log);
  const SoftmaxRow row = sum.over_row(a.cluster, a.log);

  FASTLM_UNROLL
  for (int k = 0; k < WORDS; ++k) {
    at.finish(word[k], k * at.threads + at.thread, row, a.log);
  }
  for (int k = 0; k < a.stashed; ++k) {
    const int i = (WORDS + k) * at.threads + at.thread;
    if (i < s.words) at.finish(stashed(k), i, row, a.log);
  }
  if constexpr (CUT == Cut::shifted) edge.finish(at.out, column, s.n, row, a.log);
}

template <class T, Cut CUT, bool BACKWARD>
__device__ __forceinline__ void softmax_twice(const SoftmaxArguments& a) {
  constexpr int BATCH = SOFTMAX_BATCH<BACKWARD>;
  if (a.cluster > 1) cluster_begin();
  const SoftmaxPlace<T, CUT> at(a);
  const auto& s = at.span;
  const int64_t column = s.edge(at.thread), threads = at.threads;
  SoftmaxEdge<T, BACKWARD> edge;
  if constexpr (CUT == Cut::shifted) edge.load(at.x, at.y, column, s.n);
  SoftmaxWord<T, CUT, BACKWARD> word[BATCH];
  const auto load = [&](int64_t first) {
    FASTLM_UNROLL
    for (int k = 0; k < BATCH; ++k) at.load(word[k], first + k * threads);
  };

  SoftmaxSum<T, BACKWARD> sum;
  for (int64_t first = at.thread; first < s.words; first += BATCH * threads) {
    load(first);
    sum.add(word, s.words - first, at.threads, a.log);
  }
  if constexpr (CUT == Cut::shifted) sum.add(edge, a.log);
  const SoftmaxRow row = sum.over_row(a.cluster, a.log);
  for (int64_t first = at.thread; first < s.words; first += BATCH * threads) {
    load(first);
    FASTLM_UNROLL
    for (int k = 0; k < BATCH; ++k) at.finish(word[k], first + k * threads, row, a.log);
  }
  if constexpr (CUT == Cut::shifted) edge.finish(at.out, column, s.n, row, a.log);
}

#define FASTLM_SOFTMAX(name, BACKWARD)                                                              \
  FASTLM_KERNEL(name, 0, 128, 10, SoftmaxArguments,                                                 \
                softmax_warp<Scalar, Cut::words, BACKWARD, 1, SOFTMAX_ROWS<BACKWARD>>)              \
  FASTLM_KERNEL(name, 1, 128, 10, SoftmaxArguments,                                                 \
                softmax_warp<Scalar, Cut::elements, BACKWARD, 1, SOFTMAX_ROWS<BACKWARD>>)           \
  FASTLM_KERNEL(name, 2, 128, 8, SoftmaxArguments,                                                  \
                softmax_warp<Scalar, Cut::shifted, BACKWARD, SOFTMAX_WORDS<BACKWARD>, 1>)           \
  FASTLM_KERNEL(name, 3, 128, 8, SoftmaxArguments,                                                  \
                softmax_warp<Scalar, Cut::elements, BACKWARD, SOFTMAX_WORDS<BACKWARD>, 1>)          \
  FASTLM_KERNEL(name, 4, 1024, 1, SoftmaxArguments, softmax_block<Scalar, Cut::shifted, BACKWARD>)  \
  FASTLM_KERNEL(name, 5, 1024, 1, SoftmaxArguments, softmax_block<Scalar, Cut::elements, BACKWARD>) \
  FASTLM_KERNEL(name, 6, 1024, 1, SoftmaxArguments, softmax_twice<Scalar, Cut::shifted, BACKWARD>)  \
  FASTLM_KERNEL(name, 7, 1024, 1, SoftmaxArguments, softmax_twice<Scalar, Cut::elements, BACKWARD>)

FASTLM_SOFTMAX(softmax_forward, false)
FASTLM_SOFTMAX(softmax_backward, true)

}  // namespace fastlm::cuda

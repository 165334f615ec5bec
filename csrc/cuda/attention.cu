// attention: what stands around its kernels, for any head dim. attention_ampere_*.cu and attention_hopper_*.cu do the
// work.
//
// - prepare: delta = rowsum(dout * out) - dlse and lse in the units of the kernels; zeroes what dq is summed in. Floor:
//   4 Dv bytes read and 4 W written a query.
// - finish: dq = scale * sum, rounded. Floor: 4 W bytes read and 2 D written a query.
// - clear: rows behind the last packed sequence, mostly none.
// - document_ranges: which tiles of the other side a tile shares documents with. Every tile reads all ids of the other
//   side, 8 bytes each, from the L2 cache but for the first: 16 MB at 16 Ki tokens.
//
// With D = 128 and 4096 tokens the floors of prepare and finish are 1.5 us a head on an H200, 4 % of the products of a
// backward at 500 TFLOP/s, and half as much of those of twice the tokens. A row is a group of lanes, 16 bytes each, and
// a warp's rows follow each other; what is one number a row goes through shared memory, so that it is written 128 bytes
// at a time.
//
// Registers (ptxas of CUDA 13.0, sm_80 and sm_90a): finish up to 116, prepare up to 122, for what is on its way at
// once; no spills. Lost: repairing a row of dq within the loop that stores it, which spilled 64 bytes.
//
// Never run on a GPU.
#include "cuda/attention.cuh"
#if FASTLM_DTYPE != 0
#include "cuda/attention_repair.cuh"
#endif

namespace fastlm::cuda {

#if FASTLM_DTYPE != 0

/// How a warp's lanes lie on rows of up to 8 LANES numbers.
template <int LANES>
struct RowLanes {
  static constexpr int STEP = SMALL_THREADS / LANES, STEPS = SMALL_ROWS / STEP;  // rows at once, times
  static __device__ __forceinline__ int row(int step) { return step * STEP + static_cast<int>(threadIdx.x) / LANES; }
  static __device__ __forceinline__ int column() { return 8 * (static_cast<int>(threadIdx.x) % LANES); }
};

template <class T, int LANES>
__device__ __forceinline__ void attention_prepare(const AttentionPrepare& p) {
  using Lanes = RowLanes<LANES>;
  const AttentionArguments& a = p.call;
  const int thread = static_cast<int>(threadIdx.x), tiles = (a.total_q + SMALL_ROWS - 1) / SMALL_ROWS;
  const int64_t all = static_cast<int64_t>(gridDim.x) * SMALL_THREADS,
                number = blockIdx.x * int64_t{SMALL_THREADS} + thread;
  for (int64_t i = number; i < p.sums / 4; i += all) store_words_global(a.dq_sum + 4 * i, {0, 0, 0, 0});
  for (int64_t i = number; i < p.turns; i += all) a.turns[i] = 0;
  if (tiles == 0) return;

  const int pair = static_cast<int>(blockIdx.x / static_cast<unsigned>(tiles));
  const int first = static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles)) * SMALL_ROWS;
  const int batch = pair / a.heads, head = pair % a.heads;
  Words grad[Lanes::STEPS], out[Lanes::STEPS];
  FASTLM_UNROLL
  for (int s = 0; s < Lanes::STEPS; ++s) {
    const int64_t row = first + Lanes::row(s);
    grad[s] = out[s] = {0, 0, 0, 0};
    if (row >= a.total_q || Lanes::column() >= a.width_v) continue;
    grad[s] = load_words_once(rows_of(static_cast<const T*>(a.dout), a.dout_at, batch, head, row) + Lanes::column());
    out[s] = load_words_once(rows_of(static_cast<const T*>(a.out), a.out_at, batch, head, row) + Lanes::column());
  }
  float* const sums = shared<float>();
  FASTLM_UNROLL
  for (int s = 0; s < Lanes::STEPS; ++s) {
    float x[8], y[8], sum = 0;
    unpack<T>(grad[s], x);
    unpack<T>(out[s], y);
    FASTLM_UNROLL
    for (int c = 0; c < 8; ++c) sum += x[c] * y[c];
    sum = warp_reduce<LANES>(sum, Sum{});
    if (Lanes::column() == 0) sums[Lanes::row(s)] = sum;
  }
  __syncthreads();
  float part = 0;
  if (thread < SMALL_ROWS && first + thread < a.total_q) {
    const int64_t at = static_cast<int64_t>(pair) * a.total_q + first + thread;
    const float lse = a.lse[at];
    const bool blind = lse == -INF;
    const float shift = blind ? INF : lse * LOG2_E;
    const float delta = blind ? 0.f : sums[thread] - (a.dlse ? a.dlse[at] : 0.f);
    a.shift[at] = shift;
    a.delta[at] = delta;
    if (a.sinks) part = -exp2_fast(a.sinks[head] * LOG2_E - shift) * delta;
  }
  if (a.sinks) {
    part = group_reduce<SMALL_THREADS>(part, Sum{}, sums + SMALL_ROWS);
    if (thread == 0) a.dsinks[blockIdx.x] = part;
  }
}

/// 8 numbers of a row of dq_sum, from column `column` on.
template <bool HOPPER>
__device__ __forceinline__ void read_sum(float (&x)[8], const AttentionFinish& p, const float* tile, int row,
                                         int column) {
  if constexpr (HOPPER) {
    FASTLM_UNROLL
    for (int c = 0; c < 8; ++c) x[c] = tile[hopper_dq_place(p.width, row, column + c)];
  } else {
    const float* from = tile + ampere_dq_place(p.width, row, column);
    const Words low = load_words_once(from), high = load_words_once(from + 4);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    FASTLM_UNROLL
    for (int c = 0; c < 8; ++c) x[c] = __uint_as_float(words[c]);
  }
}

template <class T, bool HOPPER, int LANES>
__device__ __forceinline__ void attention_finish(const AttentionFinish& p) {
  using Lanes = RowLanes<LANES>;
  const AttentionArguments& a = p.call;
  const int pair = static_cast<int>(blockIdx.x / static_cast<unsigned>(p.tiles));
  const int first = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.tiles)) * SMALL_ROWS;
  const int batch = pair / a.heads, head = pair % a.heads, column = Lanes::column();
  const Extent e = extent(a, batch);
  float x[Lanes::STEPS][8];
  FASTLM_UNROLL
  for (int s = 0; s < Lanes::STEPS; ++s) {
    const int i = first + Lanes::row(s);
    if (i >= e.len_q || column >= a.d) continue;
    const int64_t tile = sum_tile(a, e, batch, head, i / p.m, p.m);
    read_sum<HOPPER>(x[s], p, a.dq_sum + tile * p.m * p.width, i % p.m, column);
  }
  bool nan = false;
  FASTLM_UNROLL
  for (int s = 0; s < Lanes::STEPS; ++s) {
    const int i = first + Lanes::row(s);
    if (i >= e.len_q || column >= a.d) continue;
    FASTLM_UNROLL
    for (int c = 0; c < 8; ++c) {
      x[s][c] *= a.scale;
      nan |= x[s][c] != x[s][c];
    }
    T* const to = rows_of(static_cast<T*>(a.dq), a.dq_at, e.batch, head, e.start_q + static_cast<int64_t>(i));
    store_words_global(to + column, pack<T>(x[s]));
  }
  const bool hides = a.before || a.after || a.documents_q || a.mask_kind != MaskKind::none;
  if (!hides || __ballot_sync(FULL, nan) == 0) return;
  __syncwarp();                                                  // a lane looks at what others wrote
  for (int n = 0; n < SMALL_ROWS / (SMALL_THREADS / 32); ++n) {  // the rows of this warp
    const int in_step = 32 / LANES, warp = static_cast<int>(threadIdx.x) / 32;
    const int i = first + n / in_step * Lanes::STEP + warp * in_step + n % in_step;
    if (i < e.len_q) repair_dq<T>(a, e, head, i);
  }
}

template <class T>
__device__ __forceinline__ void attention_clear(const AttentionClear& a) {
  const int tiles = (a.length + SMALL_ROWS - 1) / SMALL_ROWS, used = a.cu[a.sequences];
  const int head = static_cast<int>(blockIdx.x / static_cast<unsigned>(tiles));
  const int first = static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles)) * SMALL_ROWS;
  if (first + SMALL_ROWS <= used) return;
  const int words = a.width / 8, thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < SMALL_ROWS * words; i += SMALL_THREADS) {
    const int row = first + i / words;
    if (row < used || row >= a.length) continue;
    store_words(rows_of(static_cast<T*>(a.x), a.at, 0, head, row) + i % words * 8, {0, 0, 0, 0});
  }
  const int row = first + thread;
  if (a.lse && thread < SMALL_ROWS && row >= used && row < a.length)
    a.lse[static_cast<int64_t>(head) * a.length + row] = -INF;
}

#define FASTLM_FOR_LANES(variant, LANES)                                                                    \
  FASTLM_KERNEL(attention_prepare, variant, 256, 2, AttentionPrepare, attention_prepare<Scalar, LANES>)     \
  FASTLM_KERNEL(attention_finish, variant, 256, 2, AttentionFinish, attention_finish<Scalar, false, LANES>) \
  FASTLM_KERNEL(attention_finish_hopper, variant, 256, 2, AttentionFinish, attention_finish<Scalar, true, LANES>)

FASTLM_FOR_LANES(0, 4)
FASTLM_FOR_LANES(1, 8)
FASTLM_FOR_LANES(2, 16)
FASTLM_FOR_LANES(3, 32)
FASTLM_KERNEL(attention_clear, 0, 256, 4, AttentionClear, attention_clear<Scalar>)

#else

struct Least {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};
struct Most {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};

/// For a tile of `size` ids: the first and the last of the other side's tiles of `step` ids with which it may share
/// one, and the first run of tiles that hold its one id and nothing else. Sorted ids make these the tiles that are
/// seen.
__device__ __forceinline__ void document_ranges(const DocumentRanges& a) {
  constexpr int MANY = 32;  // tiles that the block looks at together: one for each lane that compares
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const unsigned tiles = static_cast<unsigned>(a.tiles);
  const int64_t batch = blockIdx.x / tiles;
  const int64_t* const ids = a.ids + batch * a.length;
  const int64_t* const others = a.others + batch * a.other_length;
  const auto range = [&](const int64_t* from, int first, int last, int at, int apart, int64_t& least, int64_t& most) {
    least = most = from[first];
    for (int i = first + at; i < last; i += apart) {
      least = Least{}(least, from[i]);
      most = Most{}(most, from[i]);
    }
  };
  int64_t* const room = shared<int64_t>();
  const int first = static_cast<int>(blockIdx.x % tiles) * a.size;
  int64_t lowest, highest;
  range(ids, first, min_of(first + a.size, a.length), thread, RANGES_THREADS, lowest, highest);
  lowest = group_reduce<RANGES_THREADS>(lowest, Least{}, room);
  highest = group_reduce<RANGES_THREADS>(highest, Most{}, room);

  const int count = (a.other_length + a.step - 1) / a.step;
  int64_t low = count, middle = count, end = count, high = 0;
  for (int start = 0; start < count; start += MANY) {
    for (int t = warp; t < MANY && start + t < count; t += RANGES_THREADS / 32) {
      const int from = (start + t) * a.step;
      int64_t least, most;
      range(others, from, min_of(from + a.step, a.other_length), lane, 32, least, most);
      least = warp_reduce(least, Least{});
      most = warp_reduce(most, Most{});
      if (lane == 0) {
        room[t] = least;
        room[MANY + t] = most;
      }
    }
    __syncthreads();
    const int64_t tile = start + lane;  // every warp compares: all threads know the result
    const bool there = tile < count;
    const int64_t least = there ? room[lane] : 0, most = there ? room[MANY + lane] : 0;
    const bool shares = there && least <= highest && most >= lowest;
    const bool whole = shares && least == most && lowest == highest;
    low = Least{}(low, warp_reduce(shares ? tile : int64_t{count}, Least{}));
    high = Most{}(high, warp_reduce(shares ? tile + 1 : int64_t{0}, Most{}));
    middle = Least{}(middle, warp_reduce(whole ? tile : int64_t{count}, Least{}));
    end = Least{}(end, warp_reduce(tile > middle && !whole ? tile : int64_t{count}, Least{}));
    __syncthreads();
  }
  if (thread < 4) {
    a.ranges[4 * static_cast<int64_t>(blockIdx.x) + thread] =
        static_cast<int>(thread == 0 ? low
                                     : Least{}(thread == 1   ? middle
                                               : thread == 2 ? end
                                                             : high,
                                               high));
  }
}

FASTLM_KERNEL(document_ranges, 0, 256, 4, DocumentRanges, document_ranges)

#endif

}  // namespace fastlm::cuda

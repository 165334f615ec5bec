// embedding: a gather, and a sum over sorted ids that gives the same bits every time.
//
// Forward: a thread copies GATHER_UNITS units of 16 bytes, which threads count through over the rows of their block, so
// that no lane idles whatever the width: it loads its ids, then all its units, then stores. Reads ids and the rows that
// they name, writes y. An id out of range gives a row of NaN.
//
// Backward: the ids come sorted (torch.sort, stable), so that the places of one id are a run of sorted positions.
//   starts  where each run begins: a binary search for every row of the table
//   pieces  sums, in float32, of every EMBEDDING_PIECE positions that lie within one run
//   sum     writes each row of dweight, zeros where no id names it. A run of up to EMBEDDING_SHORT positions is added
//   by
//           the lanes of its row alone, a longer one by all rows' lanes of the block, which then join their sums as a
//           tree: the positions before the first whole piece, those behind the last, the pieces' sums
// A run of any length is thus added by as many blocks as it has pieces, and the one that writes its row reads fewer
// than 2 EMBEDDING_PIECE rows of dy and a row for each piece. The order depends on the ids alone. Reads dy once and
// writes dweight once; sorting, starts (8 bytes for each row of the table) and the pieces' sums (4 bytes for
// EMBEDDING_PIECE elements of dy) come on top. No atomics.
//
// Floor: of the forward 2 N sizeof(T) M bytes; of the backward dweight, which is larger than dy for most tables. Its
// zeros wait for the rows' starts and nothing else: the 768 threads of a multiprocessor (1024 would spill) write 48 KB,
// of float32 96 KB, behind each wait of 1 to 1.5 us, in which 4.8 TB/s are 36 to 55 KB.
//
// Never run on a GPU.
#include "cuda/embedding.h"

#include "cuda/row.cuh"

namespace fastlm::cuda {

template <class T, bool WIDE>
struct Unit {
  using Type = Words;
  static constexpr int SIZE = WIDTH<T>;
  __device__ __forceinline__ static Words load(const T* p) { return load_words(p); }
  __device__ __forceinline__ static void store(T* p, Words unit) { store_words_global(p, unit); }
  __device__ __forceinline__ static Words of(float value) {
    float all[SIZE];
    FASTLM_UNROLL
    for (int j = 0; j < SIZE; ++j) all[j] = value;
    return pack<T>(all);
  }
};
template <class T>
struct Unit<T, false> {
  using Type = T;
  static constexpr int SIZE = 1;
  __device__ __forceinline__ static T load(const T* p) { return *p; }
  __device__ __forceinline__ static void store(T* p, T unit) { *p = unit; }
  __device__ __forceinline__ static T of(float value) { return round_to<T>(value); }
};

__device__ __forceinline__ int64_t id_at(const void* ids, int64_t place, int wide) {
  return wide ? static_cast<const int64_t*>(ids)[place] : static_cast<const int32_t*>(ids)[place];
}

template <class T, bool WIDE>
__device__ __forceinline__ void embedding_gather(const EmbeddingForward& a) {
  using U = Unit<T, WIDE>;
  const uint32_t block = divide(blockIdx.x, a.across), tile = a.per_tile.divisor;
  const int64_t first_row = static_cast<int64_t>(block) * a.rows;
  const int64_t first_unit = static_cast<int64_t>(blockIdx.x - block * a.across.divisor) * tile;
  bool there[GATHER_UNITS];
  int64_t row[GATHER_UNITS], column[GATHER_UNITS], id[GATHER_UNITS];
  FASTLM_UNROLL
  for (int k = 0; k < GATHER_UNITS; ++k) {
    const uint32_t slot = k * blockDim.x + threadIdx.x, r = divide(slot, a.per_tile);
    const int64_t unit = first_unit + (slot - r * tile);
    row[k] = first_row + r;
    column[k] = unit * U::SIZE;
    there[k] = static_cast<int>(r) < a.rows && row[k] < a.m && unit < a.units;
    id[k] = there[k] ? id_at(a.ids, row[k], a.wide_ids) : 0;
  }
  typename U::Type value[GATHER_UNITS];
  FASTLM_UNROLL
  for (int k = 0; k < GATHER_UNITS; ++k) {
    value[k] = U::of(__int_as_float(0x7fc00000));  // NaN
    if (there[k] && static_cast<uint64_t>(id[k]) < static_cast<uint64_t>(a.v))
      value[k] = U::load(static_cast<const T*>(a.weight) + id[k] * a.weight_row + column[k]);
  }
  FASTLM_UNROLL
  for (int k = 0; k < GATHER_UNITS; ++k)
    if (there[k]) U::store(static_cast<T*>(a.y) + row[k] * a.n + column[k], value[k]);
}

/// starts[v] for v = 0 .. V: how many keys are below v.
__device__ __forceinline__ void embedding_search(const EmbeddingStarts& a) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * STARTS_THREADS + threadIdx.x;
  if (v > a.v) return;
  int64_t below = 0, size = a.m;  // the answer is in [below, below + size]
  while (size > 0) {
    const int64_t half = size / 2;
    if (id_at(a.keys, below + half, a.wide_keys) < v) {
      below += half + 1;
      size -= half + 1;
    } else {
      size = half;
    }
  }
  a.starts[v] = below;
}

/// What a lane adds up: WORDS words of a row.
template <class T, Cut CUT>
struct EmbeddingSum {
  static constexpr int WORDS = SUM_WORDS<T>, COUNT = WORDS * WIDTH<T>;
  float sum[WORDS][WIDTH<T>] = {};
  int first, end, lane, lanes;  // of the block's words; this thread's are `lanes` apart

  __device__ __forceinline__ EmbeddingSum(const EmbeddingBackward& a, uint32_t tile)
      : first(static_cast<int>(tile) * a.tile), lane(threadIdx.x & ((1 << a.lane_bits) - 1)), lanes(1 << a.lane_bits) {
    end = first + a.tile < a.words ? first + a.tile : a.words;
  }
  __device__ __forceinline__ int word(int k) const { return first + k * lanes + lane; }
  __device__ __forceinline__ int64_t column(int k) const { return static_cast<int64_t>(word(k)) * WIDTH<T>; }

  __device__ __forceinline__ void clear() {
    FASTLM_UNROLL
    for (int i = 0; i < COUNT; ++i) sum[i / WIDTH<T>][i % WIDTH<T>] = 0;
  }

  /// The rows of dy at every step-th sorted position from `from` to `to`.
  __device__ __forceinline__ void add(const EmbeddingBackward& a, int64_t from, int64_t to, int step) {
    if (from >= to) return;
    int64_t place = a.order[from];
    for (int64_t at = from; at < to; at += step) {
      const T* row = static_cast<const T*>(a.dy) + place * a.dy_row;
      if (at + step < to) place = a.order[at + step];  // on its way while this row is
      Words words[WORDS];
      FASTLM_UNROLL
      for (int k = 0; k < WORDS; ++k)
        if (word(k) < end) words[k] = load_word<T, CUT>(row + column(k), a.n - column(k), round_to<T>(0));
      FASTLM_UNROLL
      for (int k = 0; k < WORDS; ++k) {
        float value[WIDTH<T>];
        if (word(k) >= end) continue;
        unpack<T>(words[k], value);
        FASTLM_UNROLL
        for (int j = 0; j < WIDTH<T>; ++j) sum[k][j] += value[j];
      }
    }
  }

  /// Where the partial sums of a piece lie.
  __device__ __forceinline__ float* partial(const EmbeddingBackward& a, int64_t piece, int k) const {
    return a.partial + piece * a.words * WIDTH<T> + column(k);
  }
  __device__ __forceinline__ void add_pieces(const EmbeddingBackward& a, int64_t from, int64_t to, int step) {
    for (int64_t piece = from; piece < to; piece += step) {
      FASTLM_UNROLL
      for (int k = 0; k < WORDS; ++k) {
        if (word(k) >= end) continue;
        FASTLM_UNROLL
        for (int j = 0; j < WIDTH<T>; j += 4) {
          float value[4];
          unpack<float>(load_words(partial(a, piece, k) + j), value);
          FASTLM_UNROLL
          for (int i = 0; i < 4; ++i) sum[k][j + i] += value[i];
        }
      }
    }
  }
  __device__ __forceinline__ void store_partial(const EmbeddingBackward& a, int64_t piece) const {
    FASTLM_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      if (word(k) >= end) continue;
      FASTLM_UNROLL
      for (int j = 0; j < WIDTH<T>; j += 4) {
        const float value[4] = {sum[k][j], sum[k][j + 1], sum[k][j + 2], sum[k][j + 3]};
        store_words_global(partial(a, piece, k) + j, pack<float>(value));
      }
    }
  }
  __device__ __forceinline__ void store(const EmbeddingBackward& a, int64_t row) const {
    T* out = static_cast<T*>(a.dweight) + row * a.n;
    FASTLM_UNROLL
    for (int k = 0; k < WORDS; ++k)
      if (word(k) < end) store_word<T, CUT>(out + column(k), a.n - column(k), sum[k]);
  }

  /// The sums of all rows' lanes of the block, for its first row's. room: COUNT * SUM_THREADS / 2 floats.
  __device__ __forceinline__ void join(float* room) {
    const int apart = SUM_THREADS / 2;  // between the places of a thread's own sums: no two lanes in one bank
    for (int threads = SUM_THREADS / 2; threads >= lanes; threads /= 2) {
      const int thread = static_cast<int>(threadIdx.x);
      if (thread >= threads && thread < 2 * threads) {
        FASTLM_UNROLL
        for (int i = 0; i < COUNT; ++i) room[i * apart + thread - threads] = sum[i / WIDTH<T>][i % WIDTH<T>];
      }
      __syncthreads();
      if (thread < threads) {
        FASTLM_UNROLL
        for (int i = 0; i < COUNT; ++i) sum[i / WIDTH<T>][i % WIDTH<T>] += room[i * apart + thread];
      }
      __syncthreads();
    }
  }
};

template <class T, Cut CUT>
__device__ __forceinline__ void embedding_pieces(const EmbeddingBackward& a) {
  const uint32_t piece = divide(blockIdx.x, a.across);
  const int64_t from = static_cast<int64_t>(piece) * EMBEDDING_PIECE, to = from + EMBEDDING_PIECE;
  const int64_t id = id_at(a.keys, from, a.wide_keys);
  if (id != id_at(a.keys, to - 1, a.wide_keys) || id < 0 || id >= a.v || id == a.padding) return;
  EmbeddingSum<T, CUT> sum(a, blockIdx.x - piece * a.across.divisor);
  const int abreast = SUM_THREADS >> a.lane_bits, mine = static_cast<int>(threadIdx.x >> a.lane_bits);
  sum.add(a, from + mine, to, abreast);
  sum.join(shared<float>());
  if (mine == 0) sum.store_partial(a, piece);
}

template <class T, Cut CUT>
__device__ __forceinline__ void embedding_sum(const EmbeddingBackward& a) {
  const uint32_t group = divide(blockIdx.x, a.across);
  EmbeddingSum<T, CUT> sum(a, blockIdx.x - group * a.across.divisor);
  const int abreast = SUM_THREADS >> a.lane_bits, mine = static_cast<int>(threadIdx.x >> a.lane_bits);
  const int64_t first = static_cast<int64_t>(group) * SUM_ROWS * abreast;
  int64_t* const runs = shared<int64_t>(sum.COUNT * SUM_THREADS / 2 * sizeof(float));  // begin and end for each row
  bool longer = false;
  for (int r = static_cast<int>(threadIdx.x); r < SUM_ROWS * abreast; r += SUM_THREADS) {
    const int64_t row = first + r;
    const bool empty = row >= a.v || row == a.padding;
    runs[2 * r] = empty ? 0 : a.starts[row];
    runs[2 * r + 1] = empty ? 0 : a.starts[row + 1];
    longer |= runs[2 * r + 1] - runs[2 * r] > EMBEDDING_SHORT;
  }
  longer = __syncthreads_or(longer);
  for (int r = mine; r < SUM_ROWS * abreast && first + r < a.v; r += abreast) {
    const int64_t from = runs[2 * r], to = runs[2 * r + 1];
    if (to - from > EMBEDDING_SHORT) continue;
    sum.clear();
    sum.add(a, from, to, 1);
    sum.store(a, first + r);
  }
  if (!longer) return;
  for (int r = 0; r < SUM_ROWS * abreast; ++r) {
    const int64_t from = runs[2 * r], to = runs[2 * r + 1];
    if (to - from <= EMBEDDING_SHORT) continue;
    const int64_t head = (from + EMBEDDING_PIECE - 1) / EMBEDDING_PIECE, tail = to / EMBEDDING_PIECE;  // whole pieces
    const bool pieces = head < tail;
    sum.clear();
    for (int part = 0; part <= pieces; ++part)  // before the pieces, and behind them
      sum.add(a, (part ? tail * EMBEDDING_PIECE : from) + mine, part == pieces ? to : head * EMBEDDING_PIECE, abreast);
    if (pieces) sum.add_pieces(a, head + mine, tail, abreast);
    sum.join(shared<float>());
    if (mine == 0) sum.store(a, first + r);
  }
}

FASTLM_KERNEL(embedding_forward, 0, 256, 4, EmbeddingForward, embedding_gather<Scalar, false>)
FASTLM_KERNEL(embedding_forward, 1, 256, 4, EmbeddingForward, embedding_gather<Scalar, true>)
FASTLM_KERNEL(embedding_starts, 0, 256, 6, EmbeddingStarts, embedding_search)
FASTLM_KERNEL(embedding_pieces, 0, 256, 3, EmbeddingBackward, embedding_pieces<Scalar, Cut::elements>)
FASTLM_KERNEL(embedding_pieces, 1, 256, 4, EmbeddingBackward, embedding_pieces<Scalar, Cut::words>)
FASTLM_KERNEL(embedding_sum, 0, 256, 2, EmbeddingBackward, embedding_sum<Scalar, Cut::elements>)
FASTLM_KERNEL(embedding_sum, 1, 256, 3, EmbeddingBackward, embedding_sum<Scalar, Cut::words>)

}  // namespace fastlm::cuda

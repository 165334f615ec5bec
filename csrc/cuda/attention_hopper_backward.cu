// attention, backward, sm_90a: dk and dv of a tile of keys, and what dq is the sum of.
//
// A block holds 128 keys of a key head and walks over the queries that see them, of all heads that share it. Two warp
// groups compute, 64 keys each; of a third a warp loads (q and dout by the copy engine through rings of two, shift and
// delta by hand: they are not aligned) and a warp adds tiles of dq, which the groups leave in shared memory as their
// registers hold them, to dq_sum, in turn with the blocks that hold other keys. All is transposed, keys by rows:
// weights and their gradients are left operands then as they come out of registers.
//
//   s = k q^T | dp = v dout^T | p = exp2(s - shift), under dp | ds = p (dp - delta), to shared memory
//   dv += p dout | barrier of both groups | dq = ds k | dk += ds q | dq to shared memory, under dk
//
// With 256 columns dk and dv of 64 keys would take all 256 registers of a thread. There a block holds 64 keys and
// SPLITs the columns: a group computes the weights of half of the queries, leaves p as well as ds in shared memory, and
// sums 128 columns of dk and dv for all of them. No room is left for dq: groups add it from registers, four numbers at
// once, under dk, and the warp that would have added takes the turns.
//
// Floor: 10 S T D flops of a head, half of that if causal: five products, one of which the forward had. For each M
// queries 2 (D + Dv) M bytes are read from the L2 cache and 4 D M added there: at D = 128 a step's products take 1.4 us
// at the 7.5 TFLOP/s of a multiprocessor of an H100 (989 over 132) and move 64 KiB, 6 TB/s over all. At D = 256 a step
// takes as long and moves 128 KiB: the cache is the bound there, at half as many keys a block as at 128. Shared memory
// is read for 2688 cycles of a step then, beside 2560 of products: those of 64 x 32 want more of it than they compute.
//
// Tiles, registers and spills by ptxas -v of CUDA 13.0, groups of 232 registers beside 40 for the third:
//   64   128 queries: no spills. With ds as dk's left operand from registers as with 128: products serialized (C7512),
//        so it is read from shared memory, where dq wants it anyway.
//   128  64 queries: no spills, 32 of 32 exp2 under an open product (sass_overlap; 64 of 64 above).
//   256  64 queries by 64 keys: no spills, 16 of 16.
//   24 registers for the third group instead of 40: spills 12 bytes. Zeroed sums that may stay so where no query sees
//   the keys (a branch around the walk): 256 bytes and C7512, so that case walks too, zero steps.
//
// Checked against float64 in the emulation. Never run on a GPU.
#include "cuda/attention.cuh"
#include "cuda/attention_hopper.h"
#include "cuda/hopper.cuh"

namespace fastlm::cuda {
namespace {

constexpr int W = FASTLM_HEAD_DIM;
constexpr AttentionTile TILE = hopper_backward_tiles(W).rows[0];
constexpr int M = TILE.m, N = TILE.n, PANELS = W / PANEL;
constexpr HopperBackwardRoom ROOM = hopper_backward_room(W, M, N);
static_assert(TILE.shared <= HOPPER_SHARED, "of a block");
constexpr bool SPLIT = hopper_backward_splits(W);  // a group has half of the columns, not of the keys
constexpr int QUERIES = SPLIT ? M / 2 : M;         // of a tile, whose weights for 64 keys a group computes
constexpr int COLUMNS = SPLIT ? W / 2 : W;         // of dk and dv that a group sums
constexpr int COLUMNS_DQ = W == 64 ? W : W / 2;    // of 64 rows of dq that a group computes
constexpr int PART = 64 * COLUMNS_DQ;              // of a tile of dq: a group's

// Barriers by number.
constexpr int CONSUMERS = 1;      // both groups of consumers
constexpr int FULL_DQ = 2;        // + group: its part of dq is written
constexpr int EMPTY_DQ = 4;       // + group: and read
constexpr int GROUP = 6;          // + group: its own
constexpr int ADDERS = 128 + 32;  // threads of a group and of the warp that adds
// Where groups add to dq themselves: both and the warp that takes turns.
constexpr int OURS = FULL_DQ, ADDED = EMPTY_DQ, TURNERS = 256 + 32;

/// Of two neighbouring queries.
struct alignas(8) Pair {
  float x, y;
};

/// What all warps know.
struct Work {
  const AttentionArguments& a;
  Extent e;
  Range r;             // queries
  int tile, first;     // keys
  int batch, kv_head;  // a sequence's number where there are some
  int heads;           // that share the keys
  int steps;           // tiles of queries of all heads
  uint32_t base;
  char* shared;  // the same

  __device__ __forceinline__ int head(int member) const { return kv_head * heads + member; }

  // Step i of the walk has slot i % 2 of what there is twice.
  __device__ __forceinline__ uint32_t slot(int at, int bytes, int i) const { return base + at + (i & 1) * bytes; }
  __device__ __forceinline__ uint32_t q(int i) const { return slot(ROOM.q, ROOM.queries, i); }
  __device__ __forceinline__ uint32_t dout(int i) const { return slot(ROOM.dout, ROOM.queries, i); }
  __device__ __forceinline__ uint32_t ds(int i) const { return slot(ROOM.ds, 2 * M * N, i); }
  __device__ __forceinline__ uint32_t p(int i) const { return slot(ROOM.p, 2 * M * N, i); }
  /// M numbers shift and then M numbers delta.
  __device__ __forceinline__ float* rows(int i) const {
    return reinterpret_cast<float*>(shared + ROOM.rows) + (i & 1) * 2 * M;
  }

  // Barriers: the copy engine has brought it; all warps of both groups have read it.
  __device__ __forceinline__ uint32_t full_keys() const { return base + ROOM.barriers; }
  __device__ __forceinline__ uint32_t full_q(int i) const { return slot(ROOM.barriers + 8, 8, i); }
  __device__ __forceinline__ uint32_t full_dout(int i) const { return slot(ROOM.barriers + 24, 8, i); }
  __device__ __forceinline__ uint32_t empty_q(int i) const { return slot(ROOM.barriers + 40, 8, i); }
  __device__ __forceinline__ uint32_t empty_dout(int i) const { return slot(ROOM.barriers + 56, 8, i); }
  static __device__ __forceinline__ int parity(int i) { return i >> 1 & 1; }
};

// --- the warp that loads ---------------------------------------------------------------------------------------------

/// ROWS rows from `row` on of a head, panel after panel.
template <int ROWS>
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap* tensor, uint32_t barrier, int row, int head,
                                          int batch) {
  FASTLM_UNROLL
  for (int panel = 0; panel < PANELS; ++panel)
    tile_load(to + panel * ROWS * 128, tensor, barrier, PANEL * panel, 0, row, head, batch);
}

__device__ __forceinline__ void load(const HopperBackwardArguments& x, const Work& w) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) {
    barrier_expect(w.full_keys(), 2 * ROOM.keys);
    load_tile<N>(w.base + ROOM.k, &x.k, w.full_keys(), w.e.start_k + w.first, w.kv_head, w.e.batch);
    load_tile<N>(w.base + ROOM.v, &x.v, w.full_keys(), w.e.start_k + w.first, w.kv_head, w.e.batch);
  }
  int i = 0;
  for (int member = 0; member < w.heads; ++member) {
    const int head = w.head(member);
    const int64_t at = row_of(w.a, w.e, head);
    for (int m = w.r.low; m < w.r.high; m += M, ++i) {
      float shift[M / 32], delta[M / 32];
      FASTLM_UNROLL
      for (int n = 0; n < M / 32; ++n) {
        const int row = m + 32 * n + lane;
        shift[n] = row < w.e.len_q ? w.a.shift[at + row] : INF;
        delta[n] = row < w.e.len_q ? w.a.delta[at + row] : 0;
      }
      barrier_wait(w.empty_dout(i), w.parity(i) ^ 1);
      if (lane == 0) {
        barrier_expect(w.full_dout(i), ROOM.queries);
        load_tile<M>(w.dout(i), &x.dout, w.full_dout(i), w.e.start_q + m, head, w.e.batch);
      }
      barrier_wait(w.empty_q(i), w.parity(i) ^ 1);
      FASTLM_UNROLL
      for (int n = 0; n < M / 32; ++n) {
        w.rows(i)[32 * n + lane] = shift[n];
        w.rows(i)[M + 32 * n + lane] = delta[n];
      }
      __syncwarp();
      if (lane == 0) {
        barrier_expect(w.full_q(i), ROOM.queries);
        load_tile<M>(w.q(i), &x.q, w.full_q(i), w.e.start_q + m, head, w.e.batch);
      }
    }
  }
}

// --- the warp that adds to dq ----------------------------------------------------------------------------------------

__device__ __forceinline__ void add(const Work& w) {
  const bool first_lane = threadIdx.x % 32 == 0;
  const auto take = [&] {
    named_arrive(EMPTY_DQ, ADDERS);
    named_arrive(EMPTY_DQ + 1, ADDERS);
  };
  if (w.steps > 0) take();
  int i = 0;
  for (int member = 0; member < w.heads; ++member) {
    for (int m = w.r.low; m < w.r.high; m += M, ++i) {
      const int64_t number = sum_tile<M>(w.a, w.e, w.batch, w.head(member), m / M);
      int* const turn = w.a.turns + 1 + number;
      const int mine = turn_of<M, N>(w.a, w.e, w.tile, m / M);
      if (w.a.ordered && first_lane) {
        await_turn(turn, mine);
        fence_async_global();
      }
      __syncwarp();
      FASTLM_UNROLL
      for (int group = 0; group < 2; ++group) {
        named_sync(FULL_DQ + group, ADDERS);
        if (first_lane)
          bulk_add(w.a.dq_sum + number * (M * W) + group * PART, w.base + ROOM.dq + group * PART * 4, PART * 4);
      }
      if (first_lane) {
        bulk_commit();
        bulk_wait_read<0>();
      }
      __syncwarp();
      if (i + 1 < w.steps) take();
      if (w.a.ordered && first_lane) {
        bulk_wait<0>();
        pass_turn(turn, mine + 1);
      }
    }
  }
  if (first_lane) bulk_wait<0>();
}

/// Where the groups add themselves: it waits for each turn and passes it on.
__device__ __forceinline__ void take_turns(const Work& w) {
  const bool takes = w.a.ordered && threadIdx.x % 32 == 0;
  for (int member = 0; member < w.heads; ++member) {
    for (int m = w.r.low; m < w.r.high; m += M) {
      int* const turn = w.a.turns + 1 + sum_tile<M>(w.a, w.e, w.batch, w.head(member), m / M);
      const int mine = turn_of<M, N>(w.a, w.e, w.tile, m / M);
      if (takes) await_turn(turn, mine);
      __syncwarp();
      named_arrive(OURS, TURNERS);
      named_sync(ADDED, TURNERS);
      if (takes) pass_turn(turn, mine + 1);
    }
  }
}

// --- the groups that compute -----------------------------------------------------------------------------------------

/// Rows from ... ROWS - 1 of a tile are 0: those of the next sequence, of which a NaN times a weight of 0 is a NaN.
/// Both groups together, behind the barrier of what was loaded.
template <int ROWS>
__device__ __forceinline__ void clear_rows(uint32_t tile, int from) {
  const int thread = static_cast<int>(threadIdx.x) - 128;
  for (int panel = 0; panel < PANELS; ++panel) {
    for (int chunk = 8 * from + thread; chunk < 8 * ROWS; chunk += 256)
      store_shared(tile + panel * ROWS * 128 + 16 * chunk, Words{0, 0, 0, 0});
  }
}

/// A descriptor so many bytes on: shared memory ends far below what its 14 bits of 16 bytes count.
__device__ __forceinline__ uint64_t on(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }
/// Columns 16 k and on of a tile of ROWS rows.
template <int ROWS>
constexpr __device__ __forceinline__ int along(int k) {
  return k / 4 * ROWS * 128 + k % 4 * 32;
}

/// One group: 64 keys, or half of the columns.
template <class T>
struct Consumer {
  const Work& w;
  int group, thread, warp, lane;
  float dk[COLUMNS / 2] = {}, dv[COLUMNS / 2] = {};

  __device__ __forceinline__ explicit Consumer(const Work& w)
      : w(w),
        group(__shfl_sync(FULL, static_cast<int>(threadIdx.x) / 128 - 1, 0)),
        thread(static_cast<int>(threadIdx.x) % 128),
        warp(thread / 32),
        lane(thread % 32) {}

  /// Where this group's part of the block's work begins.
  __device__ __forceinline__ int first_key() const { return SPLIT ? 0 : 64 * group; }
  __device__ __forceinline__ int first_query() const { return SPLIT ? QUERIES * group : 0; }
  __device__ __forceinline__ int first_column() const { return SPLIT ? COLUMNS * group : 0; }
  /// The panel of its keys in a tile of weights, that of its columns in one of queries.
  __device__ __forceinline__ uint32_t panel_of_keys(uint32_t tile) const { return tile + first_key() / 64 * M * 128; }
  __device__ __forceinline__ uint64_t columns_of(uint32_t queries) const {
    return descriptor_across<128>(queries + first_column() / PANEL * M * 128, M * 128);
  }

  /// x = (its keys of the tile `keys`) (its queries)^T.
  __device__ __forceinline__ void keys_by_queries(float (&x)[QUERIES / 2], uint32_t keys, uint32_t queries) const {
    const uint64_t left = descriptor_along<128>(keys + first_key() * 128);
    const uint64_t right = descriptor_along<128>(queries + first_query() * 128);
    FASTLM_UNROLL
    for (int k = 0; k < W / 16; ++k)
      multiply_shared<T, QUERIES>(x, on(left, along<N>(k)), on(right, along<M>(k)), k > 0);
  }
  /// sum += x (queries), x rounded to T.
  template <int STEPS>
  __device__ __forceinline__ void add_queries(float (&sum)[COLUMNS / 2], const uint32_t (&x)[STEPS][4],
                                              uint32_t queries) {
    const uint64_t right = columns_of(queries);
    FASTLM_UNROLL
    for (int k = 0; k < STEPS; ++k) multiply_mixed<T, COLUMNS, true>(sum, x[k], on(right, k * 16 * 128), true);
  }
  /// The same of x^T: a panel of 64 keys, queries by rows.
  __device__ __forceinline__ void add_queries(float (&sum)[COLUMNS / 2], uint32_t x, uint32_t queries) {
    const uint64_t left = descriptor_across<128>(x, M * 128), right = columns_of(queries);
    FASTLM_UNROLL
    for (int k = 0; k < M / 16; ++k)
      multiply_shared<T, COLUMNS, true, true>(sum, on(left, k * 16 * 128), on(right, k * 16 * 128), true);
  }
  /// Rows 16 k and on of its queries, its keys along, of a tile of weights.
  __device__ __forceinline__ void store_weights(uint32_t tile, int k, const uint32_t (&x)[4]) const {
    const int row = first_query() + 16 * k + 8 * (lane >> 4) + (lane & 7), chunk = 2 * warp + (lane >> 3 & 1);
    store_matrices_transposed(panel_of_keys(tile) + swizzled<128>(row, chunk), x);
  }
  /// Its part of a tile of dq, behind all that others add to it before.
  __device__ __forceinline__ void add_to_dq(const float (&dq)[COLUMNS_DQ / 2], int head, int m) const {
    named_sync(OURS, TURNERS);
    float* const to = w.a.dq_sum + sum_tile<M>(w.a, w.e, w.batch, head, m / M) * (M * W) + group * PART + thread * 4;
    FASTLM_UNROLL
    for (int n = 0; n < COLUMNS_DQ / 8; ++n)
      add_global(to + n * 128 * 4, dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]);
    named_arrive(ADDED, TURNERS);
  }
  /// The same left in shared memory for the warp that adds.
  __device__ __forceinline__ void hand_dq(const float (&dq)[COLUMNS_DQ / 2]) const {
    named_sync(EMPTY_DQ + group, ADDERS);
    FASTLM_UNROLL
    for (int n = 0; n < COLUMNS_DQ / 8; ++n) {
      store_shared(w.base + ROOM.dq + group * PART * 4 + (n * 128 + thread) * 16,
                   Words{__float_as_uint(dq[4 * n]), __float_as_uint(dq[4 * n + 1]), __float_as_uint(dq[4 * n + 2]),
                         __float_as_uint(dq[4 * n + 3])});
    }
    fence_async();
    named_arrive(FULL_DQ + group, ADDERS);
  }

  /// Step i: queries m ... m + M - 1 of a head. EDGE: not all of them see all keys.
  template <bool EDGE>
  __device__ __forceinline__ void step(int i, int head, int m) {
    const uint32_t q = w.q(i), dout = w.dout(i), ds = w.ds(i);
    const int parity = w.parity(i);
    float s[QUERIES / 2], dp[QUERIES / 2];
    barrier_wait(w.full_q(i), parity);
    if (EDGE && w.a.cu_q && m + M > w.e.len_q) {
      barrier_wait(w.full_dout(i), parity);
      clear_rows<M>(q, w.e.len_q - m);
      clear_rows<M>(dout, w.e.len_q - m);
      fence_async();
      named_sync(CONSUMERS, 256);
    }
    warpgroup_fence();
    keys_by_queries(s, w.base + ROOM.k, q);
    warpgroup_commit();
    barrier_wait(w.full_dout(i), parity);
    warpgroup_fence();
    keys_by_queries(dp, w.base + ROOM.v, dout);
    warpgroup_commit();

    warpgroup_wait<1>();
    ready(s);
    if (EDGE) {
      hide<true>(s, w.first + first_key() + 16 * warp + lane_row(), m + first_query() + lane_column(), w.e, w.a.before,
                 w.a.after);
    }
    const Pair* shifts = reinterpret_cast<const Pair*>(w.rows(i) + first_query()) + lane % 4;
    const Pair* deltas = shifts + M / 2;
    FASTLM_UNROLL
    for (int j = 0; j < QUERIES / 8; ++j) {
      const Pair shift = shifts[4 * j];
      FASTLM_UNROLL
      for (int n = 4 * j; n < 4 * j + 4; ++n) {
        s[n] = exp2_fast(s[n] * w.a.factor - (n % 2 ? shift.y : shift.x));
      }
    }
    // Long since over, but a loop: ptxas moves the wait for a product up to the last branch there is.
    barrier_wait(w.full_q(i), parity);
    warpgroup_wait<0>();
    ready(dp);
    uint32_t p[QUERIES / 16][4], dx[QUERIES / 16][4];
    FASTLM_UNROLL
    for (int k = 0; k < QUERIES / 16; ++k) {
      fragment_of<T>(p[k], s, k);
      if constexpr (SPLIT) store_weights(w.p(i), k, p[k]);
      FASTLM_UNROLL
      for (int j = 2 * k; j < 2 * k + 2; ++j) {
        const Pair delta = deltas[4 * j];
        FASTLM_UNROLL
        for (int n = 4 * j; n < 4 * j + 4; ++n) {
          dp[n] = s[n] * (dp[n] - (n % 2 ? delta.y : delta.x));
          if (EDGE && s[n] == 0) dp[n] = 0;
        }
      }
      fragment_of<T>(dx[k], dp, k);
      store_weights(ds, k, dx[k]);
    }
    if constexpr (!SPLIT) {
      warpgroup_fence();
      add_queries(dv, p, dout);
      warpgroup_commit();
    }

    fence_async();
    named_sync(CONSUMERS, 256);
    warpgroup_fence();
    if constexpr (SPLIT) {
      add_queries(dv, w.p(i), dout);
      warpgroup_commit();
    }
    // W = 64: the group's 64 queries; else its columns.
    float dq[COLUMNS_DQ / 2];
    const uint64_t left = descriptor_along<128>(ds + (W == 64 ? group * 64 * 128 : 0));
    const uint64_t right =
        descriptor_across<128>(w.base + ROOM.k + (W == 64 ? 0 : group * (COLUMNS_DQ / PANEL) * N * 128), N * 128);
    FASTLM_UNROLL
    for (int k = 0; k < N / 16; ++k)
      multiply_shared<T, COLUMNS_DQ, false, true>(dq, on(left, along<M>(k)), on(right, k * 16 * 128), k > 0);
    warpgroup_commit();
    warpgroup_wait<1>();
    if (lane == 0) barrier_arrive(w.empty_dout(i));
    warpgroup_fence();
    if constexpr (W == 128) {
      add_queries(dk, dx, q);
    } else {
      add_queries(dk, panel_of_keys(ds), q);
    }
    warpgroup_commit();

    warpgroup_wait<1>();
    ready(dq);
    if constexpr (SPLIT) {
      add_to_dq(dq, head, m);
    } else {
      hand_dq(dq);
    }
    warpgroup_wait<0>();
    ready(dk);
    ready(dv);
    if (lane == 0) barrier_arrive(w.empty_q(i));
  }

  __device__ __forceinline__ void walk() {
    barrier_wait(w.full_keys(), 0);
    if (w.a.cu_k && w.first + N > w.e.len_k) {
      clear_rows<N>(w.base + ROOM.k, w.e.len_k - w.first);
      fence_async();
      named_sync(CONSUMERS, 256);
    }
    const Range& r = w.r;
    int i = 0;
    for (int member = 0; member < w.heads; ++member) {
      const int head = w.head(member);
      for (int m = r.low; m < min_of(r.middle, r.high); m += M) step<true>(i++, head, m);
      for (int m = r.middle; m < r.end; m += M) step<false>(i++, head, m);
      for (int m = max_of(r.middle, r.end); m < r.high; m += M) step<true>(i++, head, m);
    }
  }

  /// The sums of this group, through its part of a tile that nobody reads any more, to `to`: the block's first row.
  __device__ __forceinline__ void store(const float (&sum)[COLUMNS / 2], uint32_t room, T* to, int64_t stride,
                                        int width) {
    room += first_key() * 128 + first_column() / PANEL * N * 128;
    FASTLM_UNROLL
    for (int k = 0; k < COLUMNS / 16; ++k) {
      uint32_t x[4];
      fragment_of<T>(x, sum, k);
      const int row = 16 * warp + lane % 16, chunk = 2 * k + lane / 16;
      store_matrices(room + chunk / 8 * N * 128 + swizzled<128>(row, chunk % 8), x);
    }
    named_sync(GROUP + group, 128);
    const int rows = w.e.len_k - w.first - first_key(), columns = width - first_column();
    to += first_key() * stride + first_column();
    for (int n = thread; n < 64 * COLUMNS / 8; n += 128) {
      const int row = n / (COLUMNS / 8), chunk = n % (COLUMNS / 8);
      if (row < rows && 8 * chunk < columns) {
        store_words_global(to + row * stride + 8 * chunk,
                           load_shared(room + chunk / 8 * N * 128 + swizzled<128>(row, chunk % 8)));
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void backward(const HopperBackwardArguments& x) {
  const AttentionArguments& a = x.a;
  const int pad = static_cast<int>(-shared_address(shared<char>()) & 1023);
  char* const room = shared<char>(pad);
  int* const number = reinterpret_cast<int*>(room + ROOM.number);
  const uint32_t base = shared_address(room);
  const int group = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    *number = a.ordered ? atomicAdd(a.turns, 1) : static_cast<int>(blockIdx.x);
    for (int n = 0; n < 5; ++n) barrier_init(base + ROOM.barriers + 8 * n, 1);
    for (int n = 5; n < 9; ++n) barrier_init(base + ROOM.barriers + 8 * n, 8);
    barrier_init_done();
  }
  __syncthreads();
  const Place p = place_keys(a, *number);
  const Extent e = extent(a, p.batch);
  const int first = p.tile * N, heads = a.heads / a.kv_heads;
  if (first >= e.len_k) return;
  Range r = seen_range<N, M>(first, e.len_k, e.len_q, a.after, e.after, a.before, e.before);
  if (first + N > e.len_k) r.middle = max_of(r.middle, (r.high + M - 1) / M * M);  // keys that are none are hidden
  const int steps = r.high > r.low ? (r.high - r.low + M - 1) / M * heads : 0;
  const Work w{a, e, r, p.tile, first, p.batch, p.head, heads, steps, base, room};

  if (group == 0) {
    registers_down<40>();
    if (warp == 0) load(x, w);
    if (warp == 1) {
      if constexpr (SPLIT) {
        take_turns(w);
      } else {
        add(w);
      }
    }
  } else {
    registers_up<232>();
    Consumer<T> c(w);
    c.walk();
    named_sync(CONSUMERS, 256);
    FASTLM_UNROLL
    for (float& sum : c.dk) sum *= a.scale;
    c.store(c.dk, base + ROOM.k, rows_of(static_cast<T*>(a.dk), a.dk_at, e.batch, p.head, e.start_k + int64_t{first}),
            a.dk_at.row, a.d);
    c.store(c.dv, base + ROOM.v, rows_of(static_cast<T*>(a.dv), a.dv_at, e.batch, p.head, e.start_k + int64_t{first}),
            a.dv_at.row, a.width_v);
  }
}

}  // namespace

FASTLM_KERNEL(attention_hopper_backward, 0, 32 * TILE.warps, 1, HopperBackwardArguments, backward<Scalar>)

}  // namespace fastlm::cuda

// attention's forward on sm_90a, in the manner of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608): a block that
// stays holds a tile of queries, 64 of them in each warp group that computes; one more warp group loads.
//
//   loads      one thread: keys and values through rings of two, q of each group once for a tile. Groups hand their q
//              back one by one: while one stores, the other is at its next tile
//   computes   s = q k^T from shared memory, the softmax in registers, o += p v with p in registers. The products of
//              the next logits begin before those of this tile's values, and the softmax runs under the latter; up to
//              128 columns groups take turns at beginning products too, so one's softmax runs under another's
//   edges      tiles of keys are walked downwards, so that those at the diagonal and the ragged last one come first, in
//              a loop of their own: the other computes no mask
//   stores     by way of shared memory, a warp's 16 rows at a time: the copy engine, or 16 bytes a lane where rows
//              behind them are another sequence's or of another head. Those of a pack never leave their sequence
//   options    softcap and documents have a kernel of their own, with a smaller tile: 128 x 128 of 64 columns, 128 x 96
//              of 128; with 256 it would spill even at 64 keys. Masks, ALiBi and dropout as well (General) took nvcc
//              one and two minutes where all else takes seconds: those calls go to the sm_80 path
//   heads      that share a key head are rows of one tile where a head's queries alone would leave it empty (group)
//
// Floor: 4 M N D operations of a tile, 4096 in a cycle of a multiprocessor, and M N exponentials, 16 in a cycle. D =
// 64: 192 x 128, 1536 cycles each; 128: 128 x 128, 2048 and 1024, or where all is seen 128 x 176, 2816 and 1408; 256:
// 128 x 80, 2560 and 640. With 64 columns the exponentials are the floor as much as the products, hence three groups.
// K and V of the heads in work stay in the L2 cache (span).
//
// Registers: 168 a thread at the start (128 with three groups), then 240 (160) where there are products, of which s, o,
// p take 32 + 64 + 32, 64 + 64 + 32, 64 + 88 + 44 and 128 + 40 + 20 with their addresses in uniform ones, and 24 (32)
// where there are loads, which use 21. nvcc 13.0: nothing spilled, no product serialised. In the loop all 66 (66, 90,
// 42) exponentials of a tile stand between the products and their wait, and o of 256 columns is scaled under those of
// the logits. Without the wait for the next keys above the one for o, ptxas moves the latter up: none to 15 of them do.
//
// Tried and lost: the loading thread hands out tiles by way of shared memory: what is walked over is then no longer
// known to be the same in all lanes, 64 columns spill 212 bytes in the loop. Spoiled rows computed again where they are
// stored: 24 to 56 bytes, for what happens to nobody; so it is done behind the last tile. o has no room of its own in
// 128 x 176 and with 256 columns; over V, as FlashAttention-3 has it, groups would wait for each other there.
//
// Never run on a GPU.
#include "cuda/attention_hopper.h"
#include "cuda/attention_repair.cuh"
#include "cuda/hopper.cuh"

namespace fastlm::cuda {

constexpr int W = FASTLM_HEAD_DIM, PANELS = W / PANEL, PANEL_BYTES = 2 * PANEL;
/// Bytes of a panel of a group's rows.
constexpr int GROUP_PANEL = GROUP_ROWS * PANEL_BYTES;

/// The block's shared memory. Rows of q and out are in parts, one for each consumer group.
template <int M, int N>
struct HopperForwardRoom {
  static constexpr int GROUPS = M / GROUP_ROWS, PART = 2 * GROUP_ROWS * W, KEYS = 2 * N * W;
  static constexpr bool OUT_APART = hopper_forward_out_apart(W, M, N);
  uint32_t q, k, v, out, barriers;

  __device__ __forceinline__ HopperForwardRoom()
      : q((shared_address(shared<char>()) + PANEL_ALIGNMENT - 1) / PANEL_ALIGNMENT * PANEL_ALIGNMENT),
        k(q + GROUPS * PART),
        v(k + HOPPER_STAGES * KEYS),
        out(OUT_APART ? v + HOPPER_STAGES * KEYS : q),
        barriers(v + HOPPER_STAGES * KEYS + (OUT_APART ? GROUPS * PART : 0)) {}

  // Of use i of the rings of keys and values.
  __device__ __forceinline__ uint32_t keys(int i) const { return k + i % HOPPER_STAGES * KEYS; }
  __device__ __forceinline__ uint32_t values(int i) const { return v + i % HOPPER_STAGES * KEYS; }
  static __device__ __forceinline__ int parity(int i) { return i / HOPPER_STAGES % 2; }

  // Full: what the copy engine has brought. Empty: what every warp that reads it is done with.
  static constexpr int FULL_ONES = GROUPS + 2 * HOPPER_STAGES;
  __device__ __forceinline__ uint32_t q_full(int group) const { return barriers + 8 * group; }
  __device__ __forceinline__ uint32_t k_full(int i) const { return barriers + 8 * (GROUPS + i % HOPPER_STAGES); }
  __device__ __forceinline__ uint32_t v_full(int i) const { return k_full(i) + 8 * HOPPER_STAGES; }
  static __device__ __forceinline__ uint32_t empty(uint32_t full) { return full + 8 * FULL_ONES; }
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < FULL_ONES; ++i) {
      barrier_init(barriers + 8 * i, 1);
      barrier_init(empty(barriers + 8 * i), i < GROUPS ? 4 : 4 * GROUPS);
    }
    barrier_init_done();
  }
};

/// A tile of queries of a head, or of all heads that share a key head.
template <int M>
struct HopperForwardWork {
  Extent e;
  int tile, head, first;  // head: of q's map; first query

  __device__ __forceinline__ HopperForwardWork(const HopperForwardArguments& h, int number) {
    const Place p = place(h.a, number, h.heads);
    e = extent(h.a, p.batch);
    tile = h.a.after ? h.a.tiles - 1 - p.tile : p.tile;
    head = p.head;
    first = tile * (M / h.group);
  }
};
/// The tiles of keys that it walks over: low ... high - 1, downwards. Those of inner_low ... inner_high - 1 are seen by
/// all of its queries.
struct HopperForwardKeys {
  int low, inner_low, inner_high, high;
};
template <int M, int N, bool GENERAL>
__device__ __forceinline__ HopperForwardKeys keys_of(const HopperForwardArguments& h,
                                                     const HopperForwardWork<M>& work) {
  const AttentionArguments& a = h.a;
  const Extent& e = work.e;
  const int last = min_of(work.first + M / h.group, e.len_q) - 1;
  Range seen = seen_range<N>(work.first, last, e.len_k, a.before, e.before, a.after, e.after);
  if (GENERAL && a.documents_q)
    seen = narrowed<N>(seen, a.ranges + 4 * (static_cast<int64_t>(e.batch) * a.tiles + work.tile));
  const int low = seen.low / N, high = max_of((seen.high + N - 1) / N, low);
  const int inner_high = min_of(max_of(seen.end / N, low), high);
  return {low, min_of(max_of(seen.middle / N, low), inner_high), inner_high, high};
}

/// Every role goes through the same tiles. Long ones come first (place()), and every other round goes through the
/// blocks backwards, so that who had a longer one has a shorter one next: a block's places in two rounds add up to
/// ends.
template <int M, class Body>
__device__ __forceinline__ void for_each_tile(const HopperForwardArguments& h, const Body& body) {
  const int blocks = static_cast<int>(gridDim.x);
  for (int number = blockIdx.x; number < h.total; number = 2 * (number / blocks + 1) * blocks - 1 - number) {
    const HopperForwardWork<M> work(h, number);
    if (work.first < work.e.len_q) body(work, number);
  }
}

// --- the warp group that loads ---------------------------------------------------------------------------------------

/// One thread.
template <int M, int N, bool GENERAL>
__device__ __forceinline__ void produce(const HopperForwardArguments& h, const HopperForwardRoom<M, N>& room) {
  using Room = HopperForwardRoom<M, N>;
  const int share = h.heads / h.a.kv_heads;  // of q's heads that share a key head
  int tiles = 0, loaded = 0;                 // so far
  for_each_tile<M>(h, [&](const HopperForwardWork<M>& work, int&) {
    const Extent& e = work.e;
    const HopperForwardKeys keys = keys_of<M, N, GENERAL>(h, work);
    const int kv_head = work.head / share;
    const auto load_q = [&] {
      for (int g = 0; g < Room::GROUPS; ++g) {
        const uint32_t full = room.q_full(g), to = room.q + g * Room::PART;
        const int first = e.start_q + work.first + g * (GROUP_ROWS / h.group);
        barrier_wait(room.empty(full), tiles % 2 ^ 1);
        barrier_expect(full, Room::PART);
        for (int p = 0; p < PANELS; ++p)
          tile_load(to + p * GROUP_PANEL, &h.q, full, p * PANEL, 0, first, work.head, e.batch);
      }
      ++tiles;
    };
    const auto load = [&](const TensorMap* map, uint32_t to, uint32_t full, int n) {
      barrier_wait(room.empty(full), Room::parity(loaded) ^ 1);
      barrier_expect(full, Room::KEYS);
      for (int p = 0; p < PANELS; ++p)
        tile_load(to + p * N * PANEL_BYTES, map, full, p * PANEL, 0, e.start_k + n * N, kv_head, e.batch);
    };
    if (keys.low == keys.high) load_q();
    for (int n = keys.high - 1; n >= keys.low; --n) {
      load(&h.k, room.keys(loaded), room.k_full(loaded), n);
      load(&h.v, room.values(loaded), room.v_full(loaded), n);
      if (n == keys.high - 1) load_q();  // last: a tile before this one may still use its room
      ++loaded;
    }
  });
}

// --- those that compute ----------------------------------------------------------------------------------------------

/// The descriptor of what lies `bytes` on: addresses end far below the lower word's end.
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, int bytes) {
  return descriptor >> 32 << 32 | static_cast<uint32_t>(static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

/// 64 queries of a warp group: of each thread two rows, 8 apart.
template <class T, int M, int N, bool GENERAL>
struct HopperForwardConsumer {
  using Room = HopperForwardRoom<M, N>;
  using Work = HopperForwardWork<M>;
  using Keys = HopperForwardKeys;
  static constexpr int GROUPS = Room::GROUPS;
  static constexpr bool TURNS = W <= 128;  // groups issue products in turn: one's run while another has its softmax
  static constexpr bool SHRINK_LATE = W > 128;  // under the products of the next tile
  static constexpr int TURN = 1;                // number of the first of the barriers

  const HopperForwardArguments& h;
  const AttentionArguments& a;
  const Room& room;
  const int group, row;  // row: the warp's first, of 16
  const bool leader;
  int tiles = 0, used = 0;  // so far; of the rings
  bool spoiled = false;     // this thread has stored a NaN
  float o[W / 2], s[N / 2], top[2], sum[2], shrink[2];
  uint32_t p[N / 16][4];

  __device__ __forceinline__ HopperForwardConsumer(const HopperForwardArguments& h, const Room& room, int group)
      : h(h),
        a(h.a),
        room(room),
        group(group),
        row(GROUP_ROWS * group + static_cast<int>(threadIdx.x) / 32 % 4 * 16),
        leader(threadIdx.x % 32 == 0) {}

  __device__ __forceinline__ void release(uint32_t barrier) const {
    if (leader) barrier_arrive(barrier);
  }

  /// s = q k^T, begun.
  __device__ __forceinline__ void begin_logits() {
    warpgroup_fence();
    const uint64_t q = descriptor_along<PANEL_BYTES>(room.q + group * Room::PART);
    const uint64_t k = descriptor_along<PANEL_BYTES>(room.keys(used));
    FASTLM_UNROLL
    for (int i = 0; i < W / 16; ++i) {
      const int panel = i / 4, in = i % 4 * 32;
      multiply_shared<T, N>(s, moved(q, panel * GROUP_PANEL + in), moved(k, panel * N * PANEL_BYTES + in), i > 0);
    }
    warpgroup_commit();
  }
  /// o += p v with the values of use i, begun.
  __device__ __forceinline__ void begin_out(int i) {
    warpgroup_fence();
    const uint64_t v = descriptor_across<PANEL_BYTES>(room.values(i), N * PANEL_BYTES);
    FASTLM_UNROLL
    for (int j = 0; j < N / 16; ++j) multiply_mixed<T, W, true>(o, p[j], moved(v, j * 16 * PANEL_BYTES), true);
    warpgroup_commit();
  }
  __device__ __forceinline__ void round_weights() {
    FASTLM_UNROLL
    for (int j = 0; j < N / 16; ++j) fragment_of<T>(p[j], s, j);
  }
  __device__ __forceinline__ void shrink_out() {
    FASTLM_UNROLL
    for (int i = 0; i < W / 2; ++i) o[i] *= shrink[i / 2 % 2];
  }

  /// From s to units of log2.
  __device__ __forceinline__ float factor() const { return GENERAL && a.softcap > 0 ? 1.f : a.factor; }
  __device__ __forceinline__ int query(const Work& work, int r) const {
    return work.first + (row + lane_row() + 8 * r) / h.group;
  }
  /// -inf where positions hide a key of tile n.
  __device__ __forceinline__ void hide_keys(const Work& work, int n) {
    const Extent& e = work.e;
    int low[2], high[2];
    FASTLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int i = query(work, r), origin = n * N + lane_column();
      low[r] = (a.before ? i - e.before : 0) - origin;
      high[r] = (a.after ? min_of(i + e.after, e.len_k - 1) : e.len_k - 1) - origin;
    }
    FASTLM_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      const int column = fragment_column(0, i), r = i / 2 % 2;
      s[i] = (column < low[r]) | (column > high[r]) ? -INF : s[i];  // a condition of more parts becomes branches
    }
  }
  __device__ __forceinline__ void hide_documents(const Work& work, int n) {
    const Extent& e = work.e;
    const int64_t* const documents = a.documents_k + static_cast<int64_t>(e.batch) * e.len_k;
    int64_t own[2];
    FASTLM_UNROLL
    for (int r = 0; r < 2; ++r)
      own[r] = a.documents_q[static_cast<int64_t>(e.batch) * e.len_q + min_of(query(work, r), e.len_q - 1)];
    FASTLM_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      const int64_t other = documents[min_of(fragment_column(n * N + lane_column(), i), e.len_k - 1)];
      s[i] = other == own[i / 2 % 2] ? s[i] : -INF;
    }
  }
  /// Logits to weights relative to the largest so far; sums are this thread's.
  template <bool EDGE>
  __device__ __forceinline__ void softmax(const Work& work, int n) {
    if (GENERAL && a.softcap > 0) {
      FASTLM_UNROLL
      for (int i = 0; i < N / 2; ++i) s[i] = tanh_fast(s[i] * a.factor) * a.softcap;
    }
    if constexpr (EDGE) hide_keys(work, n);
    if (EDGE && GENERAL && a.documents_q) hide_documents(work, n);
    const float factor = this->factor();
    FASTLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      float highest = top[r];
      FASTLM_UNROLL
      for (int i = 2 * r; i < N / 2; i += 4) highest = fmaxf(highest, fmaxf(s[i], s[i + 1]));
      highest = fmaxf(highest, exchange(highest, 1));
      highest = fmaxf(highest, exchange(highest, 2));
      const float base = EDGE && highest == -INF ? 0.f : highest * factor;
      shrink[r] = exp2_fast(top[r] * factor - base);
      top[r] = highest;
      sum[r] *= shrink[r];
      FASTLM_UNROLL
      for (int i = 2 * r; i < N / 2; i += 4) {
        s[i] = exp2_fast(s[i] * factor - base);
        s[i + 1] = exp2_fast(s[i + 1] * factor - base);
        sum[r] += s[i] + s[i + 1];
      }
    }
  }

  /// Tile n of keys, while the values of the tile before it are added: its logits are begun before those, so the
  /// tensor cores have work while this group has its softmax.
  template <bool EDGE>
  __device__ __forceinline__ void step(const Work& work, int n, int low) {
    if constexpr (TURNS) named_sync(TURN + group, 2 * GROUP_THREADS);
    begin_logits();
    if constexpr (SHRINK_LATE) shrink_out();
    barrier_wait(room.v_full(used - 1), Room::parity(used - 1));
    begin_out(used - 1);
    if constexpr (TURNS) named_arrive(TURN + (group + 1) % GROUPS, 2 * GROUP_THREADS);
    warpgroup_wait<1>();
    ready(s);
    release(room.empty(room.k_full(used)));
    softmax<EDGE>(work, n);
    ++used;
    // In front of the wait for o, not behind it: without the loop in here ptxas moves that wait above the softmax.
    if (n > low) barrier_wait(room.k_full(used), Room::parity(used));
    warpgroup_wait<0>();
    ready(o);
    release(room.empty(room.v_full(used - 2)));
    round_weights();
    if constexpr (!SHRINK_LATE) shrink_out();
  }

  __device__ __forceinline__ void walk(const Work& work, const Keys& keys) {
    int n = keys.high - 1;
    barrier_wait(room.k_full(used), Room::parity(used));
    begin_logits();
    warpgroup_wait<0>();
    ready(s);
    release(room.empty(room.k_full(used)));
    softmax<true>(work, n);
    round_weights();
    ++used;
    if (n > keys.low) barrier_wait(room.k_full(used), Room::parity(used));
    --n;
    for (int stop = keys.inner_high;; stop = keys.low) {
      for (; n >= stop; --n) step<true>(work, n, keys.low);
      if (n < keys.low) break;
      for (; n >= keys.inner_low; --n) step<false>(work, n, keys.low);
    }
    if constexpr (SHRINK_LATE) shrink_out();
    if constexpr (Room::OUT_APART) release(room.empty(room.q_full(group)));
    barrier_wait(room.v_full(used - 1), Room::parity(used - 1));
    begin_out(used - 1);
    warpgroup_wait<0>();
    ready(o);
    release(room.empty(room.v_full(used - 1)));
  }

  /// Divides by the sums; lse.
  __device__ __forceinline__ void finish(const Work& work) {
    const Extent& e = work.e;
    FASTLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      float total = sum[r] + exchange(sum[r], 1), highest = top[r] * factor(), part = 1;
      total += exchange(total, 2);
      const int i = query(work, r), head = work.head * h.group + (row + lane_row() + 8 * r) % h.group;
      if (a.sinks) {
        const float sink = a.sinks[head] * LOG2_E, before = highest;
        highest = fmaxf(before, sink);
        const float base = highest == -INF ? 0.f : highest;
        part = exp2_fast(before - base);
        total = total * part + exp2_fast(sink - base);
      }
      if (lane_column() == 0 && i < e.len_q) {
        a.lse[row_of(a, e, head) + i] = total == 0 ? -INF : (highest + log2f(total)) * LN_2;
      }
      part = total == 0 ? 0.f : part / total;
      FASTLM_UNROLL
      for (int n = 2 * r; n < W / 2; n += 4) {
        o[n] *= part;
        o[n + 1] *= part;
      }
    }
  }

  /// The warp's 16 rows by way of shared memory.
  __device__ __forceinline__ void store(const Work& work) {
    const Extent& e = work.e;
    // What is made of these is made below, not ahead of the walk.
    const int lane = forgotten(static_cast<int>(threadIdx.x) % 32), own_row = forgotten(row);
    if constexpr (Room::OUT_APART) {  // the last tile's have left it
      if (leader) bulk_wait_read<0>();
      __syncwarp();
    }
    const uint32_t out = room.out + own_row / GROUP_ROWS * Room::PART + own_row % GROUP_ROWS * PANEL_BYTES;
    FASTLM_UNROLL
    for (int k = 0; k < W / 16; ++k) {
      uint32_t words[4];
      fragment_of<T>(words, o, k);
      store_matrices(out + k / 4 * GROUP_PANEL + swizzled<PANEL_BYTES>(lane % 16, k % 4 * 2 + lane / 16), words);
    }
    FASTLM_UNROLL
    for (int i = 0; i < W / 2; ++i) spoiled |= o[i] != o[i];
    fence_async();
    __syncwarp();
    if (h.group == 1 && (!a.cu_q || work.first + row + 16 <= e.len_q)) {
      if (leader) {
        for (int p = 0; p * PANEL < a.width_v; ++p)
          tile_store(&h.out, out + p * GROUP_PANEL, p * PANEL, 0, e.start_q + work.first + row, work.head, e.batch);
        bulk_commit();
        if constexpr (!Room::OUT_APART) bulk_wait_read<0>();
      }
    } else {
      store_rows(work, out, lane);
    }
    if constexpr (!Room::OUT_APART) {
      __syncwarp();
      release(room.empty(room.q_full(group)));
    }
  }
  /// What the copy engine does not store: rows of a pack that are not all of this sequence, and of several heads.
  __device__ __forceinline__ void store_rows(const Work& work, uint32_t out, int lane) const {
    constexpr int WORDS = W / 8;
    const Extent& e = work.e;
    const int word = lane % WORDS;
    if (8 * word >= a.width_v) return;
    T* const to = static_cast<T*>(a.out) + 8 * word;
    const uint32_t from = out + word / 8 * GROUP_PANEL;
    FASTLM_ROLL
    for (int r = lane / WORDS; r < 16; r += 32 / WORDS) {
      const int i = work.first + (row + r) / h.group, head = work.head * h.group + (row + r) % h.group;
      if (i >= e.len_q) continue;
      store_words_global(rows_of(to, a.out_at, e.batch, head, e.start_q + static_cast<int64_t>(i)),
                         load_shared(from + swizzled<PANEL_BYTES>(r, word % 8)));
    }
  }

  __device__ __forceinline__ void run() {
    if constexpr (TURNS) {
      if (group == GROUPS - 1) named_arrive(TURN, 2 * GROUP_THREADS);
    }
    for_each_tile<M>(h, [&](const Work& work, int& number) {
      const Keys keys = keys_of<M, N, GENERAL>(h, work);
      FASTLM_UNROLL
      for (int i = 0; i < W / 2; ++i) o[i] = 0;
      FASTLM_UNROLL
      for (int i = 0; i < N / 2; ++i)
        s[i] = 0;  // else the last tile's are in use until the product does not add to them
      FASTLM_UNROLL
      for (int r = 0; r < 2; ++r) {
        top[r] = -INF;
        sum[r] = 0;
      }
      barrier_wait(room.q_full(group), tiles % 2);
      ++tiles;
      if (keys.low < keys.high) {
        walk(work, keys);
      } else if constexpr (Room::OUT_APART) {
        release(room.empty(room.q_full(group)));
      }
      number = forgotten(number);  // so that nothing else of the work waits in registers for this
      const Work same(h, number);
      finish(same);
      store(same);
    });
    if (leader) bulk_wait<0>();
    __syncwarp();
    // Not where it is found out: what that takes of registers, the walk would do without.
    if (__ballot_sync(FULL, spoiled && (a.before || a.after || a.cu_q || a.documents_q))) {
      for_each_tile<M>(h, [&](const Work& work, int&) {
        FASTLM_ROLL
        for (int r = row; r < row + 16; ++r) {
          const int i = work.first + r / h.group;
          if (i < work.e.len_q) repair_out<T>(a, work.e, work.head * h.group + r % h.group, i);
        }
      });
    }
  }
};

template <int VARIANT>
constexpr AttentionTile HOPPER_TILE = hopper_forward_tiles(W).rows[VARIANT];
template <class T, int VARIANT>
__device__ __forceinline__ void attention_hopper_forward(const HopperForwardArguments& h) {
  constexpr AttentionTile TILE = HOPPER_TILE<VARIANT>;
  using Room = HopperForwardRoom<TILE.m, TILE.n>;
  const Room room;
  const int group = __shfl_sync(FULL, static_cast<int>(threadIdx.x) / GROUP_THREADS, 0);
  if (threadIdx.x == 0) {
    room.init();
    prefetch(&h.q);
    prefetch(&h.k);
    prefetch(&h.v);
    prefetch(&h.out);
  }
  __syncthreads();
  constexpr bool MANY = Room::GROUPS == 3;
  if (group == 0) {
    registers_down<(MANY ? 32 : 24)>();
    if (threadIdx.x == 0) produce<TILE.m, TILE.n, TILE.general>(h, room);
  } else {
    registers_up<(MANY ? 160 : 240)>();
    HopperForwardConsumer<T, TILE.m, TILE.n, TILE.general>(h, room, group - 1).run();
  }
}

#define FASTLM_VARIANT(variant)                                                                         \
  FASTLM_KERNEL(attention_hopper_forward, variant, 32 * hopper_forward_tiles(W).rows[variant].warps, 1, \
                HopperForwardArguments, attention_hopper_forward<Scalar, variant>)
FASTLM_VARIANT(0)
#if FASTLM_HEAD_DIM < 256
FASTLM_VARIANT(1)
#endif
#if FASTLM_HEAD_DIM == 128
FASTLM_VARIANT(2)
#endif

}  // namespace fastlm::cuda

// attention, forward, by mma.sync: FlashAttention-2's order of work (Dao 2023, arXiv:2307.08691) with a base of the
// exponentials that is moved only where it rises.
//
// A block holds M queries of one head and walks over the keys they see by tiles of N. A warp has 16 or 32 queries for
// itself: s = q k^T, weights 2^(s * factor - base), out += weights v; products and weights never leave its registers,
// because two neighbouring blocks of a product are a left operand. Keys and values come by cp.async, with zeros for
// what is not there: two stages with one barrier a tile, or, where shared memory is short, one stage, in which values
// arrive while keys are multiplied and the next keys while values are. Edges go first; the tiles between them, of which
// everything is seen, are a loop without masks.
//
// Bytes: q, out and lse once, k and v once a tile of queries, from the L2 cache: 4 N W bytes for 4 M N W flops, M = 128
// flops a byte. Tensor cores then are the floor: N W / 4 cycles a tile and warp of 32 queries at 256 multiplications a
// cycle (an A100's quarter of a multiprocessor). What has to fit beside them:
//   ldmatrix  512 bytes, 4 cycles of shared memory that four warps share; of keys and values one serves 4 products of
//             a warp with 32 queries, 2 with 16. Share of the floor: 50% where 32 queries also stay in registers (W up
//             to 96), 75% at W = 128 where they are loaded again for every 32 keys, 100% with 16 held queries, 125% at
//             W = 256. This is why 32 queries a warp at W = 128 are worth all 255 registers
//   exp2      8 cycles a warp for each of N numbers a lane: 50% at W = 64, 25% at W = 128
//   issue     at W = 128 3.5 instructions for each mma, 43%
// Two blocks of four warps (one of eight) a multiprocessor, so that one computes weights while another multiplies.
//
// The base of a query's exponentials is its largest logit so far. Whether one of the warp's has risen is asked by a
// comparison and a vote, and only then rows are reduced and out is multiplied: once the first tiles are seen, maxima
// rise seldom. Raising it only for what exceeds it by 2^8 would be rarer still, but then the largest weight is rounded
// as all others are, where 1 is not: out's error grew by 4 to 6%. The weights' sums are each lane's own until the end.
// A query that has seen nothing has the base LOWEST, and no loop tests for -inf.
//
// Registers (nvcc 13.0, -Xptxas -v; sm_80, 86, 90a and 120): no spills in any instance. Lost: W = 128 by 128 x 64
// (60% ldmatrix instead of 75%) spills 72 bytes. Several instances did as long as what finish() needs stayed alive
// through the walk (a sequence, a place: forgotten() has it computed again), as rows were added before the swizzle
// (attention_rows.cuh: 12 registers), and as hide() had one condition (a branch for each number).
// NaN in keys and values that a query must not see: hidden logits are selected away, 0 * NaN of values is repaired
// (attention_repair.cuh).
//
// Run in the emulation alone, never on a GPU.
#include "cuda/attention_ampere.h"
#include "cuda/attention_repair.cuh"
#include "cuda/attention_rows.cuh"

namespace fastlm::cuda {

constexpr int W = FASTLM_HEAD_DIM, BYTES = 2 * W;  // of a row in shared memory

/// The base of a query that has seen nothing: no logit is smaller, and yet -inf less it is -inf.
constexpr float LOWEST = -3.4028234663852886e38f;

/// For addresses that are computed once, ahead of the walk.
__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

/// What a block does.
struct Work {
  Place p;
  Extent e;
  int first;  // query

  __device__ __forceinline__ Work(const AttentionArguments& a, int m, int number) : p(place(a, number, a.heads)) {
    if (a.after) p.tile = a.tiles - 1 - p.tile;  // those that see most go first
    e = extent(a, p.batch);
    first = p.tile * m;
  }
};
/// A left operand of STEPS x BLOCKS matrices of 16 x 16 that is in registers; make(r, block, step) gives each.
template <int STEPS, int BLOCKS>
struct Held {
  uint32_t fragments[STEPS][BLOCKS][4];

  template <class Make>
  __device__ __forceinline__ explicit Held(const Make& make) {
    FASTLM_UNROLL
    for (int step = 0; step < STEPS; ++step) {
      FASTLM_UNROLL
      for (int block = 0; block < BLOCKS; ++block) make(fragments[step][block], block, step);
    }
  }
  __device__ __forceinline__ void load(uint32_t (&r)[4], int block, int step) const {
    FASTLM_UNROLL
    for (int j = 0; j < 4; ++j) r[j] = fragments[step][block][j];
  }
};

/// A warp's queries and what they have seen so far.
template <class T, int VARIANT>
struct AmpereForward {
  static constexpr AttentionTile TILE = ampere_forward(W).rows[VARIANT];
  static constexpr int M = TILE.m, N = TILE.n, STAGES = TILE.stages;
  static constexpr int BLOCKS = M / 16 / TILE.warps;  // of 16 queries
  static constexpr bool GENERAL = TILE.general;
  static constexpr int VALUES = N * BYTES;  // of shared memory behind the keys
  using Rows = HeadRows<T, W, 32 * TILE.warps>;
  using Scores = float[BLOCKS][N / 2];

  const AttentionArguments& a;
  const Extent& e;
  const General& general;
  const Rows k, v;
  const int64_t row;  // of this lane's first query, in dropout
  const int i;        // that query
  const int low, high;
  int n, left;    // this tile of keys, and how many there are from it on
  uint32_t keys;  // in shared memory, this stage's
  float out[BLOCKS][W / 2] = {}, base[BLOCKS][2] = {}, weight[BLOCKS][2] = {};

  static __device__ __forceinline__ uint32_t queries() { return shared_address(shared<char>()); }
  /// Where the other stage has its keys.
  __device__ __forceinline__ uint32_t other() const { return 2 * (queries() + M * BYTES + VALUES) - keys; }

  __device__ __forceinline__ void start(const float* sink) {
    const float x = sink ? *sink * LOG2_E : -INF;  // a key without a value
    FASTLM_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
      FASTLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        base[b][half] = fmaxf(x, LOWEST);
        weight[b][half] = lane_column() == 0 ? exp2_fast(x - base[b][half]) : 0.f;
      }
    }
  }

  /// Logits to weights 2^(s * factor - base), their sums to `weight`.
  __device__ __forceinline__ void weigh(Scores& s) {
    const float factor = GENERAL ? 1.f : a.factor;
    float top[BLOCKS][2];
    bool risen = false;
    FASTLM_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
      FASTLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        top[b][half] = -INF;
        FASTLM_UNROLL
        for (int x = 2 * half; x < N / 2; x += 4) top[b][half] = fmaxf(top[b][half], fmaxf(s[b][x], s[b][x + 1]));
        risen |= top[b][half] * factor > base[b][half];
      }
    }
    if (__ballot_sync(FULL, risen)) {
      FASTLM_UNROLL
      for (int b = 0; b < BLOCKS; ++b) {
        FASTLM_UNROLL
        for (int half = 0; half < 2; ++half) {
          float most = fmaxf(top[b][half], exchange(top[b][half], 1));
          most = fmaxf(base[b][half], fmaxf(most, exchange(most, 2)) * factor);
          const float shrink = exp2_fast(base[b][half] - most);
          base[b][half] = most;
          weight[b][half] *= shrink;
          FASTLM_UNROLL
          for (int x = 2 * half; x < W / 2; x += 4) {
            out[b][x] *= shrink;
            out[b][x + 1] *= shrink;
          }
        }
      }
    }
    FASTLM_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
      FASTLM_UNROLL
      for (int x = 0; x < N / 2; ++x) {
        s[b][x] = exp2_fast(s[b][x] * factor - base[b][x / 2 % 2]);
        weight[b][x / 2 % 2] += s[b][x];
      }
    }
  }
  __device__ __forceinline__ void drop(Scores& p) const {
    if (!a.threshold) return;
    FASTLM_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
      const RowDropout rows[2] = {{*a.seed, row + 16 * b, a.threshold, 1.f},
                                  {*a.seed, row + 16 * b + 8, a.threshold, 1.f}};
      FASTLM_UNROLL
      for (int x = 0; x < N / 2; ++x) {
        if (rows[x / 2 % 2].dropped(fragment_column(n + lane_column(), x))) p[b][x] = 0;
      }
    }
  }

  /// A tile of keys. At the EDGE something may be hidden, or not there.
  template <bool EDGE, class Queries>
  __device__ __forceinline__ void step(const Queries& q) {
    const int next = !EDGE || n + N < high ? n + N : low;
    --left;
    copy_wait<0>();
    __syncthreads();
    if constexpr (STAGES == 1) {
      v.template copy<N, EDGE>(keys + VALUES, n, thread());
    } else if (left > 0) {
      k.template copy<N, EDGE>(other(), next, thread());
      v.template copy<N, EDGE>(other() + VALUES, next, thread());
    }
    copy_commit();
    Scores s = {};
    multiply_tile<T, W / 16>(s, q, Operand<BYTES, false, false>(keys, 0, thread()));
    if constexpr (STAGES == 1) {
      copy_wait<0>();
      __syncthreads();
      if (left > 0) k.template copy<N, EDGE>(keys, next, thread());
      copy_commit();
    }
    FASTLM_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
      [[maybe_unused]] float steep[1];
      if constexpr (GENERAL) general.template logits<false, false>(s[b], steep, i + 16 * b, n + lane_column(), EDGE);
      if constexpr (EDGE) hide<false>(s[b], i + 16 * b, n + lane_column(), e, a.before, a.after);
    }
    weigh(s);
    if constexpr (GENERAL) drop(s);
    const Held<N / 16, BLOCKS> p([&](uint32_t (&r)[4], int b, int step) { fragment_of<T>(r, s[b], step); });
    multiply_tile<T, N / 16>(out, p, Operand<BYTES, false, true>(keys + VALUES, 0, thread()));
    n = next;
    if constexpr (STAGES == 2) keys = other();
  }
  template <class Queries>
  __device__ __forceinline__ void walk(const Queries& q, int edges) {
    for (; edges > 0; --edges) step<true>(q);
    while (left > 0) step<false>(q);
  }

  /// Writes lse and, through `room` (of this warp: its rows, as many as q's), out. `first`: the warp's first query.
  __device__ __forceinline__ void finish(uint32_t room) {
    const Work w(a, M, forgotten(static_cast<int>(blockIdx.x)));
    const Extent& e = w.e;
    const int first = w.first + thread() / 32 * 16 * BLOCKS, i = first + lane_row();
    const int64_t row = row_of(a, e, w.p.head) + i;
    bool nan = false;
    FASTLM_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
      FASTLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = 16 * b + 8 * half;
        const float sum = warp_reduce<4>(weight[b][half], Sum{});
        if (lane_column() == 0 && i + r < e.len_q)
          a.lse[row + r] = sum == 0 ? -INF : (base[b][half] + log2f(sum)) * LN_2;
        const float factor = sum == 0 ? 0.f : (GENERAL ? a.keep_factor : 1.f) / sum;
        FASTLM_UNROLL
        for (int x = 2 * half; x < W / 2; x += 4) {
          const float low = out[b][x] * factor, high = out[b][x + 1] * factor;
          nan |= low != low || high != high;
          store_shared(room + swizzled<BYTES>(lane_row() + r, x / 4) + 2 * lane_column(), pack2<T>(low, high));
        }
      }
    }
    __syncwarp();
    const int lane = thread() % 32;
    T* const to = rows_of(static_cast<T*>(a.out), a.out_at, e.batch, w.p.head, e.start_q + static_cast<int64_t>(first));
    FASTLM_UNROLL
    for (int r = lane / Rows::LANES; r < 16 * BLOCKS; r += 32 / Rows::LANES) {
      FASTLM_UNROLL
      for (int chunk = lane % Rows::LANES; chunk < W / 8; chunk += Rows::LANES) {
        if (first + r < e.len_q && 8 * chunk < a.width_v)
          store_words_global(to + r * a.out_at.row + 8 * chunk, load_shared(room + swizzled<BYTES>(r, chunk)));
      }
    }
    const bool hides = a.before || a.after || (GENERAL && (a.mask_kind != MaskKind::none || a.documents_q));
    if (!hides || !__ballot_sync(FULL, nan)) return;
    __syncwarp();
    for (int r = first; r < min_of(first + 16 * BLOCKS, e.len_q); ++r) repair_out<T>(a, e, w.p.head, r);
  }
};

template <class T, int VARIANT>
__device__ __forceinline__ void attention_forward(const AttentionArguments& a) {
  using Forward = AmpereForward<T, VARIANT>;
  using Rows = typename Forward::Rows;
  constexpr int M = Forward::M, N = Forward::N, BLOCKS = Forward::BLOCKS;
  const Work w(a, M, static_cast<int>(blockIdx.x));
  const Place& p = w.p;
  const Extent& e = w.e;
  const int first = w.first, kv_head = p.head / (a.heads / a.kv_heads);
  if (first >= e.len_q) return;
  const General general(a, e, p.head);

  // The tiles at the edges first, then the middle: n goes up and starts over at low.
  Range range = seen_range<M, N>(first, e.len_q, e.len_k, a.before, e.before, a.after, e.after);
  if (Forward::GENERAL && a.documents_q)
    range = narrowed<N>(range, a.ranges + (static_cast<int64_t>(p.batch) * a.tiles + p.tile) * 4);
  const int behind = max_of(range.middle, range.end);
  const int edges =
      max_of(min_of(range.middle, range.high) - range.low + N - 1, 0) / N + max_of(range.high - behind + N - 1, 0) / N;
  const int inner = max_of(range.end - range.middle, 0) / N;

  const int warp_row = thread() / 32 * 16 * BLOCKS, i = first + warp_row + lane_row();
  const T *const q = static_cast<const T*>(a.q), *const k = static_cast<const T*>(a.k);
  Forward f{a,
            e,
            general,
            {rows_of(k, a.k_at, e.batch, kv_head, e.start_k), a.k_at.row, e.len_k, a.d},
            {rows_of(static_cast<const T*>(a.v), a.v_at, e.batch, kv_head, e.start_k), a.v_at.row, e.len_k, a.width_v},
            row_of(a, e, p.head) + i,
            i,
            range.low,
            range.high,
            behind < range.high ? behind : range.low,
            edges + inner,
            Forward::queries() + M * BYTES};
  Rows(rows_of(q, a.q_at, e.batch, p.head, e.start_q), a.q_at.row, e.len_q, a.d)
      .template copy<M, true>(Forward::queries(), first);
  copy_commit();
  if (f.left > 0) {
    f.k.template copy<N, true>(f.keys, f.n);
    if constexpr (Forward::TILE.stages == 2) f.v.template copy<N, true>(f.keys + Forward::VALUES, f.n);
  }
  copy_commit();
  f.start(a.sinks ? a.sinks + p.head : nullptr);
  const Operand<BYTES, true, false> queries(Forward::queries(), warp_row);
  // Queries stay in registers where out, logits and they leave room for all else.
  if constexpr (BLOCKS * (W / 2 + N / 2 + W / 4) <= (Forward::GENERAL ? 128 : 176)) {
    copy_wait<1>();
    __syncthreads();
    f.walk(Held<W / 16, BLOCKS>([&](uint32_t (&r)[4], int b, int step) { queries.load(r, b, step); }), edges);
  } else {
    f.walk(queries, edges);
  }
  copy_wait<0>();
  __syncthreads();
  f.finish(Forward::queries() + warp_row * BYTES);
}

/// Of a multiprocessor: what registers give.
constexpr int blocks_of(int variant) {
  const AttentionTile tile = ampere_forward(W).rows[variant];
  return tile.warps > 4 ? 1 : tile.general && W <= 64 ? 3 : 2;
}
#define FASTLM_FORWARD(variant)                                                                                    \
  FASTLM_KERNEL(attention_ampere_forward, variant, 32 * ampere_forward(W).rows[variant].warps, blocks_of(variant), \
                AttentionArguments, attention_forward<Scalar, variant>)
FASTLM_FORWARD(0)
FASTLM_FORWARD(1)
#if FASTLM_HEAD_DIM >= 128
FASTLM_FORWARD(2)
#endif

}  // namespace fastlm::cuda

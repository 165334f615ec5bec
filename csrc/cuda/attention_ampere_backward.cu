// attention, backward, by mma.sync: sm_80, and whatever has no path of its own.
//
// Floor: 5 products of M x N x W for each pair of tiles that see each other, 10 S T D operations a head (half of them
// where causal), and q, k, v, dout, dq, dk, dv once over the memory bus; the tensor cores are the bound from a few
// hundred rows on. Beside them shared memory is: a tile of 64 x 128 at 128 columns reads 576 KiB of operands and so
// takes 4608 cycles of it and 5120 of the tensor cores of an A100. Hence the parts of warps are as square as can be.
//
// A block holds the keys and values of a tile in shared memory and their gradients in registers, and walks over the
// query heads that share them and the tiles of queries that see them: s = q k^T, p = exp2(s * factor - shift), dp =
// dout v^T, ds = p (dp - delta); p and ds go, rounded, through shared memory, because dv += p^T dout and dk += ds^T q
// want them transposed and parts of other shape; dq = ds k is added to float32 sums in memory, which finish() rounds.
// The next queries are copied meanwhile: all along where there is room for two tiles, else from where dk is done. No
// other product is computed twice, as it would be with kernels for keys and for queries apart (7 products).
//
// Sums are added in turn, so that every run gives the same bits (place_keys(), turn_of()); that costs one barrier a
// tile. Documents leave tiles out that positions do not: their turns are passed all the same, at the end.
//
// Sums of dq lie in blocks of 8 x 8 (ampere_dq_place()), so that what a warp adds at once is 256 bytes in a row: by
// rows of W it would be 8 lines of the cache.
//
// Registers (ptxas of CUDA 13.0, the most of sm_80 and sm_90, 255 is the limit; no spills there and on sm_120), the
// widest and the narrowest tile: 32 columns 168, 64: 255 (128 x 128) and 205, 96: 239 and 164, 128: 255 and 181, 192:
// 214 and 199, 256: 251 and 238. At first 64 and 128 columns spilled 332 and 204 bytes. What cost them, in this order:
// addresses of operands computed ahead of the loop (thread_here()), the block's own numbers (they are in shared memory
// now), offsets of rows added before the swizzle instead of behind it, where they are part of the instruction. Counters
// that are divided by the number of tiles instead of carried along took 2 registers less and 200 instructions of 1450 a
// tile more. 64 x 96 at 192 columns, which sm_90 has room for, spill 8 bytes. Three loops, for edges and the middle,
// are one with a branch: the masks are a small part here.
//
// None of this has run on a GPU: numbers are those of the emulation, registers those of the compiler.
#include "cuda/attention_ampere.h"
#include "cuda/attention_weights.cuh"

namespace fastlm::cuda {

constexpr int W = FASTLM_HEAD_DIM, BYTES = 2 * W;  // of a row of q, k, v and dout in shared memory

/// Where a block stands.
struct Standing {
  Place place;
  int first;  // of the keys
  Extent e;
  Range seen, r;  // the queries that see them: by positions alone, and by documents
};

template <class T, int VARIANT>
struct AmpereBackward {
  static constexpr AttentionTile TILE = ampere_backward(W).rows[VARIANT];
  static constexpr int M = TILE.m, N = TILE.n, STAGES = TILE.stages, WARPS = TILE.warps, THREADS = 32 * WARPS;
  static constexpr bool GENERAL = TILE.general;
  using Rows = HeadRows<T, W, THREADS>;
  using Numbers = QueryNumbers<M, GENERAL>;
  using Weights = Part<M, N, WARPS>;  // p, ds
  using Keys = Part<N, W, WARPS>;     // dk, dv
  using Queries = Part<M, W, WARPS>;  // dq
  // Where what lies in shared memory.
  static constexpr int K = 0, V = K + N * BYTES, Q = V + N * BYTES, DOUT = Q + STAGES * M * BYTES,
                       P = DOUT + STAGES * M * BYTES, DS = P + 2 * M * N, ROWS = DS + 2 * M * N,
                       STANDING = ROWS + 2 * Numbers::BYTES;
  static_assert(sizeof(Standing) <= BACKWARD_STANDING && STANDING + BACKWARD_STANDING == TILE.shared,
                "what the launcher asks for");

  const AttentionArguments& a;
  const Standing& at;
  const Extent& e;
  const Range& r;
  float dk[Keys::BLOCKS][Keys::NUMBERS] = {}, dv[Keys::BLOCKS][Keys::NUMBERS] = {};

  /// What the whole block is about is in shared memory: all registers there are go to sums.
  __device__ __forceinline__ AmpereBackward(const AttentionArguments& a)
      : a(a), at(*shared<Standing>(STANDING)), e(at.e), r(at.r) {
    if (threadIdx.x == 0) {
      const Place p = place_keys(a, atomicAdd(a.turns, 1));
      Standing here{p, p.tile * N, extent(a, p.batch), {}, {}};
      here.seen = here.r =
          seen_range<N, M>(here.first, here.e.len_k, here.e.len_q, a.after, here.e.after, a.before, here.e.before);
      if (GENERAL && a.documents_q)
        here.r = narrowed<M>(here.seen, a.ranges + (static_cast<int64_t>(here.e.batch) * a.tiles + p.tile) * 4);
      *shared<Standing>(STANDING) = here;
    }
    __syncthreads();
  }

  /// Over the group's heads, and in each over the tiles of queries.
  struct Step {
    int head, m;
  };
  __device__ __forceinline__ int group() const { return a.heads / a.kv_heads; }
  __device__ __forceinline__ int tiles() const { return max_of(r.high - r.low + M - 1, 0) / M; }
  __device__ __forceinline__ Step after(Step s) const {
    return s.m + M < r.high ? Step{s.head, s.m + M} : Step{s.head + 1, r.low};
  }
  __device__ __forceinline__ Step before(Step s) const {
    return s.m > r.low ? Step{s.head, s.m - M} : Step{s.head - 1, r.low + (tiles() - 1) * M};
  }

  static __device__ __forceinline__ uint32_t memory() { return shared_address(shared<char>()); }
  __device__ __forceinline__ int turn_at(int m) const { return turn_of<M, N>(a, e, at.place.tile, m / M); }
  __device__ __forceinline__ int* turn(Step s) const {
    return a.turns + 1 + sum_tile<M>(a, e, at.place.batch, s.head, s.m / M);
  }

  __device__ __forceinline__ void copy_keys() const {
    const int64_t row = e.start_k + static_cast<int64_t>(at.first);
    Rows(rows_of(static_cast<const T*>(a.k), a.k_at, e.batch, at.place.head, row), a.k_at.row, e.len_k - at.first, a.d)
        .template copy<N, true>(memory() + K, 0);
    Rows(rows_of(static_cast<const T*>(a.v), a.v_at, e.batch, at.place.head, row), a.v_at.row, e.len_k - at.first,
         a.width_v)
        .template copy<N, true>(memory() + V, 0);
  }
  __device__ __forceinline__ Numbers numbers(int parity) const {
    return {shared<float>(ROWS + parity * Numbers::BYTES)};
  }
  __device__ __forceinline__ float load_number(Step step) const { return Numbers::load(a, e, step.head, step.m); }
  /// To `stage` bytes behind the start of their room.
  __device__ __forceinline__ void copy_queries(Step step, uint32_t stage) const {
    Rows(rows_of(static_cast<const T*>(a.q), a.q_at, e.batch, step.head, e.start_q), a.q_at.row, e.len_q, a.d)
        .template copy<M, true>(memory() + Q + stage, step.m);
    Rows(rows_of(static_cast<const T*>(a.dout), a.dout_at, e.batch, step.head, e.start_q), a.dout_at.row, e.len_q,
         a.width_v)
        .template copy<M, true>(memory() + DOUT + stage, step.m);
    copy_commit();
  }

  /// From the products s = q k^T and dp = dout v^T to the weights and the gradients of the logits, rounded, in shared
  /// memory.
  __device__ __forceinline__ void weigh(float (&s)[Weights::BLOCKS][Weights::NUMBERS],
                                        float (&dp)[Weights::BLOCKS][Weights::NUMBERS], Step step,
                                        const Numbers& numbers) const {
    const int m = step.m, pair = 2 * (thread_here() % 4);
    const bool edge = m < r.middle || m >= r.end || at.first + N > e.len_k;
    FASTLM_UNROLL
    for (int block = 0; block < Weights::BLOCKS; ++block) {
      const int row = Weights::row() + 16 * block + thread_here() % 32 / 4;
      weigh_fragment<GENERAL, GENERAL>(s[block], dp[block], a, e, step.head, m + row,
                                       at.first + Weights::column() + pair, edge, numbers.at(row));
      FASTLM_UNROLL
      for (int n = 0; n < Weights::NUMBERS; n += 2) {
        const int to = swizzled<2 * N>(fragment_row(row, n), Weights::column() / 8 + n / 4) + 2 * pair;
        store_shared(memory() + P + to, pack2<T>(s[block][n], s[block][n + 1]));
        store_shared(memory() + DS + to, pack2<T>(dp[block][n], dp[block][n + 1]));
      }
    }
  }

  __device__ __forceinline__ void add_queries(const float (&dq)[Queries::BLOCKS][Queries::NUMBERS], Step step) const {
    float* const sum = a.dq_sum + sum_tile<M>(a, e, at.place.batch, step.head, step.m / M) * (M * W) +
                       ampere_dq_place(W, Queries::row(), Queries::column()) + 2 * (thread_here() % 32);
    FASTLM_UNROLL
    for (int block = 0; block < Queries::BLOCKS; ++block) {
      FASTLM_UNROLL
      for (int n = 0; n < Queries::NUMBERS; n += 2) {
        add_global(sum + ampere_dq_place(W, fragment_row(16 * block, n), fragment_column(0, n)), dq[block][n],
                   dq[block][n + 1]);
      }
    }
  }

  __device__ __forceinline__ void walk() {
    const int steps = group() * tiles();
    if (steps > 0) {
      copy_keys();
      Step step{at.place.head * group(), r.low};
      copy_queries(step, 0);
      numbers(0).store(load_number(step), a, e, step.head, step.m);
      for (int count = 0; count < steps; ++count, step = after(step)) {
        const int parity = count % 2;
        const uint32_t stage = STAGES == 2 ? parity * M * BYTES : 0, q = memory() + Q + stage;
        const uint32_t dout = memory() + DOUT + stage;
        const bool more = count + 1 < steps;
        copy_wait<0>();
        __syncthreads();
        if (count > 0) pass(before(step));
        if (STAGES == 2 && more) copy_queries(after(step), M * BYTES - stage);
        {
          float s[Weights::BLOCKS][Weights::NUMBERS] = {}, dp[Weights::BLOCKS][Weights::NUMBERS] = {};
          multiply_tile<T, W / 16>(s, Operand<BYTES, true, false>(q, Weights::row()),
                                   Operand<BYTES, false, false>(memory() + K, Weights::column()));
          multiply_tile<T, W / 16>(dp, Operand<BYTES, true, false>(dout, Weights::row()),
                                   Operand<BYTES, false, false>(memory() + V, Weights::column()));
          weigh(s, dp, step, numbers(parity));
        }
        const float number = more ? load_number(after(step)) : 0;
        __syncthreads();
        multiply_tile<T, M / 16>(dv, Operand<2 * N, true, true>(memory() + P, Keys::row()),
                                 Operand<BYTES, false, true>(dout, Keys::column()));
        multiply_tile<T, M / 16>(dk, Operand<2 * N, true, true>(memory() + DS, Keys::row()),
                                 Operand<BYTES, false, true>(q, Keys::column()));
        if (more) numbers(parity ^ 1).store(number, a, e, after(step).head, after(step).m);
        if constexpr (STAGES == 1) {
          __syncthreads();
          if (more) copy_queries(after(step), 0);
        }
        float dq[Queries::BLOCKS][Queries::NUMBERS] = {};
        multiply_tile<T, N / 16>(dq, Operand<2 * N, true, false>(memory() + DS, Queries::row()),
                                 Operand<BYTES, false, true>(memory() + K, Queries::column()));
        if (a.ordered) {
          if (thread_here() == 0) await_turn(turn(step), turn_at(step.m));
          __syncthreads();
        }
        add_queries(dq, step);
      }
      __syncthreads();
      pass(before(step));
    }
    if (GENERAL && a.documents_q && a.ordered) skip();
  }
  /// The turn at a tile of queries to which all of this block have added, a barrier ago.
  __device__ __forceinline__ void pass(Step step) const {
    if (a.ordered && thread_here() == 0) pass_turn(turn(step), turn_at(step.m) + 1);
  }
  /// Turns at tiles of queries to which documents leave nothing to add.
  __device__ __forceinline__ void skip() const {
    const int end = r.low + tiles() * M;
    for (int member = 0; member < group(); ++member) {
      const int head = at.place.head * group() + member;
      for (int m = at.seen.low + M * static_cast<int>(threadIdx.x); m < at.seen.high; m += M * THREADS) {
        if (m >= r.low && m < end) continue;
        await_turn(turn({head, m}), turn_at(m));
        pass_turn(turn({head, m}), turn_at(m) + 1);
      }
    }
  }

  /// Sums, rounded, through shared memory to the rows of `to`: nobody reads that memory any more.
  __device__ __forceinline__ void store(T* to, const Layout& layout, int width, uint32_t room, float factor,
                                        const float (&sums)[Keys::BLOCKS][Keys::NUMBERS]) const {
    FASTLM_UNROLL
    for (int block = 0; block < Keys::BLOCKS; ++block) {
      FASTLM_UNROLL
      for (int n = 0; n < Keys::NUMBERS; n += 2) {
        const int row = Keys::row() + 16 * block + fragment_row(lane_row(), n);
        store_shared(room + swizzled<BYTES>(row, Keys::column() / 8 + n / 4) + 2 * lane_column(),
                     pack2<T>(sums[block][n] * factor, sums[block][n + 1] * factor));
      }
    }
    __syncthreads();
    T* const rows = rows_of(to, layout, e.batch, at.place.head, e.start_k + static_cast<int64_t>(at.first));
    for (int c = static_cast<int>(threadIdx.x); c < N * W / 8; c += THREADS) {
      const int row = c / (W / 8), chunk = c % (W / 8);
      if (at.first + row < e.len_k && 8 * chunk < width)
        store_words_global(rows + row * layout.row + 8 * chunk, load_shared(room + swizzled<BYTES>(row, chunk)));
    }
  }
};

template <class T, int VARIANT>
__device__ __forceinline__ void attention_ampere_backward(const AttentionArguments& a) {
  using Kernel = AmpereBackward<T, VARIANT>;
  Kernel kernel(a);
  if (kernel.at.first >= kernel.e.len_k) return;
  kernel.walk();
  kernel.store(static_cast<T*>(a.dk), a.dk_at, a.d, Kernel::memory() + Kernel::K, a.scale, kernel.dk);
  kernel.store(static_cast<T*>(a.dv), a.dv_at, a.width_v, Kernel::memory() + Kernel::V, a.keep_factor, kernel.dv);
}

#define FASTLM_BACKWARD(variant)                                                                                       \
  FASTLM_KERNEL(attention_ampere_backward, variant, (AmpereBackward<Scalar, variant>::THREADS), 1, AttentionArguments, \
                attention_ampere_backward<Scalar, variant>)
FASTLM_BACKWARD(0)
FASTLM_BACKWARD(1)
#if FASTLM_HEAD_DIM != 32
FASTLM_BACKWARD(2)
#endif
#if FASTLM_HEAD_DIM == 256
FASTLM_BACKWARD(3)
#endif

}  // namespace fastlm::cuda

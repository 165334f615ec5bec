// attention: the gradient of a mask that is added, by mma.sync.
//
// Floor: the products q k^T and dout v^T of all tiles that see each other, 4 S T D operations a head, and dbias once
// over the memory bus; with one mask of S x T for all heads the products bound it from a few heads on.
//
// A block sums a tile of gradients of logits in registers: over the batches and heads that share the mask where it has
// queries and keys, else along the side that it has not, and then over that side of the tile, through shared memory. No
// atomics: every run gives the same bits. It copies all four tiles for each step and waits for them; other blocks of
// the multiprocessor compute meanwhile (3 or more with 64 columns, 2 with 128).
//
// Registers (ptxas of CUDA 13.0, no spills on sm_80, sm_90, sm_120): 168 up to 96 columns, 211 with 128, 110
// above, where tiles are 32 x 32. 3 blocks with 128 columns spill 20 bytes and would not fit into shared memory. Never
// run on a GPU.
#include "cuda/attention_ampere.h"
#include "cuda/attention_weights.cuh"

namespace fastlm::cuda {

constexpr int W = FASTLM_HEAD_DIM, BYTES = 2 * W;  // of a row of q, k, v and dout in shared memory
constexpr int BIAS_BLOCKS = W <= 96 ? 3 : 2;       // of a multiprocessor at once, at least, where it has 164 KB

template <class T>
struct AmpereBias {
  static constexpr AttentionTile TILE = ampere_bias(W).rows[0];
  static constexpr int M = TILE.m, N = TILE.n, WARPS = TILE.warps, THREADS = 32 * WARPS;
  using Rows = HeadRows<T, W, THREADS>;
  using Weights = Part<M, N, WARPS>;
  using Numbers = QueryNumbers<M, true>;
  static constexpr int Q = 0, DOUT = Q + M * BYTES, K = DOUT + M * BYTES, V = K + N * BYTES, NUMBERS = V + N * BYTES;
  static_assert(NUMBERS + Numbers::BYTES == TILE.shared, "what the launcher asks for");
  static_assert(2 * M <= THREADS, "a thread for each number");

  const AttentionBias& b;
  const AttentionArguments& a;
  float sums[Weights::BLOCKS][Weights::NUMBERS] = {};

  static __device__ __forceinline__ int row() { return Weights::row() + thread_here() % 32 / 4; }
  static __device__ __forceinline__ int column() { return Weights::column() + 2 * (thread_here() % 4); }

  __device__ __forceinline__ void copy(const Extent& e, int head, int m, int n) const {
    const uint32_t memory = shared_address(shared<char>());
    const int kv_head = head / (a.heads / a.kv_heads);
    Rows(rows_of(static_cast<const T*>(a.q), a.q_at, e.batch, head, 0), a.q_at.row, e.len_q, a.d)
        .template copy<M, true>(memory + Q, m);
    Rows(rows_of(static_cast<const T*>(a.dout), a.dout_at, e.batch, head, 0), a.dout_at.row, e.len_q, a.width_v)
        .template copy<M, true>(memory + DOUT, m);
    Rows(rows_of(static_cast<const T*>(a.k), a.k_at, e.batch, kv_head, 0), a.k_at.row, e.len_k, a.d)
        .template copy<N, true>(memory + K, n);
    Rows(rows_of(static_cast<const T*>(a.v), a.v_at, e.batch, kv_head, 0), a.v_at.row, e.len_k, a.width_v)
        .template copy<N, true>(memory + V, n);
    copy_commit();
  }

  /// Adds the gradients of the logits of queries m ... and keys n ... of a head.
  __device__ __forceinline__ void add(int batch, int head, int m, int n) {
    const Extent e = extent(a, batch);
    const Numbers numbers{shared<float>(NUMBERS)};
    copy(e, head, m, n);
    numbers.store(Numbers::load(a, e, head, m), a, e, head, m);
    copy_wait<0>();
    __syncthreads();
    float s[Weights::BLOCKS][Weights::NUMBERS] = {}, dp[Weights::BLOCKS][Weights::NUMBERS] = {};
    const uint32_t memory = shared_address(shared<char>());
    multiply_tile<T, W / 16>(s, Operand<BYTES, true, false>(memory + Q, Weights::row()),
                             Operand<BYTES, false, false>(memory + K, Weights::column()));
    multiply_tile<T, W / 16>(dp, Operand<BYTES, true, false>(memory + DOUT, Weights::row()),
                             Operand<BYTES, false, false>(memory + V, Weights::column()));
    FASTLM_UNROLL
    for (int block = 0; block < Weights::BLOCKS; ++block) {
      const int r = row() + 16 * block;
      weigh_fragment<true, false>(s[block], dp[block], a, e, head, m + r, n + column(), true, numbers.at(r));
      FASTLM_UNROLL
      for (int i = 0; i < Weights::NUMBERS; ++i) sums[block][i] += dp[block][i];
    }
    __syncthreads();  // the tiles have been read
  }

  /// The tile where queries and keys are kept.
  __device__ __forceinline__ void store(int64_t outer, int m, int n) const {
    FASTLM_UNROLL
    for (int block = 0; block < Weights::BLOCKS; ++block) {
      FASTLM_UNROLL
      for (int i = 0; i < Weights::NUMBERS; ++i) {
        const int r = m + fragment_row(row() + 16 * block, i), c = n + fragment_column(column(), i);
        if (r < a.len_q && c < a.len_k) a.dbias[(outer * a.len_q + r) * a.len_k + c] = sums[block][i];
      }
    }
  }
  /// Its sums over queries, or over keys: first a warp's, then of the warps that share a column, or a row.
  __device__ __forceinline__ void store_columns(int64_t outer, int n) const {
    float* const parts = shared<float>();
    FASTLM_UNROLL
    for (int i = 0; i < Weights::NUMBERS; ++i) {
      if (i & 2) continue;  // the row 8 below
      float sum = 0;
      FASTLM_UNROLL
      for (int block = 0; block < Weights::BLOCKS; ++block) sum += sums[block][i] + sums[block][i + 2];
      FASTLM_UNROLL
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += exchange(sum, lanes);
      if (thread_here() % 32 < 4) parts[Weights::row() / Weights::ROWS * N + fragment_column(column(), i)] = sum;
    }
    write<N, Weights::BY_ROWS>(parts, a.dbias + outer * a.len_k, n, a.len_k);
  }
  __device__ __forceinline__ void store_rows(int64_t outer, int m) const {
    float* const parts = shared<float>();
    FASTLM_UNROLL
    for (int block = 0; block < Weights::BLOCKS; ++block) {
      FASTLM_UNROLL
      for (int h = 0; h < 2; ++h) {
        float sum = 0;
        FASTLM_UNROLL
        for (int i = 2 * h; i < Weights::NUMBERS; i += 4) sum += sums[block][i] + sums[block][i + 1];
        sum = warp_reduce<4>(sum, Sum{});
        if (thread_here() % 4 == 0) parts[Weights::column() / Weights::COLUMNS * M + row() + 16 * block + 8 * h] = sum;
      }
    }
    write<M, Weights::BY_COLUMNS>(parts, a.dbias + outer * a.len_q, m, a.len_q);
  }
  template <int COUNT, int PARTS>
  __device__ __forceinline__ void write(const float* parts, float* to, int first, int length) const {
    __syncthreads();
    const int t = thread_here();
    if (t >= COUNT || first + t >= length) return;
    float sum = 0;
    FASTLM_UNROLL
    for (int part = 0; part < PARTS; ++part) sum += parts[part * COUNT + t];
    to[first + t] = sum;
  }
};

template <class T>
__device__ __forceinline__ void attention_ampere_bias(const AttentionBias& b) {
  using Kernel = AmpereBias<T>;
  constexpr int M = Kernel::M, N = Kernel::N;
  const AttentionArguments& a = b.call;
  const int64_t tiles = blockIdx.x / static_cast<unsigned>(b.tiles_n);
  const int64_t outer = tiles / b.tiles_m;
  const int n = static_cast<int>(blockIdx.x % static_cast<unsigned>(b.tiles_n)) * N;
  const int m = static_cast<int>(tiles % b.tiles_m) * M;
  const int batch = static_cast<int>(outer / b.kept_heads), head = static_cast<int>(outer % b.kept_heads);
  const Extent e = extent(a, batch);
  Kernel kernel{b, a};
  if (b.rows) {
    const Range r = seen_range<M, N>(m, e.len_q, e.len_k, a.before, e.before, a.after, e.after);
    if (!b.keys) {
      for (int step = r.low; step < r.high; step += N) kernel.add(batch, head, m, step);
      kernel.store_rows(outer, m);
      return;
    }
    const int steps = n >= r.low && n < r.high ? b.summed_batches * b.summed_heads : 0;
    for (int step = 0; step < steps; ++step)
      kernel.add(batch + step / b.summed_heads, head + step % b.summed_heads, m, n);
    kernel.store(outer, m, n);
  } else {
    const Range r = seen_range<N, M>(n, e.len_k, e.len_q, a.after, e.after, a.before, e.before);
    for (int step = r.low; step < r.high; step += M) kernel.add(batch, head, step, n);
    kernel.store_columns(outer, n);
  }
}

FASTLM_KERNEL(attention_ampere_bias, 0, AmpereBias<Scalar>::THREADS, BIAS_BLOCKS, AttentionBias,
              attention_ampere_bias<Scalar>)

}  // namespace fastlm::cuda

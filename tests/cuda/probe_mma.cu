// Products by fragments in the ways that kernels address them, and wrong ones, for test_mma.py. float32 has none.
#include "cuda/mma.cuh"

namespace fastlm::cuda {

struct ProbeArguments {
  const void* in;
  void* out;
  int64_t n;
};

#if FASTLM_DTYPE != 0

constexpr int M = 32, N = 32;  // of the product: two warps, 16 rows each

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x) / 32; }

/// ROWS rows of W bytes to shared memory at `to`; those from `there` on are zeros.
template <int W, int ROWS>
__device__ __forceinline__ void load_tile(uint32_t to, const char* from, int there) {
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * W / 16; i += static_cast<int>(blockDim.x)) {
    const int row = i / (W / 16), chunk = i % (W / 16);
    copy_async_or_zero(to + swizzled<W>(row, chunk), from + (row < there ? i * 16 : 0), row < there);
  }
}
template <int W>
__device__ __forceinline__ void fragment_a(uint32_t (&a)[4], uint32_t tile, int first_row, int k) {
  load_matrices(a, tile + swizzled<W>(first_row + lane_of() % 16, 2 * k + lane_of() / 16));
}
__device__ __forceinline__ void write_product(float* out, const float (&d)[4 * (N / 8)]) {
  for (int e = 0; e < 4 * (N / 8); ++e) {
    const int row = 16 * warp_of() + lane_of() / 4 + 8 * (e / 2 % 2),
              column = 8 * (e / 4) + 2 * (lane_of() % 4) + e % 2;
    out[row * N + column] = d[e];
  }
}

/// out = a b^T, a M x K, b N x K of which n rows are there.
template <int K>
__device__ void product_along(const ProbeArguments& p) {
  constexpr int W = 2 * K;
  const char* in = static_cast<const char*>(p.in);
  const uint32_t a_at = shared_address(shared<char>()), b_at = a_at + M * W;
  load_tile<W, M>(a_at, in, M);
  load_tile<W, N>(b_at, in + M * W, static_cast<int>(p.n));
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  float d[4 * (N / 8)] = {};
  for (int k = 0; k < K / 16; ++k) {
    uint32_t a[4], b[4];
    fragment_a<W>(a, a_at, 16 * warp_of(), k);
    for (int n = 0; n < N / 16; ++n) {
      load_matrices(b, b_at + swizzled<W>(16 * n + lane_of() % 8 + 8 * (lane_of() / 16), 2 * k + lane_of() / 8 % 2));
      mma<Scalar>(d, 2 * n, a, b[0], b[1]);
      mma<Scalar>(d, 2 * n + 1, a, b[2], b[3]);
    }
  }
  write_product(static_cast<float*>(p.out), d);
}

/// out = (a b^T rounded) v, a and b 32 x 32, v 32 x 32 of rows of W bytes: the fragments of one product are the next's.
template <int W>
__device__ void product_across(const ProbeArguments& p) {
  const char* in = static_cast<const char*>(p.in);
  const uint32_t a_at = shared_address(shared<char>()), b_at = a_at + M * 64, v_at = b_at + N * 64;
  load_tile<64, M>(a_at, in, M);
  load_tile<64, N>(b_at, in + M * 64, N);
  load_tile<W, N>(v_at, in + M * 64 + N * 64, N);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  float s[4 * (N / 8)] = {};
  for (int k = 0; k < 2; ++k) {
    uint32_t a[4], b[4];
    fragment_a<64>(a, a_at, 16 * warp_of(), k);
    for (int n = 0; n < N / 16; ++n) {
      load_matrices(b, b_at + swizzled<64>(16 * n + lane_of() % 8 + 8 * (lane_of() / 16), 2 * k + lane_of() / 8 % 2));
      mma<Scalar>(s, 2 * n, a, b[0], b[1]);
      mma<Scalar>(s, 2 * n + 1, a, b[2], b[3]);
    }
  }
  for (int block = 0; block < W / 64; ++block) {  // of 32 columns
    float d[4 * (N / 8)] = {};
    for (int k = 0; k < N / 16; ++k) {
      uint32_t a[4], v[4];
      fragment_of<Scalar>(a, s, k);
      for (int n = 0; n < N / 16; ++n) {
        load_matrices_transposed(v, v_at + swizzled<W>(16 * k + lane_of() % 16, 4 * block + 2 * n + lane_of() / 16));
        mma<Scalar>(d, 2 * n, a, v[0], v[1]);
        mma<Scalar>(d, 2 * n + 1, a, v[2], v[3]);
      }
    }
    write_product(static_cast<float*>(p.out) + block * M * N, d);
  }
}

/// A 16 x 16 tile through registers: out = in, or its transpose, block of 8 by block.
template <bool LOAD, bool STORE>
__device__ void round_trip(const ProbeArguments& p) {
  const uint32_t from = shared_address(shared<char>()), to = from + 512;
  store_shared(from + 16 * threadIdx.x, static_cast<const Words*>(p.in)[threadIdx.x]);
  __syncwarp();
  uint32_t r[4];
  const int place = 16 * lane_of();
  LOAD ? load_matrices_transposed(r, from + place) : load_matrices(r, from + place);
  STORE ? store_matrices_transposed(to + place, r) : store_matrices(to + place, r);
  __syncwarp();
  static_cast<Words*>(p.out)[threadIdx.x] = load_shared(to + place);
}

__device__ void misaligned_matrices(const ProbeArguments&) {
  uint32_t r[4];
  load_matrices(r, shared_address(shared<char>()) + 16 * threadIdx.x + (threadIdx.x == 7 ? 8 : 0));
}
__device__ void matrices_past_the_end(const ProbeArguments& p) {
  uint32_t r[4];
  load_matrices(r, shared_address(shared<char>()) + static_cast<uint32_t>(p.n));
}
/// A product that half of the warp does not reach.
__device__ void product_in_a_branch(const ProbeArguments&) {
  float d[4] = {};
  uint32_t a[4] = {};
  if (lane_of() < 16) mma<Scalar>(d, 0, a, 0u, 0u);
}
/// Blocks add in turn, or wait for one that comes behind them.
template <bool RIGHT>
__device__ void turns(const ProbeArguments& p) {
  int* turn = static_cast<int*>(p.out);
  const int mine = RIGHT ? atomicAdd(turn, 1) : static_cast<int>(gridDim.x - 1 - blockIdx.x);
  await_turn(turn + 1, mine);
  pass_turn(turn + 1, mine + 1);
}

FASTLM_KERNEL(probe_mma, 0, 64, 1, ProbeArguments, product_along<32>)
FASTLM_KERNEL(probe_mma, 1, 64, 1, ProbeArguments, product_along<64>)
FASTLM_KERNEL(probe_mma, 2, 64, 1, ProbeArguments, product_along<96>)
FASTLM_KERNEL(probe_mma, 3, 64, 1, ProbeArguments, product_along<128>)
FASTLM_KERNEL(probe_mma, 4, 64, 1, ProbeArguments, product_along<192>)
FASTLM_KERNEL(probe_mma, 5, 64, 1, ProbeArguments, product_along<256>)
FASTLM_KERNEL(probe_mma, 6, 64, 1, ProbeArguments, product_across<64>)
FASTLM_KERNEL(probe_mma, 7, 64, 1, ProbeArguments, product_across<128>)
FASTLM_KERNEL(probe_mma, 8, 64, 1, ProbeArguments, product_across<192>)
FASTLM_KERNEL(probe_mma, 9, 64, 1, ProbeArguments, product_across<512>)
FASTLM_KERNEL(probe_mma, 10, 32, 1, ProbeArguments, round_trip<false, false>)
FASTLM_KERNEL(probe_mma, 11, 32, 1, ProbeArguments, round_trip<true, true>)
FASTLM_KERNEL(probe_mma, 12, 32, 1, ProbeArguments, round_trip<true, false>)
FASTLM_KERNEL(probe_mma, 13, 32, 1, ProbeArguments, round_trip<false, true>)
FASTLM_KERNEL(probe_mma, 14, 32, 1, ProbeArguments, misaligned_matrices)
FASTLM_KERNEL(probe_mma, 15, 32, 1, ProbeArguments, matrices_past_the_end)
FASTLM_KERNEL(probe_mma, 16, 32, 1, ProbeArguments, product_in_a_branch)
FASTLM_KERNEL(probe_mma, 17, 32, 1, ProbeArguments, turns<true>)
FASTLM_KERNEL(probe_mma, 18, 32, 1, ProbeArguments, turns<false>)

#endif

/// swizzled(row, chunk) of every chunk of n rows.
template <int W>
__device__ void places(const ProbeArguments& p) {
  for (int i = 0; i < p.n * (W / 16); ++i) static_cast<int*>(p.out)[i] = swizzled<W>(i / (W / 16), i % (W / 16));
}
FASTLM_KERNEL(probe_mma, 20, 32, 1, ProbeArguments, places<32>)
FASTLM_KERNEL(probe_mma, 21, 32, 1, ProbeArguments, places<64>)
FASTLM_KERNEL(probe_mma, 22, 32, 1, ProbeArguments, places<128>)
FASTLM_KERNEL(probe_mma, 23, 32, 1, ProbeArguments, places<192>)
FASTLM_KERNEL(probe_mma, 24, 32, 1, ProbeArguments, places<256>)
FASTLM_KERNEL(probe_mma, 25, 32, 1, ProbeArguments, places<384>)
FASTLM_KERNEL(probe_mma, 26, 32, 1, ProbeArguments, places<512>)

}  // namespace fastlm::cuda

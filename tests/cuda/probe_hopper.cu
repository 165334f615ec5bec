// Products of warp groups, tiles by the copy engine and a pipeline of both, right and wrong, for test_hopper.py.
#include "cuda/hopper.cuh"

namespace fastlm::cuda {

struct TileArguments {
  TensorMap maps[3];
  float* out;
  int64_t n, fault;
};

#if FASTLM_DTYPE != 0

constexpr int K = 64;

__device__ __forceinline__ uint32_t tiles_at() { return (shared_address(shared<char>()) + 1023) & ~1023u; }

/// `columns` columns of `rows` rows as panels, by one thread; their bytes.
template <int SWIZZLE>
__device__ __forceinline__ int load_panels(uint32_t to, const TensorMap* map, uint32_t barrier, int rows, int columns) {
  const int panels = (columns + SWIZZLE / 2 - 1) / (SWIZZLE / 2);
  for (int i = 0; i < panels; ++i) tile_load(to + i * rows * SWIZZLE, map, barrier, i * SWIZZLE / 2, 0, 0, 0, 0);
  return panels * rows * SWIZZLE;
}

/// out = a b^T, a 64 x K and b N x K; "across": the tensor in memory is its transpose.
template <int N, int SWIZZLE, bool MIXED, bool A_ACROSS, bool B_ACROSS>
__device__ void product(const TileArguments& p) {
  const uint32_t a_at = tiles_at(), b_at = a_at + 64 * K * 2, barrier = b_at + 256 * K * 2;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int a = load_panels<SWIZZLE>(a_at, &p.maps[0], barrier, 64, 64);
    const int b = load_panels<SWIZZLE>(b_at, &p.maps[1], barrier, B_ACROSS ? K : N, B_ACROSS ? N : K);
    barrier_expect(barrier, a + b);
  }
  barrier_wait(barrier, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  // Of the next 16 of the sum: along the row, from panel to panel; or 16 rows on.
  const auto along = [](int k, int rows) { return k * 32 / SWIZZLE * rows * SWIZZLE + k * 32 % SWIZZLE; };
  const auto across = [](int k) { return 16 * k * SWIZZLE; };
  float d[N / 2];
  uint32_t a[K / 16][4];
  if (MIXED) {
    for (int k = 0; k < K / 16; ++k) {
      const int chunk = 2 * k + lane / 16;
      load_matrices(a[k], a_at + chunk / (SWIZZLE / 16) * 64 * SWIZZLE +
                              swizzled<SWIZZLE>(16 * warp + lane % 16, chunk % (SWIZZLE / 16)));
    }
  }
  warpgroup_fence();
  for (int k = 0; k < K / 16; ++k) {
    const uint64_t b = B_ACROSS ? descriptor_across<SWIZZLE>(b_at + across(k), K * SWIZZLE)
                                : descriptor_along<SWIZZLE>(b_at + along(k, N));
    if constexpr (MIXED) {
      multiply_mixed<Scalar, N, B_ACROSS>(d, a[k], b, k > 0);
    } else {
      const uint64_t left = A_ACROSS ? descriptor_across<SWIZZLE>(a_at + across(k), K * SWIZZLE)
                                     : descriptor_along<SWIZZLE>(a_at + along(k, 64));
      multiply_shared<Scalar, N, A_ACROSS, B_ACROSS>(d, left, b, k > 0);
    }
  }
  warpgroup_commit();
  warpgroup_wait<0>();
  ready(d);
  for (int i = 0; i < N / 2; ++i)
    p.out[(16 * warp + lane / 4 + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = d[i];
}

template <int N, int SWIZZLE>
__device__ void product_of(const TileArguments& p) {
  if (p.n == 0) product<N, SWIZZLE, false, false, false>(p);
  if (p.n == 1) product<N, SWIZZLE, false, false, true>(p);
  if (p.n == 2) product<N, SWIZZLE, false, true, false>(p);
  if (p.n == 3) product<N, SWIZZLE, false, true, true>(p);
  if (p.n == 4) product<N, SWIZZLE, true, false, false>(p);
  if (p.n == 5) product<N, SWIZZLE, true, false, true>(p);
}

/// A box of 64 x 3 x 2 x 2 x 2 numbers as it lies in shared memory, behind the first 512 bytes of out, which are copied
/// as they are; its corner is 8 less than the digits of n to the base 16.
__device__ void copies(const TileArguments& p) {
  constexpr int ROWS = 3 * 2 * 2 * 2, BYTES = ROWS * 128;
  const uint32_t tile = tiles_at(), plain = tile + BYTES, barrier = plain + 512;
  const auto corner = [&](int i) { return static_cast<int>(p.n >> 4 * i & 15) - 8; };
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
    prefetch(&p.maps[0]);
    tile_load(tile, &p.maps[0], barrier, corner(0), corner(1), corner(2), corner(3), corner(4));
    bulk_load(plain, p.out, 512, barrier);
    barrier_expect(barrier, BYTES + 512);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  Words* out = reinterpret_cast<Words*>(p.out) + 32;
  for (int i = static_cast<int>(threadIdx.x); i < (BYTES + 512) / 16; i += static_cast<int>(blockDim.x))
    out[i] = load_shared(tile + 16 * i);
}

enum Fault {
  NONE,
  NO_FENCE_ASYNC,
  FENCE_OF_ONE_THREAD,
  NO_INIT_DONE,
  PRODUCERS_PARITY,
  CONSUMERS_PARITY,
  TOO_FEW_BYTES,
  TOO_MANY_BYTES,
  NO_WAIT_FOR_EMPTY,
  NO_WAIT_FOR_FULL,
  RELEASED_BEFORE_THE_PRODUCT,
  TWO_ARRIVALS,
  NO_WARPGROUP_FENCE,
  NO_WARPGROUP_WAIT,
  SUMS_USED_TOO_EARLY,
  NO_BARRIER_BEFORE_STORE,
  NO_BULK_WAIT,
  NO_BULK_COMMIT,
  SOURCE_REUSED_TOO_EARLY,
  NAMED_BARRIER_OF_TOO_MANY,
  TOO_MANY_REGISTERS,
  MISALIGNED_TILE,
  MISALIGNED_OPERAND,
  BARRIER_OVERWRITTEN,
  NO_BARRIER_MADE,
  SUMS_WRITTEN_UNDER_WAY,
};

/// The sum over n tiles of a_i b_i^T, a_i and b_i 64 x 64: loaded by one thread into two stages, multiplied by a warp
/// group, stored as Scalar through shared memory by one thread, and added as float32 to out by another.
__device__ void pipeline(const TileArguments& p) {
  constexpr int STAGES = 2, TILE = 64 * 128, FULL_AT = STAGES * 2 * TILE + TILE + 64 * 64 * 4;
  const Fault fault = static_cast<Fault>(p.fault);
  const uint32_t base = tiles_at(), result = base + STAGES * 2 * TILE, sums = result + TILE;
  const auto full = [&](int stage) { return base + FULL_AT + 16 * stage; };
  const auto empty = [&](int stage) { return base + FULL_AT + 16 * stage + 8; };
  const int n = static_cast<int>(p.n), thread = static_cast<int>(threadIdx.x) % 128;
  if (threadIdx.x == 0 && fault != NO_BARRIER_MADE) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), 1);
    }
    if (fault != NO_INIT_DONE) barrier_init_done();
    if (fault == BARRIER_OVERWRITTEN) store_shared(full(1), 0u);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_down<24>();
    if (thread > 0) return;
    for (int i = 0; i < n; ++i) {
      const int stage = i % STAGES, round = i / STAGES;
      if (fault != NO_WAIT_FOR_EMPTY) barrier_wait(empty(stage), (round & 1) ^ (fault == PRODUCERS_PARITY ? 0 : 1));
      const uint32_t a = base + stage * 2 * TILE + (fault == MISALIGNED_TILE ? 128 : 0);
      barrier_expect(full(stage), 2 * TILE + (fault == TOO_FEW_BYTES ? -16 : fault == TOO_MANY_BYTES ? 16 : 0));
      tile_load(a, &p.maps[0], full(stage), 0, 64 * i, 0, 0, 0);
      tile_load(a + TILE, &p.maps[1], full(stage), 0, 64 * i, 0, 0, 0);
    }
    return;
  }
  fault == TOO_MANY_REGISTERS ? registers_up<256>() : registers_up<240>();
  if (threadIdx.x >= 256) return;  // there so that all registers are spoken for
  const int lane = thread % 32, warp = thread / 32;
  float d[32] = {};
  for (int i = 0; i < n; ++i) {
    const int stage = i % STAGES, round = i / STAGES;
    if (fault != NO_WAIT_FOR_FULL) barrier_wait(full(stage), (round & 1) ^ (fault == CONSUMERS_PARITY ? 1 : 0));
    const uint32_t a = base + stage * 2 * TILE + (fault == MISALIGNED_OPERAND ? 128 : 0);
    if (fault != NO_WARPGROUP_FENCE) warpgroup_fence();
    for (int k = 0; k < 4; ++k)
      multiply_shared<Scalar, 64>(d, descriptor_along<128>(a + 32 * k), descriptor_along<128>(a + TILE + 32 * k), true);
    if (fault == SUMS_WRITTEN_UNDER_WAY) d[0] = 0;
    warpgroup_commit();
    if (fault == RELEASED_BEFORE_THE_PRODUCT && thread == 0) barrier_arrive(empty(stage));
    if (fault == SUMS_USED_TOO_EARLY && i == n - 1) continue;
    if (fault != NO_WARPGROUP_WAIT) warpgroup_wait<0>();
    if (fault != RELEASED_BEFORE_THE_PRODUCT && thread == 0) barrier_arrive(empty(stage));
    if (fault == TWO_ARRIVALS && thread == 0) barrier_arrive(empty(stage));
  }
  for (int k = 0; k < 4; ++k) {
    uint32_t r[4];
    fragment_of<Scalar>(r, d, k);
    store_matrices(result + swizzled<128>(16 * warp + lane % 16, 2 * k + lane / 16), r);
  }
  for (int i = 0; i < 8; ++i)
    store_shared(sums + 16 * (128 * i + thread), {__float_as_uint(d[4 * i]), __float_as_uint(d[4 * i + 1]),
                                                  __float_as_uint(d[4 * i + 2]), __float_as_uint(d[4 * i + 3])});
  if (fault == SUMS_USED_TOO_EARLY) warpgroup_wait<0>();
  if (fault != NO_FENCE_ASYNC && (fault != FENCE_OF_ONE_THREAD || thread == 0)) fence_async();
  if (fault != NO_BARRIER_BEFORE_STORE) named_sync(1, fault == NAMED_BARRIER_OF_TOO_MANY ? 256 : 128);
  if (thread == (fault == NO_BARRIER_BEFORE_STORE ? 77 : 0)) {
    tile_store(&p.maps[2], result, 0, 0, 0, 0, 0);
    if (fault != NO_BULK_COMMIT) bulk_commit();
    bulk_add(p.out, sums, 64 * 64 * 4);
    if (fault != NO_BULK_COMMIT) bulk_commit();
    if (fault == SOURCE_REUSED_TOO_EARLY) store_shared(sums, 0u);
    if (fault != NO_BULK_WAIT) {
      bulk_wait_read<1>();
      bulk_wait<0>();
    }
  }
}

FASTLM_KERNEL(probe_hopper, 0, 128, 1, TileArguments, product_of<32, 128>)
FASTLM_KERNEL(probe_hopper, 1, 128, 1, TileArguments, product_of<64, 128>)
FASTLM_KERNEL(probe_hopper, 2, 128, 1, TileArguments, product_of<80, 128>)
FASTLM_KERNEL(probe_hopper, 3, 128, 1, TileArguments, product_of<96, 128>)
FASTLM_KERNEL(probe_hopper, 4, 128, 1, TileArguments, product_of<128, 128>)
FASTLM_KERNEL(probe_hopper, 5, 128, 1, TileArguments, product_of<176, 128>)
FASTLM_KERNEL(probe_hopper, 6, 128, 1, TileArguments, product_of<192, 128>)
FASTLM_KERNEL(probe_hopper, 7, 128, 1, TileArguments, product_of<256, 128>)
FASTLM_KERNEL(probe_hopper, 8, 128, 1, TileArguments, product_of<32, 64>)
FASTLM_KERNEL(probe_hopper, 9, 128, 1, TileArguments, product_of<64, 64>)
FASTLM_KERNEL(probe_hopper, 10, 128, 1, TileArguments, product_of<80, 64>)
FASTLM_KERNEL(probe_hopper, 11, 128, 1, TileArguments, product_of<96, 64>)
FASTLM_KERNEL(probe_hopper, 12, 128, 1, TileArguments, product_of<128, 64>)
FASTLM_KERNEL(probe_hopper, 13, 128, 1, TileArguments, product_of<176, 64>)
FASTLM_KERNEL(probe_hopper, 14, 128, 1, TileArguments, product_of<192, 64>)
FASTLM_KERNEL(probe_hopper, 15, 128, 1, TileArguments, product_of<256, 64>)
FASTLM_KERNEL(probe_hopper, 16, 384, 1, TileArguments, pipeline)
FASTLM_KERNEL(probe_hopper, 17, 128, 1, TileArguments, copies)

#endif

}  // namespace fastlm::cuda

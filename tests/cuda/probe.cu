// Kernels that are right or wrong in a known way, for test_emulation.py: does the emulation run the first in every
// order of threads and find the second?
#include "cuda/device.cuh"

namespace fastlm::cuda {

struct ProbeArguments {
  const void* in;
  void* out;
  int64_t n;
};

__device__ __forceinline__ const float* in_of(const ProbeArguments& a) { return static_cast<const float*>(a.in); }
__device__ __forceinline__ float* out_of(const ProbeArguments& a) { return static_cast<float*>(a.out); }

/// out = in backwards, through shared memory.
template <bool BARRIER>
__device__ void reverse(const ProbeArguments& a) {
  const int n = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  float* row = shared<float>();
  row[i] = in_of(a)[i];
  if (BARRIER) __syncthreads();
  out_of(a)[i] = row[n - 1 - i];
}

__device__ void barrier_of_one_warp(const ProbeArguments&) {
  if (threadIdx.x < 32) __syncthreads();
}
__device__ void barriers_in_two_branches(const ProbeArguments&) {
  if (threadIdx.x % 64 < 32) {
    __syncthreads();
  } else {
    __syncthreads_or(0);
  }
}
__device__ void shuffle_in_a_branch(const ProbeArguments& a) {
  float x = 1;
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(FULL, x, 1);
  out_of(a)[threadIdx.x] = x;
}
__device__ void shuffle_of_half_a_warp(const ProbeArguments& a) {
  out_of(a)[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.f, 1);
}
__device__ void read_past_the_end(const ProbeArguments& a) { out_of(a)[threadIdx.x] = in_of(a)[threadIdx.x + 1]; }
__device__ void shared_past_the_end(const ProbeArguments& a) {
  shared<float>()[threadIdx.x + 1] = 1;
  out_of(a)[threadIdx.x] = 1;
}
__device__ void misaligned_words(const ProbeArguments& a) {
  if (threadIdx.x == 0) store_words(out_of(a), load_words(in_of(a) + 1));
}
__device__ void shared_before_it_is_written(const ProbeArguments& a) {
  out_of(a)[threadIdx.x] = shared<float>()[threadIdx.x];
}

/// Every block of the cluster reads what its right neighbour wrote.
template <bool BARRIER>
__device__ void neighbours(const ProbeArguments& a) {
  const int blocks = static_cast<int>(a.n), i = static_cast<int>(threadIdx.x);
  float* row = shared<float>();
  row[i] = in_of(a)[static_cast<int>(blockIdx.x) * blockDim.x + i];
  if (BARRIER) cluster_sync();
  out_of(a)[static_cast<int>(blockIdx.x) * blockDim.x + i] = cluster_peer(row, (cluster_rank() + 1) % blocks)[i];
  if (BARRIER) cluster_sync();
}

template <int GROUP>
__device__ void sums(const ProbeArguments& a) {
  const int i = static_cast<int>(threadIdx.x);
  const float sum = group_reduce<GROUP>(in_of(a)[i], Sum{}, shared<float>());
  const float most = group_reduce<GROUP>(in_of(a)[i], Max{}, shared<float>());
  out_of(a)[i] = sum;
  out_of(a)[blockDim.x + i] = most;
}

/// in rounded to Scalar and widened again, by words and one by one.
__device__ void round_trip(const ProbeArguments& a) {
  constexpr int STEP = WIDTH<Scalar>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * STEP;
  if (first >= a.n) return;
  float value[STEP];
  for (int i = 0; i < STEP; ++i) value[i] = in_of(a)[first + i];
  const Words words = pack<Scalar>(value);
  for (int i = 0; i < STEP; ++i) out_of(a)[a.n + first + i] = to_float(round_to<Scalar>(value[i]));
  unpack<Scalar>(words, value);
  for (int i = 0; i < STEP; ++i) out_of(a)[first + i] = value[i];
}

FASTLM_KERNEL(probe, 0, 256, 1, ProbeArguments, reverse<true>)
FASTLM_KERNEL(probe, 1, 256, 1, ProbeArguments, reverse<false>)
FASTLM_KERNEL(probe, 2, 256, 1, ProbeArguments, barrier_of_one_warp)
FASTLM_KERNEL(probe, 3, 256, 1, ProbeArguments, barriers_in_two_branches)
FASTLM_KERNEL(probe, 4, 256, 1, ProbeArguments, shuffle_in_a_branch)
FASTLM_KERNEL(probe, 5, 256, 1, ProbeArguments, shuffle_of_half_a_warp)
FASTLM_KERNEL(probe, 6, 256, 1, ProbeArguments, read_past_the_end)
FASTLM_KERNEL(probe, 7, 256, 1, ProbeArguments, shared_past_the_end)
FASTLM_KERNEL(probe, 8, 256, 1, ProbeArguments, misaligned_words)
FASTLM_KERNEL(probe, 9, 256, 1, ProbeArguments, shared_before_it_is_written)
FASTLM_KERNEL(probe, 10, 256, 1, ProbeArguments, neighbours<true>)
FASTLM_KERNEL(probe, 11, 256, 1, ProbeArguments, neighbours<false>)
FASTLM_KERNEL(probe, 12, 256, 1, ProbeArguments, sums<8>)
FASTLM_KERNEL(probe, 13, 256, 1, ProbeArguments, sums<32>)
FASTLM_KERNEL(probe, 14, 256, 1, ProbeArguments, sums<64>)
FASTLM_KERNEL(probe, 15, 256, 1, ProbeArguments, sums<256>)
FASTLM_KERNEL(probe, 16, 256, 1, ProbeArguments, round_trip)

}  // namespace fastlm::cuda

// The random bits of dropout on a GPU: those of csrc/cpu/random.h, which says what they are, bit for bit.
#pragma once
#include "cuda/device.cuh"

namespace fastlm::cuda {

/// Dropout of one row. threshold: plan.h's drop_threshold().
struct RowDropout {
  uint32_t low, high, threshold;
  float scale;

  __device__ __forceinline__ RowDropout(int64_t seed, int64_t row, uint32_t threshold, float scale)
      : threshold(threshold), scale(scale) {
    uint64_t z = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(row) + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    low = static_cast<uint32_t>(z);
    high = static_cast<uint32_t>(z >> 32);
  }
  __device__ __forceinline__ bool dropped(int64_t column) const {
    uint32_t u = low ^ (static_cast<uint32_t>(column) * 0x9e3779b1u);
    u = (u ^ (u >> 16)) * 0x7feb352du;
    u = ((u ^ (u >> 15)) + high) * 0x846ca68bu;
    return (u ^ (u >> 16)) < threshold;
  }
  /// x * scale where kept, 0 where dropped.
  __device__ __forceinline__ float operator()(float x, int64_t column) const {
    return dropped(column) ? 0.f : x * scale;
  }
};

}  // namespace fastlm::cuda

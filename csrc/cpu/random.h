// The random bits of dropout. Element (row, column) is dropped where hash(seed, row, column) < dropout * 2^32: a
// function of these numbers alone, so the backward, a recomputation, every instruction set, fastlm/reference/_random.py
// and kernels/_random.py make the same mask. Per row a 64-bit key (splitmix64, Steele et al. 2014), per element a
// 32-bit mix (lowbias32, Wellons) with the key's halves.
#pragma once
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

/// What the bits of a dropped element are below.
inline uint32_t drop_threshold(double dropout) {
  const double t = dropout * 0x1p32;
  return t >= 0x1p32 - 1 ? 0xffffffffu : static_cast<uint32_t>(t);
}

inline uint64_t row_key(int64_t seed, int64_t row) {
  uint64_t z = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(row) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

constexpr uint32_t COLUMN = 0x9e3779b1u;

/// low, high: the halves of the rows' keys, low ^ (column * COLUMN).
inline UInt random_bits(UInt low, UInt high) {
  UInt u = (low ^ (low >> 16)) * 0x7feb352du;
  u = (u ^ (u >> 15)) + high;
  u = u * 0x846ca68bu;
  return u ^ (u >> 16);
}

/// Dropout of one row, a vector at a time.
struct RowDropout {
  UInt low{}, high{}, columns{};
  uint32_t threshold = 0;
  float scale = 1.f;

  RowDropout(int64_t seed, double dropout, int64_t row)
      : threshold(drop_threshold(dropout)), scale(static_cast<float>(1 / (1 - dropout))) {
    const uint64_t key = row_key(seed, row);
    low += static_cast<uint32_t>(key);
    high += static_cast<uint32_t>(key >> 32);
    for (int i = 0; i < W; ++i) columns[i] = i;
  }
  /// x * scale where kept, 0 where dropped, for the columns from i on.
  Vec operator()(Vec x, int64_t i) const {
    const UInt column = columns + static_cast<uint32_t>(i);
    return random_bits(low ^ (column * COLUMN), high) < threshold ? Vec{} : x * scale;
  }
};

}  // namespace
}  // namespace fastlm::FASTLM_ISA

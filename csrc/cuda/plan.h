// What several launchers need to choose a grid. Plain C++.
#pragma once
#include <initializer_list>

#include "cuda/launch.h"
#include "cuda/row.h"

namespace fastlm::cuda {

constexpr int size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

/// Whether every address is a multiple of 16 bytes; null is.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/// The smallest power of two that is at least n; 1 for 0.
constexpr int64_t next_power_of_2(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

/// Threads of a block for this many: whole warps.
constexpr int64_t warps_of(int64_t threads) { return ceil_div(threads, 32) * 32; }

/// How rows of n elements of `size` bytes can be cut when a kernel goes along all these tensors at once.
inline Cut cut_of(int64_t n, int size, std::initializer_list<const void*> tensors,
                  std::initializer_list<int64_t> strides) {
  const int64_t width = 16 / size;
  const auto offset = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  const uintptr_t start = offset(*tensors.begin());
  const int64_t step = *strides.begin() % width;
  for (const void* p : tensors)
    if (offset(p) != start) return Cut::elements;
  for (int64_t stride : strides)
    if (stride % width != step) return Cut::elements;
  return start == 0 && step == 0 && n % width == 0 ? Cut::words : Cut::shifted;
}

/// The exponent of a power of two.
constexpr int log2_of(int64_t power) {
  int bits = 0;
  while (power > int64_t{1} << bits) ++bits;
  return bits;
}

/// What the random bits of an element are below where it is dropped: random.cuh.
inline uint32_t drop_threshold(double dropout) {
  const double t = dropout * 0x1p32;
  return t >= 0x1p32 - 1 ? 0xffffffffu : static_cast<uint32_t>(t);
}

}  // namespace fastlm::cuda

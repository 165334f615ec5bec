// What several launchers need to choose a grid. Plain C++.
#pragma once
#include "cuda/launch.h"

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

}  // namespace fastlm::cuda

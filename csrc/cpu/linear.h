// What the weight gradient of a linear layer is made of.
#pragma once
#include "fastlm.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

/// dW[N][K] = dy^T x over M rows.
template <class T>
struct WeightGradient {
  const T* dy;
  int64_t dy_stride;
  const T* x;
  int64_t x_stride, M, N, K;
};

}  // namespace
}  // namespace fastlm::FASTLM_ISA

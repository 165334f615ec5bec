// Element-wise kernels over rows: what elementwise.cuh and elementwise_plan.h share.
#pragma once
#include "cuda/divider.h"

namespace fastlm::cuda {

/// Inputs and outputs of rows; a unit is 16 bytes, or one element where memory does not allow that.
template <int IN, int OUT>
struct Elementwise {
  const void* in[IN];
  void* out[OUT];
  uint32_t in_row[IN];  // bytes between rows
  uint32_t out_row[OUT];
  Divider per_row;  // units of a row
  uint32_t units;   // of all rows
  uint32_t tail;    // elements behind the last unit, of an only row
};

constexpr int ELEMENTWISE_THREADS = 256;
/// Units of each tensor that a thread takes, all on their way at once.
template <int IN, bool WIDE>
constexpr int ELEMENTWISE_UNITS = WIDE ? (IN == 1 ? 2 : 1) : 4;

/// Instance of a kernel: the activation, and whether a unit is 16 bytes.
constexpr int elementwise_variant(Activation activation, bool wide) { return 2 * static_cast<int>(activation) + wide; }

}  // namespace fastlm::cuda

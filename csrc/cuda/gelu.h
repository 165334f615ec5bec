// gelu: what launcher and kernels share.
#pragma once
#include "common.h"

namespace fastlm::cuda {

struct GeluArguments {
  const void* x;
  const void* dy;  // backward only
  void* out;       // y, or dx
  int64_t n;
};

constexpr int GELU_THREADS = 256;
/// 16-byte accesses of a thread, all on their way at once.
constexpr int GELU_WORDS = 2;

/// Instance of a kernel: the activation, and whether every address is a multiple of 16 bytes.
constexpr int gelu_variant(Activation activation, bool aligned) {
  return 2 * (activation == Activation::gelu_tanh) + aligned;
}

}  // namespace fastlm::cuda

// How the copy engine of sm_90 sees a tensor: up to five dimensions, boxes of which it copies to shared memory.
#pragma once
#include "common.h"

namespace fastlm::cuda {

/// CUtensorMap, or what the emulation makes of it. Kernels take its address within their arguments.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

}  // namespace fastlm::cuda

// A number that the host knows and kernels divide by: a product and a shift, where a division takes 20 instructions.
#pragma once
#include "common.h"

namespace fastlm::cuda {

/// Of n in [0, 2^31), by d in [1, 2^31]: divide() in device.cuh. Granlund and Montgomery 1994, figure 4.1.
struct Divider {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divider() = default;
#ifndef __CUDACC_RTC__
  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((int64_t{1} << shift) < d) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
#endif
};

}  // namespace fastlm::cuda

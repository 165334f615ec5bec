// What the driver and the emulation have in common.
#include "cuda/launch.h"

#include <stdexcept>

namespace fastlm::cuda {

const char* name_of(DType dtype) {
  static const char* const names[DTYPES] = {"float32", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

void check_grid(const Kernel& kernel, int variant, const Grid& grid) {
  const auto refuse = [&](const std::string& what, int64_t value) {
    throw std::invalid_argument(std::string(kernel.name()) + "_" + std::to_string(variant) + ": " + what + ", got " +
                                std::to_string(value));
  };
  if (variant < 0 || variant >= MAX_VARIANTS) refuse("variant must be in [0, 64)", variant);
  if (grid.x < 0 || grid.x > 0x7fffffff) refuse("blocks must be in [0, 2^31)", grid.x);
  if (grid.y < 0 || grid.y > 65535) refuse("blocks along y must be in [0, 65535]", grid.y);
  if (grid.threads < 32 || grid.threads > 1024 || grid.threads % 32)
    refuse("threads must be 32, 64, ..., 1024", grid.threads);
  if (grid.cluster < 1 || grid.cluster > 8 || (grid.cluster & (grid.cluster - 1)))
    refuse("a cluster must be 1, 2, 4 or 8 blocks", grid.cluster);
  if (grid.x % grid.cluster) refuse("blocks must be a multiple of the cluster", grid.x);
  if (grid.shared < 0) refuse("shared memory must be at least 0 bytes", grid.shared);
}

}  // namespace fastlm::cuda

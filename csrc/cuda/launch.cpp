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

void check_tensor_map(DType dtype, const void* base, const std::array<int64_t, 5>& sizes,
                      const std::array<int64_t, 4>& strides, const std::array<int, 5>& box, int swizzle) {
  const auto refuse = [](const std::string& what, int64_t value) {
    throw std::invalid_argument("a tensor map: " + what + ", got " + std::to_string(value));
  };
  if (dtype == DType::float32) throw std::invalid_argument("a tensor map: the dtype must have 16 bits, got float32");
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base));
  if (address % 16) refuse("the address must be a multiple of 16 bytes", address);
  if (swizzle != 64 && swizzle != 128) refuse("the swizzle must be 64 or 128 bytes", swizzle);
  for (int i = 0; i < 5; ++i) {
    const std::string of = " of dimension " + std::to_string(i) + " must be ";
    if (sizes[i] < 1 || sizes[i] > int64_t{1} << 32) refuse("the size" + of + "in [1, 2^32]", sizes[i]);
    if (box[i] < 1 || box[i] > 256) refuse("the box" + of + "in [1, 256]", box[i]);
    if (i == 0 || sizes[i] == 1) continue;
    const int64_t stride = strides[i - 1];
    if (stride < 1 || stride % 8 || stride >= int64_t{1} << 39)
      refuse("the stride" + of + "a multiple of 8 elements in (0, 2^39)", stride);
  }
  if (box[0] % 8 || 2 * box[0] > swizzle)
    refuse("a row of the box must be a multiple of 8 elements within the swizzle", box[0]);
}

}  // namespace fastlm::cuda

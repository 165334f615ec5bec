// How a launcher starts a kernel: the waist between the plain C++ of csrc/cuda/*.cpp and what runs the kernels.
// driver.cpp implements it over the CUDA driver (libcuda, opened at run time: nothing here is linked to CUDA), and
// emulation/emulator.cpp over fibers on the CPU, for tests.
#pragma once
#include <array>
#include <atomic>
#include <functional>
#include <string>
#include <type_traits>

#include "common.h"
#include "cuda/tensor_map.h"

namespace fastlm::cuda {

constexpr int MAX_DEVICES = 16;
constexpr int MAX_VARIANTS = 64;
constexpr int DTYPES = 3;

/// What a plan may depend on.
struct Device {
  int arch;           // 80, 90, 100, ...
  int sms;            // streaming multiprocessors
  int64_t shared;     // bytes of shared memory a block can have
  int64_t shared_sm;  // bytes of shared memory of a multiprocessor
  int64_t l2;         // bytes of the L2 cache
};

/// Properties of the GPU of this index. Throws std::runtime_error where there is none.
const Device& device(int index);

struct Grid {
  int64_t x = 1;       // blocks; nothing is launched for 0
  int threads = 128;   // of a block: a multiple of 32
  int cluster = 1;     // blocks of a thread-block cluster, 1 for none; divides x; sm_90 and newer
  int64_t shared = 0;  // bytes of shared memory of a block
  int64_t y = 1;       // at most 65535
};

/// A tensor of a 16-bit dtype as the copy engine of sm_90 sees it: sizes in elements, innermost dimension first, which
/// is contiguous; strides in elements of the other four, that of a dimension of size 1 is not looked at; the box that
/// one copy takes; swizzle: bytes of a row of the box, 64 or 128 (mma.cuh's swizzled()). Throws std::invalid_argument
/// for what the engine does not take, std::runtime_error where the driver knows no such thing.
TensorMap tensor_map(DType dtype, const void* base, const std::array<int64_t, 5>& sizes,
                     const std::array<int64_t, 4>& strides, const std::array<int, 5>& box, int swizzle);

/// All instances of one kernel. csrc/cuda/<op>.cu defines an instance for each variant, a number below MAX_VARIANTS,
/// with FASTLM_KERNEL(name, variant, ...); the file is compiled once per dtype. `op` is the unit's name, which is the
/// file's but where fastlm/cuda/_sources.py compiles a file once for each head dimension:
/// "attention_hopper_forward_64".
///
///   static Kernel forward("gelu", "gelu_forward");
///   forward.launch(dtype, variant, Grid{blocks, 256}, GeluArguments{x, y, n}, device, stream);
class Kernel {
 public:
  constexpr Kernel(const char* op, const char* name) : op_(op), name_(name) {}

  /// Arguments: the struct that the kernel takes, passed by value (4 KiB at most).
  /// Throws std::invalid_argument for a grid that no GPU takes, std::runtime_error for what the driver refuses.
  template <class Arguments>
  void launch(DType dtype, int variant, const Grid& grid, const Arguments& arguments, int device, Stream stream) {
    static_assert(std::is_trivially_copyable<Arguments>::value && sizeof(Arguments) <= 4096, "passed by value");
    start(dtype, variant, grid, &arguments, sizeof arguments, device, stream);
  }

  const char* name() const { return name_; }

 private:
  void start(DType dtype, int variant, const Grid& grid, const void* arguments, size_t size, int device, Stream stream);

  const char* op_;
  const char* name_;
  std::atomic<void*> handles_[MAX_DEVICES][DTYPES][MAX_VARIANTS] = {};  // filled at the first launch of each
};

/// "bfloat16", as in the names of compiled files.
const char* name_of(DType dtype);

/// The launch whatever runs it: throws std::invalid_argument unless a GPU could take the grid.
void check_grid(const Kernel& kernel, int variant, const Grid& grid);

/// tensor_map() whoever makes it: throws std::invalid_argument unless the copy engine takes these.
void check_tensor_map(DType dtype, const void* base, const std::array<int64_t, 5>& sizes,
                      const std::array<int64_t, 4>& strides, const std::array<int, 5>& box, int swizzle);

/// The binary (cubin or fatbin) of a unit for a dtype and a GPU of this architecture and number.
using Loader = std::function<std::string(const std::string& op, const std::string& dtype, int arch)>;
void set_loader(Loader loader);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastlm::cuda

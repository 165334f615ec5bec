// Types that every C++ and CUDA file may use. No torch, no pybind11, no intrinsics, no header that NVRTC lacks.
#pragma once
#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
#else
#include <cstdint>
#endif

namespace fastlm {

/// Element type of a tensor, passed as a value: one switch per kernel instead of one symbol per dtype.
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

/// What gelu and glu apply.
enum class Activation : int32_t { silu = 0, gelu = 1, gelu_tanh = 2 };

/// A CUstream; 0 is the legacy default stream.
using Stream = uint64_t;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace fastlm

// Types and small helpers that every C++ file may use. No torch, no pybind11, no intrinsics.
#pragma once
#include <cstdint>

namespace fastlm {

/// Element type of a tensor, passed as a value: one switch per kernel instead of one symbol per dtype.
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

/// What gelu and glu apply.
enum class Activation : int32_t { silu = 0, gelu = 1, gelu_tanh = 2 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace fastlm

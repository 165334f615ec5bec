// How kernels over rows cut them, as the launchers choose it.
#pragma once
#include "common.h"

namespace fastlm::cuda {

/// A thread takes 16 bytes' worth of neighbouring elements at a time, a word, in one of these ways:
enum class Cut : int {
  elements,  // element by element: nothing is known of the addresses
  words,     // every row starts at a multiple of 16 bytes and is one long
  shifted,   // a row starts anywhere, though alike in all tensors: words lie between its first and last multiple
};

/// A block's share of a row_reduce at most, in values: 8 blocks of 32 warps.
constexpr int ROW_ROOM = 256;

}  // namespace fastlm::cuda

// softmax: what launcher and kernels share.
#pragma once
#include "cuda/row.h"

namespace fastlm::cuda {

struct SoftmaxArguments {
  const void* x;  // backward: dy
  const void* y;  // backward only
  void* out;      // y, or dx
  int64_t m, n;
  int64_t stride;  // between rows of x, or of dy; the others are contiguous
  int log;
  int lane_bits;  // 2^lane_bits lanes of a row, up to 32: few and many
  int cluster;    // blocks of a row: block and twice
  int stashed;    // words of a thread in shared memory: block
};

/// The forms of both kernels. Instance: 2 * form, + 1 where elements go one by one.
enum class SoftmaxForm : int {
  few,    // several rows a warp, up to a word of each a lane
  many,   // several rows a warp or one, several words a lane
  block,  // a row a block or cluster
  twice,  // a row a block or cluster, read twice
};

constexpr int SOFTMAX_THREADS = 128;  // of a block where a row is a warp's or less
/// Rows that a lane holds a word of: few.
template <bool BACKWARD>
constexpr int SOFTMAX_ROWS = BACKWARD ? 2 : 4;
/// Words of a row that a thread holds of each matrix: many and block.
template <bool BACKWARD>
constexpr int SOFTMAX_WORDS = BACKWARD ? 4 : 8;
/// Words of each matrix that a thread asks for at once: twice.
template <bool BACKWARD>
constexpr int SOFTMAX_BATCH = BACKWARD ? 2 : 4;

}  // namespace fastlm::cuda

// cross_entropy: what launchers and kernels share.
#pragma once
#include "common.h"

namespace fastlm::cuda {

struct CrossEntropyArguments {
  const void* x;          // (m, v) logits
  void* out;              // (m, v) their gradient, or null; may be x
  const int64_t* target;  // (m)
  const void* weight;     // (v) of weight_dtype, or null
  const float* dy;        // upstream gradient of each row, or null for 1
  float* loss;            // (m) or, reduced, (1); null: stats are read
  float* stats;           // (3, m): largest z, log of the sum of exp(z - largest), 1 - softmax(z)[target]
  float* scratch;         // cross_entropy_scratch below
  int64_t m, v, x_stride, out_stride, target_stride, dy_stride, ignore_index;
  float smoothing, share, z_loss, softcap;  // share: smoothing / v; softcap: 0 for none
  DType weight_dtype;
  bool mean, reduced;
  bool words;    // narrow: a lane's elements are words of 16 bytes
  bool aligned;  // and all of them lie on 16 bytes
  int partials;  // blocks of prepare, sums of each kind they left in scratch
  int group;     // narrow: log2 of the lanes of a row
  int parts;     // wide: blocks of a row
  int keep;      // wide: rounds whose logits stay in shared memory until their gradient is made
};

/// Scratch, in floats: a counter of blocks that have ended, the blocks' sums of the rows' weights and of the classes'
/// weights, the rows' losses or the sum of those of each block.
struct CrossEntropyScratch {
  static constexpr int MOST_PARTIALS = 128;
  static constexpr int ROW_WEIGHTS = 1, CLASS_WEIGHTS = ROW_WEIGHTS + MOST_PARTIALS,
                       LOSSES = CLASS_WEIGHTS + MOST_PARTIALS;
};

constexpr int CROSS_ENTROPY_PREPARE = 512;  // threads
constexpr int CROSS_ENTROPY_NARROW = 256;
constexpr int CROSS_ENTROPY_WIDE = 512;  // at most: 64, 128, 256 or 512
constexpr int CROSS_ENTROPY_SCALE = 256;

/// narrow: words of 16 bytes that a lane holds at most; its warp holds a row of 2 KB.
constexpr int CROSS_ENTROPY_WORDS = 4;
/// wide: words of 16 bytes that a thread works on at once, and how many times that many are on their way.
constexpr int CROSS_ENTROPY_ROUND = 2, CROSS_ENTROPY_STAGES = 3;
/// wide: shared memory before the logits, in bytes: the warps' sums, the block's, and a flag.
constexpr int CROSS_ENTROPY_ROOM = 256;

/// Instance: whether there is label smoothing or a softcap, and, narrow, whether a lane holds CROSS_ENTROPY_WORDS words
/// or one.
constexpr int cross_entropy_variant(bool general, bool long_row) { return 2 * general + long_row; }

}  // namespace fastlm::cuda

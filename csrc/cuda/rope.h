// rope: what launcher and kernels share.
#pragma once
#include "cuda/divider.h"

namespace fastlm::cuda {

constexpr int ROPE_THREADS = 256;
/// Heads of a thread at most: those that share its cosines and sines.
constexpr int ROPE_HEADS = 8;

/// How a kernel reads the tables: 0, 1, 2 element by element (the value of their dtype), or 16 bytes at a time.
constexpr int ROPE_WIDE_FLOAT32 = 3, ROPE_WIDE_SAME = 4;  // the dtype of q

struct RopeTensor {  // strides in elements
  const void* in;
  void* out;
  int64_t in_batch, in_head, in_position;
  int64_t out_batch, out_head, out_position;
  int32_t heads;
};

struct RopeArguments {
  RopeTensor x[2];  // q and k
  const void *cos, *sin;
  int64_t table_batch, table_position;
  int32_t table;      // how the tables are read
  float sign;         // of the sine
  Divider groups;     // of heads, the queries' before the keys'
  Divider positions;  // of a batch
  Divider units;      // of a position: two places each, of 16 bytes or of one element
  uint32_t threads;   // of one group
  uint32_t q_groups;
  int32_t group_heads;
  uint32_t turning;        // units that turn pairs; those behind them copy the channels from R on
  int32_t step, distance;  // between the first places of units that turn, between the two of a unit
  int32_t gap;             // between the two of a unit that copies
  int32_t R, D;
};

/// Instances: one element at a time, 16 bytes of pairs (i, i + R/2), 16 bytes of pairs (2i, 2i + 1).
constexpr int ROPE_SINGLES = 0, ROPE_HALVES = 1, ROPE_INTERLEAVED = 2;

}  // namespace fastlm::cuda

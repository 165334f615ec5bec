// layer_norm and rms_norm: what launchers and kernels share.
#pragma once
#include "common.h"

namespace fastlm::cuda {

/// 16-byte accesses of a thread to a row that is held in registers, and threads of such a row at most (of one block).
constexpr int NORM_WORDS = 4;
constexpr int NORM_GROUP = 512;
/// The same in the backward, where a thread also holds the parameters and sums of these columns.
constexpr int NORM_BACKWARD_WORDS = 2;
/// Threads of a block for one long row, for columns of it, and for the sum of the parts.
constexpr int NORM_LONG_THREADS = 512;
constexpr int NORM_COLUMN_THREADS = 256;
constexpr int NORM_PARTS_THREADS = 512;
/// Shared memory in which the threads of a row meet: bytes, a multiple of 16.
constexpr int NORM_ROOM = 512;
/// Threads of a multiprocessor in the backward, by registers.
constexpr int NORM_BACKWARD_RESIDENT = 512;

/// The threads of a row: 2^group_bits of a block, and those of 2^cluster_bits blocks.
struct NormTeam {
  int group_bits, cluster_bits;
};

struct NormForward {
  const void *x, *residual, *weight, *bias;  // residual, weight, bias: or null
  const int64_t* seed;                       // null: no dropout
  void *h, *y;
  float *mean, *rstd;  // mean: null for rms_norm
  int64_t x_stride, residual_stride, M, N;
  DType weight_dtype, bias_dtype;
  float eps, offset, scale;
  uint32_t threshold;
  NormTeam team;  // rows in registers
  int held;       // long rows: they stay in shared memory
};

struct NormBackward {
  const void *dy, *x, *weight, *dh;  // weight, dh: or null
  const float *mean, *rstd;          // mean: null for rms_norm
  const int64_t* seed;
  void *dx, *dresidual;              // dresidual: with a seed
  float *weight_parts, *bias_parts;  // [parts, N] each, or null
  int64_t dy_stride, x_stride, M, N;
  DType weight_dtype;
  float offset, scale;
  uint32_t threshold;
  NormTeam team;
  int stages;  // rows on their way to shared memory, 1 to 3
  int held;    // long rows: x and dy stay in shared memory
};

/// outputs[i] = the sum of the parts [i, parts, N].
struct NormParts {
  const float* parts;
  void* outputs[2];
  int64_t count, N;
  DType dtype;
};

}  // namespace fastlm::cuda

// adam: what launcher and kernels share.
#pragma once
#include "common.h"

namespace fastlm::cuda {

/// Rows of the table that adam_step gets, a column for each tensor (fastlm/_walk.py).
enum AdamRow {
  ADAM_SIZE,
  ADAM_STEP,
  ADAM_PARAM,
  ADAM_EXP_AVG,
  ADAM_EXP_AVG_SQ,
  ADAM_MAX_EXP_AVG_SQ,
  ADAM_MASTER,
  ADAM_SEED,
  ADAM_EXP_AVG_ABSMAX,
  ADAM_EXP_AVG_SQ_ABSMAX,
  ADAM_SHADOW,
  ADAM_ROWS
};

constexpr int ADAM_THREADS = 256;
/// Elements of a warp at a time, eight a lane: with 8-bit states those that share a scale.
constexpr int ADAM_TILE = 256;
constexpr int ADAM_LONG_CHUNK = 8192, ADAM_SHORT_CHUNK = 2048;  // elements of a block
constexpr int ADAM_BEGIN_THREADS = 128;
constexpr int ADAM_NORM_CHUNK = 16384;

/// A kernel's arguments are 4 KiB at most: the tables of as many tensors as fit travel in them.
constexpr int ADAM_WORDS = 502;

/// What begin works out for each tensor, in float32.
struct AdamScalars {
  float lr;            // over the first bias correction
  float inverse_root;  // 1 / sqrt(second bias correction)
  float decay;         // lr * weight_decay
  float grad_scale;    // below zero to maximise
  float step;
  float live;  // 0: found_inf was set, nothing is written
  float unused[2];
};

/// A number that may lie on the device.
struct AdamNumber {
  const void* at;  // float32 or float64, or null for value
  double value;
  int64_t is_double;
};

struct AdamBeginArguments {
  AdamScalars* scalars;
  AdamNumber lr, grad_scale, found_inf;
  double log_beta1, log_beta2, weight_decay;
  int32_t maximize, count;
  int64_t steps[384];
};

struct AdamArguments {
  const AdamScalars* scalars;  // of the first tensor of this launch
  float coupled_decay, one_minus_beta1, beta2, one_minus_beta2, eps;
  int32_t decoupled, count, chunk;
  int32_t max_exp_avg_sq, master, seed, exp_avg_absmax, exp_avg_sq_absmax, shadow;  // their rows in words, or -1
  int32_t first, shadow_dtype;
  /// Rows of `count` numbers: elements, gradients, parameters, moments, then what else there is; from row `first` on
  /// each tensor's first block, two numbers to a word.
  int64_t words[ADAM_WORDS];
};
static_assert(sizeof(AdamArguments) <= 4096 && sizeof(AdamBeginArguments) <= 4096, "passed by value");

struct AdamNormArguments {
  double* parts;  // of this launch
  int32_t count, unused;
  int64_t words[ADAM_WORDS];  // rows: elements, gradients, first blocks
};

struct AdamTotalArguments {
  const double* parts;
  double* result;
  int64_t count;
};

enum class AdamRounding { nearest, master, stochastic };

constexpr int adam_variant(AdamRounding rounding, bool wide_gradients) {
  return 2 * static_cast<int>(rounding) + wide_gradients;
}

/// Rows of AdamArguments::words that are always there.
enum { ADAM_WORD_SIZE, ADAM_WORD_GRAD, ADAM_WORD_PARAM, ADAM_WORD_EXP_AVG, ADAM_WORD_EXP_AVG_SQ, ADAM_WORD_ROWS };

}  // namespace fastlm::cuda

#include "cuda/adam.h"

#include <cmath>

#include "cuda/plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

Kernel begin("adam", "adam_begin"), step("adam", "adam_step"), codes("adam", "adam_codes");
Kernel squares("adam", "adam_squares"), total("adam", "adam_total");

/// Copies the rows of some tensors behind each other into a kernel's arguments.
class Words {
 public:
  Words(int64_t* words, int32_t count) : words_(words), count_(count) {}
  int32_t add(const int64_t* row) {
    for (int32_t t = 0; t < count_; ++t) words_[rows_ * count_ + t] = row[t];
    return rows_++;
  }
  /// The row of first blocks; returns how many blocks there are.
  int64_t add_blocks(const int64_t* sizes, int64_t chunk) {
    int64_t blocks = 0;
    for (int32_t t = 0; t < count_; ++t) {
      int64_t& word = words_[rows_ * count_ + t / 2];
      word = t % 2 ? static_cast<int64_t>(static_cast<uint64_t>(word) | static_cast<uint64_t>(blocks) << 32) : blocks;
      blocks += ceil_div(sizes[t], chunk);
    }
    ++rows_;
    return blocks;
  }

 private:
  int64_t* words_;
  int32_t count_;
  int32_t rows_ = 0;
};

/// How many tensors fit into a launch with this many rows beside the first blocks.
int64_t most_tensors(int rows) { return (2 * ADAM_WORDS - 1) / (2 * rows + 1); }

/// Long chunks spread a block's start over more, short ones spread few elements over the whole GPU.
int32_t choose_chunk(const int64_t* sizes, int64_t count, int sms) {
  int64_t elements = 0;
  for (int64_t t = 0; t < count; ++t) elements += sizes[t];
  return elements >= int64_t{16} * sms * ADAM_LONG_CHUNK ? ADAM_LONG_CHUNK : ADAM_SHORT_CHUNK;
}

double log_of(double beta) { return beta > 0 ? std::log(beta) : -HUGE_VAL; }

}  // namespace

void adam_step(DType dtype, DType grad_dtype, DType shadow_dtype, const int64_t* table, const int64_t* grads,
               int64_t count, void* scalars, double lr, const void* lr_at, bool lr_is_double, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, bool maximize, const void* grad_scale,
               bool grad_scale_is_double, const void* found_inf, bool found_inf_is_double, bool stochastic, int device,
               Stream stream) {
  if (count == 0) return;
  const auto row = [=](int r) { return table + r * count; };
  AdamScalars* const results = static_cast<AdamScalars*>(scalars);
  constexpr int64_t STEPS = sizeof(AdamBeginArguments::steps) / sizeof(int64_t);
  for (int64_t t = 0; t < count; t += STEPS) {
    AdamBeginArguments a{};
    a.scalars = results + t;
    a.lr = {lr_at, lr, lr_is_double};
    a.grad_scale = {grad_scale, 1, grad_scale_is_double};
    a.found_inf = {found_inf, 0, found_inf_is_double};
    a.log_beta1 = log_of(beta1);
    a.log_beta2 = log_of(beta2);
    a.weight_decay = weight_decay;
    a.maximize = maximize;
    a.count = static_cast<int32_t>(min(STEPS, count - t));
    for (int32_t i = 0; i < a.count; ++i) a.steps[i] = row(ADAM_STEP)[t + i];
    const Grid grid{ceil_div(a.count, ADAM_BEGIN_THREADS), ADAM_BEGIN_THREADS};
    begin.launch(dtype, 0, grid, a, device, stream);
  }

  // A row of addresses is 0 for all tensors or, those without elements left out, for none.
  const auto used = [&](int r) {
    for (int64_t t = 0; t < count; ++t) {
      if (row(r)[t] != 0) return true;
    }
    return false;
  };
  const bool eight_bits = used(ADAM_EXP_AVG_ABSMAX);
  const AdamRounding rounding = used(ADAM_MASTER) ? AdamRounding::master
                                : stochastic      ? AdamRounding::stochastic
                                                  : AdamRounding::nearest;
  int rows = ADAM_WORD_ROWS;
  const auto optional = [&](int r) { return used(r) ? (++rows, r) : -1; };
  const int peak = optional(ADAM_MAX_EXP_AVG_SQ), master = optional(ADAM_MASTER), shadow = optional(ADAM_SHADOW);
  const int seed = stochastic ? (++rows, ADAM_SEED) : -1;
  const int mean_max = optional(ADAM_EXP_AVG_ABSMAX), square_max = optional(ADAM_EXP_AVG_SQ_ABSMAX);
  const int32_t chunk = choose_chunk(table, count, cuda::device(device).sms);
  const int64_t most = most_tensors(rows);
  for (int64_t t = 0; t < count; t += most) {
    AdamArguments a{};
    a.scalars = results + t;
    a.coupled_decay = static_cast<float>(decoupled ? 0 : weight_decay);
    a.one_minus_beta1 = static_cast<float>(1 - beta1);
    a.beta2 = static_cast<float>(beta2);
    a.one_minus_beta2 = static_cast<float>(1 - beta2);
    a.eps = static_cast<float>(eps);
    a.decoupled = decoupled && weight_decay != 0;
    a.count = static_cast<int32_t>(min(most, count - t));
    a.chunk = chunk;
    a.shadow_dtype = static_cast<int32_t>(shadow_dtype);
    Words words(a.words, a.count);
    words.add(table + t);
    words.add(grads + t);
    for (int r : {ADAM_PARAM, ADAM_EXP_AVG, ADAM_EXP_AVG_SQ}) words.add(row(r) + t);
    const auto add = [&](int r) { return r < 0 ? int32_t{-1} : words.add(row(r) + t); };
    a.max_exp_avg_sq = add(peak);
    a.master = add(master);
    a.seed = add(seed);
    a.exp_avg_absmax = add(mean_max);
    a.exp_avg_sq_absmax = add(square_max);
    a.shadow = add(shadow);
    a.first = static_cast<int32_t>(rows);
    const Grid grid{words.add_blocks(table + t, chunk), ADAM_THREADS, 1,
                    eight_bits ? int64_t{512} * int64_t{sizeof(float)} : 0};
    const int variant = adam_variant(rounding, grad_dtype != dtype);
    (eight_bits ? codes : step).launch(dtype, variant, grid, a, device, stream);
  }
}

void adam_norm(DType dtype, const int64_t* grads, const int64_t* sizes, int64_t count, double* parts, double* result,
               int device, Stream stream) {
  constexpr int64_t SHARED = ADAM_THREADS / 32 * sizeof(double);
  const int64_t most = most_tensors(2);
  int64_t done = 0;
  for (int64_t t = 0; t < count; t += most) {
    AdamNormArguments a{};
    a.parts = parts + done;
    a.count = static_cast<int32_t>(min(most, count - t));
    Words words(a.words, a.count);
    words.add(sizes + t);
    words.add(grads + t);
    const int64_t blocks = words.add_blocks(sizes + t, ADAM_NORM_CHUNK);
    squares.launch(dtype, 0, Grid{blocks, ADAM_THREADS, 1, SHARED}, a, device, stream);
    done += blocks;
  }
  total.launch(dtype, 0, Grid{1, ADAM_THREADS, 1, SHARED}, AdamTotalArguments{parts, result, done}, device, stream);
}

}  // namespace fastlm::cuda

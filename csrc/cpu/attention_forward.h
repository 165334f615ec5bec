// What the forward items of attention share, whatever they multiply with: the running maximum, sum and output of a
// tile of queries (the online softmax), and how they end.
#pragma once
#include "attention_logits.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t CHUNK = ATTENTION_CHUNK;
constexpr float RESCALE = 8.f;

/// Running maximum and sum of 64 queries, and their outputs so far, transposed: [Dv][BQ].
struct Running {
  float *maximum, *total, *out;

  void start(int64_t Dv) {
    for (int64_t i = 0; i < BQ; ++i) maximum[i] = -INF, total[i] = 0.f;
    std::memset(out, 0, Dv * BQ * sizeof(float));
  }
};

/// The largest of x * scale down one vector's columns; four at a time, because a maximum waits for the one before.
inline Vec column_maximum(const float* x, int64_t keys, float scale) {
  Vec m[4] = {splat(-INF), splat(-INF), splat(-INF), splat(-INF)};
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4)
    for (int u = 0; u < 4; ++u) m[u] = vmax(load(x + (j + u) * BQ) * scale, m[u]);
  for (; j < keys; ++j) m[0] = vmax(load(x + j * BQ) * scale, m[0]);
  return vmax(vmax(m[0], m[1]), vmax(m[2], m[3]));
}

/// Takes a tile's maximum into the running one of vector n; `exponential` is e^x or 2^x, what logits are powers of.
/// Returns what to subtract from the logits.
template <class E>
inline Vec raise_maximum(Vec highest, float rescale, int n, Running& run, int64_t Dv, E exponential) {
  const Vec before = load(run.maximum + n * W);
  const Int grown = highest > before + rescale;
  Vec center = before;
  if (max(grown ? splat(1.f) : Vec{}) > 0.f) {
    center = grown ? highest : before;
    const Vec factor = grown ? exponential(before - highest) : splat(1.f);
    store(run.total + n * W, load(run.total + n * W) * factor);
    for (int64_t d = 0; d < Dv; ++d) store(run.out + d * BQ + n * W, load(run.out + d * BQ + n * W) * factor);
    store(run.maximum + n * W, center);
  }
  return center == splat(-INF) ? Vec{} : center;  // no key seen so far: every power is 0
}

/// What becomes of a row's sums: the factor of its output, and lse.
struct Ending {
  float factor, lse;

  Ending(const Problem& p, int64_t h, float total, float maximum, float keep_scale = 1.f)
      : factor(total == 0.f ? 0.f : keep_scale / total), lse(total == 0.f ? -INF : maximum + std::log(total)) {
    if (!p.options.sinks) return;
    const float sink = p.options.sinks[h], highest = sink > lse ? sink : lse;
    if (highest == -INF) return;
    const float keys = std::exp(lse - highest), all = keys + std::exp(sink - highest);
    factor *= keys / all;
    lse = highest + std::log(all);
  }
};

/// Output and lse of up to 64 queries; unit: the natural logarithm of what the logits are powers of.
template <class T>
void finish(const Problem& p, const Running& run, float keep_scale, float unit, void* out, const Strides& os,
            float* lse, int64_t b, int64_t h, int64_t i, int64_t rows) {
  float factor[BQ] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const Ending ending(p, h, run.total[r], run.maximum[r] * unit, keep_scale);
    factor[r] = ending.factor;
    lse[p.row(b, h, i + r)] = ending.lse;
  }
  Vec factors[NV];
  for (int n = 0; n < NV; ++n) factors[n] = load(factor + n * W);
  store_transposed(run.out, factors, rows, p.Dv, at<T>(out, os, b, h, i), os[2]);
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

// What the backward of attention reads and writes, shared by its forms.
#pragma once
#include "attention.h"

namespace fastlm::FASTLM_ISA {
namespace {

struct Gradients {
  const void *out, *dout;
  Strides os, gs;
  const float *lse, *dlse;  // dlse may be null
  void *dq, *dk, *dv;
  Strides dqs, dks, dvs;
};

/// lse and delta = rowsum(dO O) - dlse of up to 64 queries; lse is +inf for padding and for rows that saw no key: P is
/// 0 there.
template <class T>
void read_statistics(const Problem& p, const Gradients& grad, int64_t b, int64_t h, int64_t i, int64_t rows, float* lse,
                     float* delta) {
  const int64_t first = (b * p.H + h) * p.S + i;
  for (int64_t r = 0; r < BQ; ++r) {
    lse[r] = INF, delta[r] = 0.f;
    if (r >= rows || grad.lse[first + r] == -INF) continue;
    lse[r] = grad.lse[first + r];
    const T* const o = at<T>(grad.out, grad.os, b, h, i + r);
    const T* const g = at<T>(grad.dout, grad.gs, b, h, i + r);
    Vec total{};
    for_vectors(p.Dv, [&](int64_t d, auto n) { total += load(o + d, n) * load(g + d, n); });
    delta[r] = sum(total) - (grad.dlse ? grad.dlse[first + r] : 0.f);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

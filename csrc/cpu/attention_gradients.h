// What the backward of attention reads and writes, shared by its forms.
#pragma once
#include "attention_logits.h"

namespace fastlm::FASTLM_ISA {
namespace {

struct Gradients {
  const void *out, *dout;
  Strides os, gs;
  const float *lse, *dlse;  // dlse may be null
  void *dq, *dk, *dv;
  Strides dqs, dks, dvs;
};

/// Those of sequence n alone, as sequence<T>(p, n) is its problem; lse and dlse are counted by Problem::row().
template <class T>
inline Gradients sequence(const Problem& p, const Gradients& grad, int64_t n) {
  const int64_t i = Extent(p.options.cu_seqlens_q, n, p.S).first, j = Extent(p.options.cu_seqlens_k, n, p.T).first;
  Gradients one = grad;
  one.out = at<T>(grad.out, grad.os, 0, 0, i);
  one.dout = at<T>(grad.dout, grad.gs, 0, 0, i);
  one.dq = at<T>(grad.dq, grad.dqs, 0, 0, i);
  one.dk = at<T>(grad.dk, grad.dks, 0, 0, j);
  one.dv = at<T>(grad.dv, grad.dvs, 0, 0, j);
  return one;
}

/// lse and delta = rowsum(dO O) - dlse of up to 64 queries; lse is +inf for padding and for rows that saw no key: P is
/// 0 there.
template <class T>
void read_statistics(const Problem& p, const Gradients& grad, int64_t b, int64_t h, int64_t i, int64_t rows, float* lse,
                     float* delta) {
  const int64_t first = p.row(b, h, i);
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

// Gated linear units: silu, gelu or its tanh form of one half, times the other.
//   forward   y = act(gate) * up
//   backward  dgate = dy * up * act'(gate), dup = dy * act(gate), the activation computed again from gate
//   memory    forward reads gate and up and writes y; backward reads dy, gate and up and writes both gradients, once
//             each; gradients of a packed [gate | up] go straight into the packed tensor; outputs larger than the cache
//             are streamed past it
//   parallel  rows
//   paper     Shazeer 2020 (arXiv:2002.05202)
#include "activation.h"
#include "fastlm.h"
#include "parallel.h"

namespace fastlm::FASTLM_ISA {
namespace {

/// f(streamed, m) for every row, in shares.
template <class F>
void with_rows(int threads, bool large, int64_t M, int64_t N, F f) {
  parallel_for(threads, M, 1 + ACTIVATION_GRAIN / (N + 1), [=](int64_t begin, int64_t end) {
    with_flag(large, [=](auto streamed) {
      for (int64_t m = begin; m < end; ++m) f(streamed, m);
      if (streamed) stream_fence();
    });
  });
}

}  // namespace

void glu_forward(DType dtype, Activation activation, const void* gate, int64_t gate_stride, const void* up,
                 int64_t up_stride, void* y, int64_t M, int64_t N, int threads) {
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    with_activation<T>(activation, [=](auto act) {
      with_rows(threads, stream_ok<T, 2>(static_cast<T*>(y), M, N, N), M, N, [=](auto streamed, int64_t m) {
        const T* g = static_cast<const T*>(gate) + m * gate_stride;
        const T* u = static_cast<const T*>(up) + m * up_stride;
        T* out = static_cast<T*>(y) + m * N;
        map_row<2, 1, T>({g, u}, {out}, N, streamed,
                         [&](const Vec* x, Vec* y) { y[0] = act.template at<false>(x[0]).value * x[1]; });
      });
    });
  });
}

void glu_backward(DType dtype, Activation activation, const void* dy, int64_t dy_stride, const void* gate,
                  int64_t gate_stride, const void* up, int64_t up_stride, void* dgate, void* dup, int64_t out_stride,
                  int64_t M, int64_t N, int threads) {
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    with_activation<T>(activation, [=](auto act) {
      const bool large = stream_ok<T, 2>(static_cast<T*>(dgate), M, N, out_stride) &&
                         stream_ok<T, 2>(static_cast<T*>(dup), M, N, out_stride);
      with_rows(threads, large, M, N, [=](auto streamed, int64_t m) {
        const T* d = static_cast<const T*>(dy) + m * dy_stride;
        const T* g = static_cast<const T*>(gate) + m * gate_stride;
        const T* u = static_cast<const T*>(up) + m * up_stride;
        T* dg = static_cast<T*>(dgate) + m * out_stride;
        T* du = static_cast<T*>(dup) + m * out_stride;
        map_row<3, 2, T>({g, u, d}, {dg, du}, N, streamed, [&](const Vec* x, Vec* y) {
          const Activated a = act.template at<true>(x[0]);
          y[0] = x[2] * x[1] * a.slope;
          y[1] = x[2] * a.value;
        });
      });
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

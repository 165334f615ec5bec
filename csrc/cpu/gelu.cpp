// GELU, exact and in the tanh form.
//   forward   y = act(x), element by element
//   backward  dx = dy * act'(x), computed again from x
//   memory    forward reads x and writes y, backward reads x and dy and writes dx, once each; outputs larger than the
//             cache are streamed past it
//   parallel  equal shares of the elements
//   paper     Hendrycks and Gimpel 2016 (arXiv:1606.08415)
#include "activation.h"
#include "fastlm.h"
#include "parallel.h"

namespace fastlm::FASTLM_ISA {
namespace {

/// f(streamed, begin, end) over shares of the n elements of an output, each share a whole number of cache lines.
template <class T, class F>
void in_shares(int threads, const T* out, int64_t n, F f) {
  constexpr int64_t LINE = 64;
  const bool large = stream_ok(out, 1, n, 0);
  parallel_for(threads, ceil_div(n, LINE), ACTIVATION_GRAIN / LINE, [=](int64_t first, int64_t last) {
    with_flag(large, [=](auto streamed) {
      f(streamed, first * LINE, last * LINE < n ? last * LINE : n);
      if (streamed) stream_fence();
    });
  });
}

}  // namespace

void gelu_forward(DType dtype, Activation activation, const void* x, void* y, int64_t n, int threads) {
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    with_activation<T>(activation, [=](auto act) {
      in_shares(threads, out, n, [=](auto streamed, int64_t begin, int64_t end) {
        for_vectors(end - begin, [&](int64_t i, auto w) {
          put(out + begin + i, act.template at<false>(load(in + begin + i, w)).value, w, streamed);
        });
      });
    });
  });
}

void gelu_backward(DType dtype, Activation activation, const void* dy, const void* x, void* dx, int64_t n,
                   int threads) {
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    const T *grad = static_cast<const T*>(dy), *in = static_cast<const T*>(x);
    T* out = static_cast<T*>(dx);
    with_activation<T>(activation, [=](auto act) {
      in_shares(threads, out, n, [=](auto streamed, int64_t begin, int64_t end) {
        for_vectors(end - begin, [&](int64_t i, auto w) {
          const Vec slope = act.template at<true>(load(in + begin + i, w)).slope;
          put(out + begin + i, load(grad + begin + i, w) * slope, w, streamed);
        });
      });
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

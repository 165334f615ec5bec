// GELU, exact and in the tanh form.
//   forward   y = act(x), element by element
//   backward  dx = dy * act'(x), computed again from x
//   memory    forward reads x and writes y, backward reads x and dy and writes dx, once each; outputs larger than the
//             cache are streamed past it
//   parallel  equal shares of the elements
//   cost      instructions, not bandwidth: in AVX-512 a vector of 16 takes 34 forward and 36 backward in float32, 24
//   and
//             29 in bfloat16; with clamps in exp, two Newton steps and one vector at a time it took 50 and 60
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
  const bool large = stream_ok<T, 2>(out, 1, n, 0);
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
        map_row<1, 1, T>({in + begin}, {out + begin}, end - begin, streamed,
                         [&](const Vec* x, Vec* y) { y[0] = act.template at<false>(x[0]).value; });
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
        map_row<2, 1, T>({in + begin, grad + begin}, {out + begin}, end - begin, streamed,
                         [&](const Vec* x, Vec* y) { y[0] = x[1] * act.template at<true>(x[0]).slope; });
      });
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

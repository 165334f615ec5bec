// GELU, exact and in the tanh form.
//   forward   y = act(x), element by element
//   backward  dx = dy * act'(x), computed again from x
//   memory    forward reads x and writes y, backward reads x and dy and writes dx, once each
//   parallel  equal shares of the elements
//   paper     Hendrycks and Gimpel 2016 (arXiv:1606.08415)
#include "activation.h"
#include "fastlm.h"
#include "parallel.h"

namespace fastlm::FASTLM_ISA {

void gelu_forward(DType dtype, Activation activation, const void* x, void* y, int64_t n, int threads) {
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    with_activation<T>(activation, [=](auto act) {
      parallel_for(threads, n, ACTIVATION_GRAIN, [=](int64_t begin, int64_t end) {
        for_vectors(end - begin, [&](int64_t i, auto w) {
          store(out + begin + i, act.template at<false>(load(in + begin + i, w)).value, w);
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
      parallel_for(threads, n, ACTIVATION_GRAIN, [=](int64_t begin, int64_t end) {
        for_vectors(end - begin, [&](int64_t i, auto w) {
          const Vec slope = act.template at<true>(load(in + begin + i, w)).slope;
          store(out + begin + i, load(grad + begin + i, w) * slope, w);
        });
      });
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

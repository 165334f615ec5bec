#include "cuda/gelu.h"

#include "cuda/plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

Kernel forward("gelu", "gelu_forward"), backward("gelu", "gelu_backward");

void start(Kernel& kernel, DType dtype, Activation activation, const GeluArguments& a, int device, Stream stream) {
  const bool wide = aligned(a.x, a.dy, a.out);
  const int64_t block = GELU_THREADS * GELU_WORDS * (wide ? 16 / size_of(dtype) : 1);
  const Grid grid{ceil_div(a.n, block), GELU_THREADS};
  kernel.launch(dtype, gelu_variant(activation, wide), grid, a, device, stream);
}

}  // namespace

void gelu_forward(DType dtype, Activation activation, const void* x, void* y, int64_t n, int device, Stream stream) {
  start(forward, dtype, activation, {x, nullptr, y, n}, device, stream);
}

void gelu_backward(DType dtype, Activation activation, const void* dy, const void* x, void* dx, int64_t n, int device,
                   Stream stream) {
  start(backward, dtype, activation, {x, dy, dx, n}, device, stream);
}

}  // namespace fastlm::cuda

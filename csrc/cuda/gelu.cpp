#include "cuda/gelu.h"

#include "cuda/elementwise_plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

Kernel forward("gelu", "gelu_forward"), backward("gelu", "gelu_backward");

}  // namespace

void gelu_forward(DType dtype, Activation activation, const void* x, void* y, int64_t n, int device, Stream stream) {
  start_elementwise<1, 1>(forward, dtype, activation, {{x}, {y}, {n}, {n}, 1, n}, device, stream);
}

void gelu_backward(DType dtype, Activation activation, const void* dy, const void* x, void* dx, int64_t n, int device,
                   Stream stream) {
  start_elementwise<2, 1>(backward, dtype, activation, {{dy, x}, {dx}, {n, n}, {n}, 1, n}, device, stream);
}

}  // namespace fastlm::cuda

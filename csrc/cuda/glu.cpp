#include "cuda/glu.h"

#include "cuda/elementwise_plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

Kernel forward("glu", "glu_forward"), backward("glu", "glu_backward");

}  // namespace

void glu_forward(DType dtype, Activation activation, const void* gate, int64_t gate_stride, const void* up,
                 int64_t up_stride, void* y, int64_t M, int64_t N, int device, Stream stream) {
  start_elementwise<2, 1>(forward, dtype, activation, {{gate, up}, {y}, {gate_stride, up_stride}, {N}, M, N}, device,
                          stream);
}

void glu_backward(DType dtype, Activation activation, const void* dy, int64_t dy_stride, const void* gate,
                  int64_t gate_stride, const void* up, int64_t up_stride, void* dgate, void* dup, int64_t out_stride,
                  int64_t M, int64_t N, int device, Stream stream) {
  start_elementwise<3, 2>(
      backward, dtype, activation,
      {{dy, gate, up}, {dgate, dup}, {dy_stride, gate_stride, up_stride}, {out_stride, out_stride}, M, N}, device,
      stream);
}

}  // namespace fastlm::cuda

// swiglu and geglu over elementwise.cuh, on rows of any distance: gate and up as two tensors, as halves of one product,
// or side by side in one row (the packed form, whose gradients are written side by side again). Reads gate and up and
// writes y (backward: reads dy, gate and up, writes dgate and dup), each once. Shazeer 2020, arXiv:2002.05202.
//
// The floor is 6 bytes an element in bfloat16 (backward 10): with the figures of gelu.cu 37 instructions (62) of a
// multiprocessor for one. Taken, sm_90a: 13 for silu, 23 for gelu, 15 for its tanh form (backward 20, 30 and 24); the
// division by N and the places of the rows are 2 of them (4). On their way: 64 KB of a multiprocessor, 72 KB in the
// backward.
//
// Lost: a second unit of each thread. Its loads are placed behind the arithmetic of the first unit unless it gets 48
// registers and more, which halve the threads: the same bytes on their way. A grid of rows and pieces of rows: N = 1000
// fills 125 lanes of 128, N = 11008 5.4 blocks of 6.
//
// Never run on a GPU.
#include "cuda/glu.h"

#include "cuda/activation.cuh"
#include "cuda/elementwise.cuh"

namespace fastlm::cuda {

template <Activation ACTIVATION>
struct Gated {
  static __device__ __forceinline__ void apply(const float (&in)[2], float (&y)[1]) {
    y[0] = activate<ACTIVATION>(in[0]).value * in[1];
  }
};
template <Activation ACTIVATION>
struct GatedSlopes {  // of dy, gate and up
  static __device__ __forceinline__ void apply(const float (&in)[3], float (&out)[2]) {
    const ValueSlope y = activate<ACTIVATION>(in[1]);
    out[0] = in[0] * in[2] * y.slope;
    out[1] = in[0] * y.value;
  }
};

#define FASTLM_GLU(variant, ACTIVATION, WIDE)                                                   \
  FASTLM_KERNEL(glu_forward, variant, ELEMENTWISE_THREADS, ELEMENTWISE_BLOCKS<2>, GluForward,   \
                elementwise<Scalar, Gated<ACTIVATION>, WIDE, true>)                             \
  FASTLM_KERNEL(glu_backward, variant, ELEMENTWISE_THREADS, ELEMENTWISE_BLOCKS<3>, GluBackward, \
                elementwise<Scalar, GatedSlopes<ACTIVATION>, WIDE, true>)
FASTLM_GLU(0, Activation::silu, false)
FASTLM_GLU(1, Activation::silu, true)
FASTLM_GLU(2, Activation::gelu, false)
FASTLM_GLU(3, Activation::gelu, true)
FASTLM_GLU(4, Activation::gelu_tanh, false)
FASTLM_GLU(5, Activation::gelu_tanh, true)

}  // namespace fastlm::cuda

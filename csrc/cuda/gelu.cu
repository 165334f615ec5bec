// gelu over elementwise.cuh: n elements are one row. Reads x and writes y (backward: reads x and dy, writes dx), each
// once; nothing else. Hendrycks and Gimpel 2016, arXiv:1606.08415.
//
// The floor is 4 bytes an element in bfloat16 (backward 6): at 4.8 TB/s over 132 multiprocessors of 1.755 GHz, 5.2
// elements a clock of each, so 25 instructions (37) of its four schedulers for one, 3 (4.6) of its 16 lanes for special
// functions. Taken, from the SASS of sm_90a: 18 instructions exact and 10 in the tanh form (backward 22 and 17), two of
// them special functions. 29 KB have to be on their way to each multiprocessor (0.8 us): here 48 KB, two loads of 16
// bytes of 1536 threads, and 64 KB in the backward, of 2048.
//
// Lost: erff (a branch on |x| and 30 instructions; loses the lower tail). rcp.approx without ftz: five instructions an
// element for denormal numbers that no sum of 1 and a positive number is. tanh.approx, one special function for two:
// 5e-4 of 1, where the lower tail of bfloat16 needs 4e-3 of itself. A masked copy of the body for the last block: twice
// the code for what reading the last unit again does. 2048 threads in the forward: see ELEMENTWISE_BLOCKS. The form
// before this one, two units and no bound on registers: 48 of them, 24 instructions.
//
// Never run on a GPU.
#include "cuda/gelu.h"

#include "cuda/activation.cuh"
#include "cuda/elementwise.cuh"

namespace fastlm::cuda {

template <Activation ACTIVATION>
struct Value {
  static __device__ __forceinline__ void apply(const float (&x)[1], float (&y)[1]) {
    y[0] = activate<ACTIVATION>(x[0]).value;
  }
};
template <Activation ACTIVATION>
struct Slope {  // of dy and x
  static __device__ __forceinline__ void apply(const float (&in)[2], float (&dx)[1]) {
    dx[0] = activate<ACTIVATION>(in[1]).slope * in[0];
  }
};

#define FASTLM_GELU(variant, ACTIVATION, WIDE)                                                    \
  FASTLM_KERNEL(gelu_forward, variant, ELEMENTWISE_THREADS, ELEMENTWISE_BLOCKS<1>, GeluForward,   \
                elementwise<Scalar, Value<ACTIVATION>, WIDE, false>)                              \
  FASTLM_KERNEL(gelu_backward, variant, ELEMENTWISE_THREADS, ELEMENTWISE_BLOCKS<2>, GeluBackward, \
                elementwise<Scalar, Slope<ACTIVATION>, WIDE, false>)
FASTLM_GELU(2, Activation::gelu, false)
FASTLM_GELU(3, Activation::gelu, true)
FASTLM_GELU(4, Activation::gelu_tanh, false)
FASTLM_GELU(5, Activation::gelu_tanh, true)

}  // namespace fastlm::cuda

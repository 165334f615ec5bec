// gelu. Every thread takes GELU_WORDS times 16 bytes, a block apart, loads them all, widens to float32, computes,
// rounds, stores. Reads x and writes y (backward: reads x and dy, writes dx), each once; nothing else. Addresses that
// are no multiple of 16 bytes take the instances that move element by element. Hendrycks and Gimpel 2016,
// arXiv:1606.08415.
//
// Never run on a GPU.
#include "cuda/gelu.h"

#include "cuda/activation.cuh"

namespace fastlm::cuda {

template <class T, Activation ACTIVATION, bool BACKWARD>
__device__ __forceinline__ T gelu_element(const GeluArguments& a, int64_t i) {
  const ValueSlope y = activate<ACTIVATION>(to_float(static_cast<const T*>(a.x)[i]));
  if constexpr (BACKWARD) return round_to<T>(y.slope * to_float(static_cast<const T*>(a.dy)[i]));
  return round_to<T>(y.value);
}

template <class T, Activation ACTIVATION, bool BACKWARD, bool ALIGNED>
__device__ __forceinline__ void gelu_kernel(const GeluArguments& a) {
  constexpr int STEP = ALIGNED ? WIDTH<T> : 1;
  T* out = static_cast<T*>(a.out);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * GELU_WORDS * GELU_THREADS + threadIdx.x) * STEP;
  if constexpr (ALIGNED) {
    if (first + ((GELU_WORDS - 1) * GELU_THREADS + 1) * STEP <= a.n) {
      Words x[GELU_WORDS], dy[GELU_WORDS];
      FASTLM_UNROLL
      for (int k = 0; k < GELU_WORDS; ++k) {
        const int64_t i = first + k * GELU_THREADS * STEP;
        x[k] = load_words_once(static_cast<const T*>(a.x) + i);
        if constexpr (BACKWARD) dy[k] = load_words_once(static_cast<const T*>(a.dy) + i);
      }
      FASTLM_UNROLL
      for (int k = 0; k < GELU_WORDS; ++k) {
        float value[STEP], gradient[STEP];
        unpack<T>(x[k], value);
        if constexpr (BACKWARD) unpack<T>(dy[k], gradient);
        FASTLM_UNROLL
        for (int j = 0; j < STEP; ++j) {
          const ValueSlope y = activate<ACTIVATION>(value[j]);
          if constexpr (BACKWARD) {
            value[j] = y.slope * gradient[j];
          } else {
            value[j] = y.value;
          }
        }
        store_words(out + first + k * GELU_THREADS * STEP, pack<T>(value));
      }
      return;
    }
  }
  for (int k = 0; k < GELU_WORDS; ++k) {
    const int64_t i = first + static_cast<int64_t>(k) * GELU_THREADS * STEP;
    for (int64_t j = i; j < i + STEP && j < a.n; ++j) out[j] = gelu_element<T, ACTIVATION, BACKWARD>(a, j);
  }
}

FASTLM_KERNEL(gelu_forward, 0, 256, 4, GeluArguments, gelu_kernel<Scalar, Activation::gelu, false, false>)
FASTLM_KERNEL(gelu_forward, 1, 256, 4, GeluArguments, gelu_kernel<Scalar, Activation::gelu, false, true>)
FASTLM_KERNEL(gelu_forward, 2, 256, 4, GeluArguments, gelu_kernel<Scalar, Activation::gelu_tanh, false, false>)
FASTLM_KERNEL(gelu_forward, 3, 256, 4, GeluArguments, gelu_kernel<Scalar, Activation::gelu_tanh, false, true>)
FASTLM_KERNEL(gelu_backward, 0, 256, 4, GeluArguments, gelu_kernel<Scalar, Activation::gelu, true, false>)
FASTLM_KERNEL(gelu_backward, 1, 256, 4, GeluArguments, gelu_kernel<Scalar, Activation::gelu, true, true>)
FASTLM_KERNEL(gelu_backward, 2, 256, 4, GeluArguments, gelu_kernel<Scalar, Activation::gelu_tanh, true, false>)
FASTLM_KERNEL(gelu_backward, 3, 256, 4, GeluArguments, gelu_kernel<Scalar, Activation::gelu_tanh, true, true>)

}  // namespace fastlm::cuda

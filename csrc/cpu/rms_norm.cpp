// RMSNorm. The algorithm, its memory traffic and its parallel layout stand in norm.h.
#include "norm.h"

namespace fastlm::FASTLM_ISA {

void rms_norm_forward(DType dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                      const float* weight, float offset, const int64_t* seed, double dropout, void* h, void* y,
                      float* rstd, int64_t M, int64_t N, float eps, int threads) {
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    norm_forward<false>(static_cast<const T*>(x), x_stride, static_cast<const T*>(residual), residual_stride, weight,
                        offset, nullptr, seed, dropout, static_cast<T*>(h), static_cast<T*>(y), nullptr, rstd, M, N,
                        eps, threads);
  });
}

void rms_norm_backward(DType dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                       const float* weight, float offset, const float* rstd, const void* dh, const int64_t* seed,
                       double dropout, void* dx, void* dresidual, float* dweight, float* scratch, int64_t M, int64_t N,
                       int threads) {
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    norm_backward<false>(static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), x_stride, weight, offset,
                         nullptr, rstd, static_cast<const T*>(dh), seed, dropout, static_cast<T*>(dx),
                         static_cast<T*>(dresidual), dweight, nullptr, scratch, M, N, threads);
  });
}

}  // namespace fastlm::FASTLM_ISA

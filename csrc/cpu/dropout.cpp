// Dropout of the rows of a matrix, the residual stream added.
//   both ways  y = dropout(x) [+ residual], in the dtype of y: forward a branch of 16 bits lands on a float32 stream,
//              backward the stream's gradient is dropped alike and rounded to the branch's
//   memory     reads x and the residual and writes y, once each; a large y is streamed past the cache
//   parallel   equal shares of the rows
//   random     random.h: the bits are made again in the backward, no mask is kept
//   paper      Srivastava et al. 2014 (JMLR 15)
#include "fastlm.h"
#include "parallel.h"
#include "random.h"
#include "simd.h"

namespace fastlm::FASTLM_ISA {

void dropout(DType x_dtype, const void* x, int64_t x_stride, DType dtype, const void* residual, int64_t r_stride,
             const int64_t* seed, double p, void* y, int64_t M, int64_t N, int threads) {
  constexpr int64_t GRAIN = 1 << 15;  // elements: below, starting a second thread takes longer than the work
  with_type(x_dtype, [=](auto x_type) {
    with_type(dtype, [=](auto type) {
      using X = typename decltype(x_type)::type;
      using T = typename decltype(type)::type;
      const X* in = static_cast<const X*>(x);
      const T* added = static_cast<const T*>(residual);
      T* out = static_cast<T*>(y);
      const bool large = stream_ok(out, M, N, N);
      parallel_for(threads, M, ceil_div(GRAIN, N > 0 ? N : 1), [=](int64_t first, int64_t last) {
        with_flag(large, [=](auto streamed) {
          with_flag(seed != nullptr, [=](auto drops) {
            for (int64_t row = first; row < last; ++row) {
              const X* from = in + row * x_stride;
              const T* other = added ? added + row * r_stride : nullptr;
              T* to = out + row * N;
              const RowDropout drop(decltype(drops)::value ? *seed : 0, p, row);
              for_vectors(N, [&](int64_t i, auto n) {
                Vec v = load(from + i, n);
                if constexpr (decltype(drops)::value) v = drop(v, i);
                put(to + i, other ? v + load(other + i, n) : v, n, streamed);
              });
            }
          });
          if (streamed) stream_fence();
        });
      });
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

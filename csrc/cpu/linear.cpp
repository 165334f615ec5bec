// Weight and bias gradients of a linear layer whose products are in a half type: dW = dy^T x, dbias = sum of dy's rows,
// summed in float32 and stored so. (Everything else of a linear layer is left to torch, whose products run as fast.)
//   bfloat16   with AMX on its tiles (linear_amx.h)
//   otherwise  float32 copies of 64 rows at a time, and products of vectors
//   parallel   over blocks of dW, each summed over all rows in one order: the same bits for any number of threads
//   memory     dy is read once for each part of K, x once for each part of N
#include "linear.h"

#include "tile_gemm.h"
#if defined(__AMX_BF16__)
#include "linear_amx.h"
#endif

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t ROWS = 64, NB = 64, KB = 256;
constexpr int64_t ALONE = 1 << 22;  // M N K below which a second thread does not pay

/// One item: dW[n0, n1) x [k0, k1).
template <class T, class E>
void weight_item(const WeightGradient<T>& p, E* dw, float* dbias, int64_t n0, int64_t n1, int64_t k0, int64_t k1,
                 char* scratch) {
  const int64_t N = n1 - n0, K = k1 - k0, ldn = round_up(N, W), ldk = round_up(K, W);
  float* const a = reinterpret_cast<float*>(scratch);
  float *const b = a + ROWS * NB, *const c = b + ROWS * KB, *const sums = c + NB * KB;
  std::memset(c, 0, NB * KB * sizeof(float));
  std::memset(sums, 0, NB * sizeof(float));
  const auto widened = [](const T* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t ld) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < ld; i += W) store(to + r * ld + i, load_n(from + r * stride + i, min64(W, columns - i)));
  };
  for (int64_t m = 0; m < p.M; m += ROWS) {
    const int64_t rows = min64(ROWS, p.M - m);
    widened(p.dy + m * p.dy_stride + n0, p.dy_stride, rows, N, a, ldn);
    widened(p.x + m * p.x_stride + k0, p.x_stride, rows, K, b, ldk);
    gemm<Lie::by_columns, true, false>(N, ldk, rows, a, ldn, b, ldk, c, ldk);
    if (dbias)
      for (int64_t n = 0; n < ldn; n += W) {
        Vec total{};
        for (int64_t r = 0; r < rows; ++r) total += load(a + r * ldn + n);
        store(sums + n, load(sums + n) + total);
      }
  }
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; k += W) store_n(dw + (n0 + n) * p.K + k0 + k, load(c + n * ldk + k), min64(W, K - k));
  if (dbias) std::memcpy(dbias + n0, sums, N * sizeof(float));
}

template <class T, class E>
void weight_gradient(const WeightGradient<T>& p, E* dw, float* dbias, char* scratch, int threads) {
  if (p.M * p.N * p.K < ALONE) threads = 1;
  scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
  auto run = weight_item<T, E>;
  int64_t most_n = NB, most_k = KB;
#if defined(__AMX_BF16__)
  if constexpr (std::is_same<T, bfloat16>::value) run = weight_item_amx<E>, most_n = most_k = LINEAR_BLOCK;
#endif
  // The longer side is cut further until every thread has the same number of blocks.
  int64_t across = ceil_div(p.N, most_n), along = ceil_div(p.K, most_k);
  while (across * along % threads && across * along < 4 * threads) (p.N / across > p.K / along ? across : along) += 1;
  const int64_t nb = round_up(ceil_div(p.N, across), 32), kb = round_up(ceil_div(p.K, along), 32);
  across = ceil_div(p.N, nb), along = ceil_div(p.K, kb);
  parallel_items(threads, across * along, [&](int64_t item, int thread) {
    const int64_t n0 = item / along * nb, k0 = item % along * kb;
    run(p, dw, k0 == 0 ? dbias : nullptr, n0, min64(p.N, n0 + nb), k0, min64(p.K, k0 + kb),
        scratch + thread * linear_room(p.N, p.K));
  });
}

}  // namespace

void linear_weight_gradient(DType dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                            DType out_dtype, void* dweight, float* dbias, void* scratch, int64_t M, int64_t N,
                            int64_t K, int threads) {
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same<T, float>::value) {
      const WeightGradient<T> p{static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), x_stride, M, N, K};
      if (out_dtype == DType::float32)
        weight_gradient(p, static_cast<float*>(dweight), dbias, static_cast<char*>(scratch), threads);
      else
        weight_gradient(p, static_cast<T*>(dweight), dbias, static_cast<char*>(scratch), threads);
    }
  });
}

}  // namespace fastlm::FASTLM_ISA

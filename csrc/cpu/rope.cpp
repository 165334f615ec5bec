// Rotary position embedding of queries and keys in one call.
//   both ways  each pair (a, b) of the leading R channels becomes (a cos - b sin, b cos + a sin), with -sin for the
//              inverse rotation, which is the backward; the channels from R on are copied
//   pairs      (i, i + R/2), or (2i, 2i + 1) when interleaved
//   memory     reads and writes q and k once; a block of the tables stays in the first-level cache for all heads;
//              outputs larger than the cache are streamed past it where rows are aligned
//   parallel   batches times blocks of positions; the loop over heads is inside or outside the one over positions,
//              whichever walks the memory of the tensor in order
//   blocks     two vectors at a time (load_pair) where half the width allows it; when interleaved, the even and the odd
//              places that a load of bfloat16 splits into are the pairs to be turned
//   lost       rotating in place, which takes as long as rotating into memory already touched (100 MB float32,
//              tuned malloc: 3.5 against 3.0 ms; 50 MB bfloat16: 1.9 against 2.2); prefetch 4 KiB ahead: no difference
//   paper      Su et al. 2021 (arXiv:2104.09864)
#include "fastlm.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

/// The channels of one head at one position. PAIRS: two vectors at a time, for which half the width is a multiple of 2
/// W.
template <bool INTERLEAVED, bool PAIRS, class T, class STREAM>
inline void rotate(const T* x, T* y, const float* cos, const float* sin, float sign, int64_t D, int64_t R,
                   STREAM streamed) {
  const int64_t half = R / 2;
  if constexpr (INTERLEAVED) {
    // The vectors of a pair of bfloat16 are its even and its odd places: what is to be turned.
    constexpr bool ZIPPED = !std::is_same<T, bfloat16>::value;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
      const Vec c = load(cos + i), s = load(sin + i) * sign;
      Vec a, b;
      load_pair(x + 2 * i, a, b);
      if (ZIPPED) unzip(a, b, a, b);
      Vec low = a * c - b * s, high = b * c + a * s;
      if (ZIPPED) zip(low, high, low, high);
      store_pair(y + 2 * i, low, high, streamed);
    }
    if (i < half) {
      const int64_t n = half - i, first = 2 * n < W ? 2 * n : W;
      const Vec c = load_n(cos + i, n), s = load_n(sin + i, n) * sign;
      Vec a, b, low, high;
      unzip(load_n(x + 2 * i, first), load_n(x + 2 * i + first, 2 * n - first), a, b);
      zip(a * c - b * s, b * c + a * s, low, high);
      store_n(y + 2 * i, low, first);
      store_n(y + 2 * i + first, high, 2 * n - first);
    }
  } else if constexpr (PAIRS) {
    for (int64_t i = 0; i < half; i += 2 * W) {
      Vec c[2], s[2], a[2], b[2];
      load_pair_as<T>(cos + i, c[0], c[1]);
      load_pair_as<T>(sin + i, s[0], s[1]);
      load_pair(x + i, a[0], a[1]);
      load_pair(x + half + i, b[0], b[1]);
      for (int j = 0; j < 2; ++j) {
        const Vec turned = a[j] * c[j] - b[j] * (s[j] * sign);
        b[j] = b[j] * c[j] + a[j] * (s[j] * sign);
        a[j] = turned;
      }
      store_pair(y + i, a[0], a[1], streamed);
      store_pair(y + half + i, b[0], b[1], streamed);
    }
  } else {
    for_vectors(half, [&](int64_t i, auto n) {
      const Vec c = load(cos + i, n), s = load(sin + i, n) * sign;
      const Vec a = load(x + i, n), b = load(x + half + i, n);
      put(y + i, a * c - b * s, n, streamed);
      put(y + half + i, b * c + a * s, n, streamed);
    });
  }
  if (D > R) std::memcpy(static_cast<void*>(y + R), x + R, (D - R) * sizeof(T));
}

}  // namespace

void rope(DType dtype, const void* q, int64_t q_batch, int64_t q_head, int64_t q_position, void* q_out,
          int64_t q_out_batch, int64_t q_out_head, int64_t q_out_position, int64_t Hq, const void* k, int64_t k_batch,
          int64_t k_head, int64_t k_position, void* k_out, int64_t k_out_batch, int64_t k_out_head,
          int64_t k_out_position, int64_t Hk, const float* cos, const float* sin, int64_t table_batch, int64_t B,
          int64_t S, int64_t D, int64_t R, bool interleaved, bool inverse, int threads) {
  constexpr int64_t BLOCK = 32;
  const float sign = inverse ? -1.f : 1.f;
  const int64_t blocks = ceil_div(S, BLOCK);
  with_type(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    const auto turn = [=](auto interleaved, auto pairs, const void* from, int64_t xb, int64_t xh, int64_t xs, void* to,
                          int64_t yb, int64_t yh, int64_t ys, int64_t H, int64_t b, int64_t begin, int64_t end) {
      const T* x = static_cast<const T*>(from) + b * xb;
      T* y = static_cast<T*>(to) + b * yb;
      const float *c = cos + b * table_batch, *s = sin + b * table_batch;
      // A multiple of a power of two has its low bits zero, so the union of the offsets stands for each of them.
      constexpr bool ZIPS = decltype(interleaved)::value, PAIRS = decltype(pairs)::value;
      const int64_t offsets = yb | yh | ys | (ZIPS ? R : R / 2);
      const bool large = stream_ok < T, ZIPS || PAIRS ? 2 : 1 > (y, B * H * S, D, offsets);
      with_flag(large, [=](auto streamed) {
        const auto row = [=](int64_t h, int64_t t) {
          rotate<ZIPS, PAIRS>(x + h * xh + t * xs, y + h * yh + t * ys, c + t * (R / 2), s + t * (R / 2), sign, D, R,
                              streamed);
        };
        if (xh < xs) {
          for (int64_t t = begin; t < end; ++t)
            for (int64_t h = 0; h < H; ++h) row(h, t);
        } else {
          for (int64_t h = 0; h < H; ++h)
            for (int64_t t = begin; t < end; ++t) row(h, t);
        }
        if (streamed) stream_fence();
      });
    };
    const auto run = [=](auto interleaved, auto pairs) {
      const int64_t grain = 1 + 16384 / ((Hq + Hk) * (BLOCK < S ? BLOCK : S) * D + 1);
      parallel_for(threads, B * blocks, grain, [=](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
          const int64_t b = item / blocks, begin = item % blocks * BLOCK;
          const int64_t end = begin + BLOCK < S ? begin + BLOCK : S;
          turn(interleaved, pairs, q, q_batch, q_head, q_position, q_out, q_out_batch, q_out_head, q_out_position, Hq,
               b, begin, end);
          if (k)
            turn(interleaved, pairs, k, k_batch, k_head, k_position, k_out, k_out_batch, k_out_head, k_out_position, Hk,
                 b, begin, end);
        }
      });
    };
    if (interleaved)
      run(std::true_type{}, std::false_type{});
    else
      with_flag(R / 2 % (2 * W) == 0, [=](auto pairs) { run(std::false_type{}, pairs); });
  });
}

}  // namespace fastlm::FASTLM_ISA

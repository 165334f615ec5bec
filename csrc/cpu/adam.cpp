// Adam and AdamW over all tensors of a list in one call, and the sum of squares that clipping needs.
//   norm      per block: squares summed in float32 over 16 vectors at a time, those sums in double; blocks in order
//   step      per element: g = grad * scale [+ weight_decay * p], m and v updated, p -= lr * (m^ / (sqrt(v^) + eps)
//             [+ weight_decay * p]); the bias corrections are per tensor, in double
//   memory    norm reads the gradients; step reads p, g, m, v and writes p, m, v once: 28 bytes an element in float32
//             (30 with a shadow), 22 with 16-bit parameters (30 with master copies), 16 and 10 with 8-bit moments
//   bounds    two cores with AMX, 124M elements: read-modify-write of one stream reaches 43 to 49 GB/s. float32 52
//   GB/s,
//             bfloat16 50 to 52: the memory. 8-bit moments 34 GB/s: about 70 vector instructions for 16 elements
//   paid      prefetch 2 KiB ahead, into the next page, where the hardware's own stops: float32 72.3 to 66.5 ms (512
//             bytes 67.5, 8 KiB 67.8). Newton steps on vrsqrt14ps and vrcp14ps instead of a square root and a division
//             (34 cycles for 16 elements) where the memory would wait for them: 16-bit parameters, 8-bit moments
//   lost      prefetch of one stream after the other in blocks of 4 to 32 KiB: 80 to 97 ms. Prefetching only the first
//             lines of the next pages: 72.6. Approximations in float32: 67.7, as the exact ones. For codes, a mask in
//             place of the branch on a decay of zero, prefetch once for a block: no difference
//   parallel  blocks of BLOCK elements of all tensors laid end to end, an equal share of the elements for each thread;
//             no result depends on the number of threads
//   papers    Kingma and Ba 2014 (arXiv:1412.6980), Loshchilov and Hutter 2017 (arXiv:1711.05101), AMSGrad: Reddi et
//             al. 2018 (openreview ryQu7f-RZ); stochastic rounding: Zamirai et al. 2020 (arXiv:2010.06192)
#include <cmath>
#include <vector>

#include "blockwise.h"
#include "fastlm.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t BLOCK = 8192;   // four float32 streams of it fit the second-level cache
constexpr int64_t GRAIN = 32768;  // fewer elements than this are not worth a thread

/// f(t, offset, n, block) for each block that starts within the elements [begin, end) of all tensors laid end to end.
template <class F>
void for_blocks(const int64_t* sizes, int64_t count, int64_t begin, int64_t end, F f) {
  int64_t start = 0, block = 0;  // of tensor t
  for (int64_t t = 0; t < count && start < end; ++t) {
    const int64_t size = sizes[t];
    int64_t b = begin > start ? ceil_div(begin - start, BLOCK) : 0;
    for (; b * BLOCK < size && start + b * BLOCK < end; ++b) {
      const int64_t left = size - b * BLOCK;
      f(t, b * BLOCK, left < BLOCK ? left : BLOCK, block + b);
    }
    start += size;
    block += ceil_div(size, BLOCK);
  }
}

struct Sum {  // a type of this namespace: std::vector<double> would leave weak symbols of one instruction set
  double value;
};

template <class G>
double sum_of_squares(const G* g, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += 16 * W) {  // short float32 runs: four sums of four terms a lane
    Vec s[4] = {};
    const int64_t left = n - i;
    if (left >= 16 * W) {
      for (int j = 0; j < 16; ++j) {
        const Vec x = load(g + i + j * W);
        s[j % 4] += x * x;
      }
    } else {
      for_vectors(left, [&](int64_t j, auto k) {
        const Vec x = load(g + i + j, k);
        s[0] += x * x;
      });
    }
    total += sum((s[0] + s[1]) + (s[2] + s[3]));
  }
  return total;
}

// --- stochastic rounding --------------------------------------------------------------------------------------------
// 32 random bits for each element from a hash of (seed, step, index): the same on every instruction set, for any number
// of threads and in fastlm/reference/adam.py.

struct Key {
  uint32_t first, second;
};

inline Key make_key(uint64_t seed, uint64_t step, uint64_t high) {  // splitmix64's finalizer (Steele et al. 2014)
  uint64_t z = seed + step * 0x9e3779b97f4a7c15u + high * 0xd1342543de82ef95u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return {uint32_t(z), uint32_t(z >> 32)};
}

inline UInt random_bits(uint32_t index, Key key) {
  UInt x;
  for (int i = 0; i < W; ++i) x[i] = i;
  x = (x + index) ^ key.first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + key.second) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/// x rounded to one of the two neighbours in the type of `like`, with probability by nearness; then it converts
/// exactly.
inline Vec round_randomly(Vec x, UInt random, bfloat16) {
  const Int u = (Int)(((UInt)x + (random >> 16)) & 0xffff0000u);
  return x == x ? from_bits(u) : x;
}
inline Vec round_randomly(Vec x, UInt random, float16) {
  const Int u = (Int)(((UInt)x + (random >> 19)) & 0xffffe000u);
  // below 2^-14 the neighbours are 2^-24 apart: round down after adding a random part of that
  const Vec t = x * 0x1p24f + to_float((Int)(random >> 8)) * 0x1p-24f;
  const Vec small = vabs(x) < 0x1p-14f ? t : Vec{};
  Vec floor = to_float(__builtin_convertvector(small, Int));
  floor -= floor > small ? splat(1.f) : Vec{};
  return vabs(x) < 0x1p-14f ? floor * 0x1p-24f : (x == x ? from_bits(u) : x);
}
inline Vec round_randomly(Vec x, UInt, float) { return x; }

/// What bfloat16 moments are rounded with: to nearest, a second moment would never decay (beta2 = 0.999 moves it by
/// less than half an ulp). One hash for both moments of an element, the upper and the lower half.
inline Key moment_key(uint64_t seed, uint64_t step, uint64_t high) {
  return make_key(seed + 0x632be59bd9b4e019u, step, high);
}
template <class N>
inline void store_moments(float* m, float* v, Vec first, Vec second, UInt, N n) {
  store(m, first, n);
  store(v, second, n);
}
template <class N>
inline void store_moments(bfloat16* m, bfloat16* v, Vec first, Vec second, UInt random, N n) {
  store(m, round_randomly(first, random, bfloat16{}), n);
  store(v, round_randomly(second, random << 16, bfloat16{}), n);
}

// --- the step -------------------------------------------------------------------------------------------------------

/// While it lives, this thread takes subnormal numbers for zero. Moments of rows that get no gradient (rare tokens)
/// decay into them and stay there, and each operation on one costs 150 cycles: the step was 15 times slower.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  explicit FlushSubnormals(bool on) : saved(_mm_getcsr()) {
    if (on) _mm_setcsr(saved | 0x8040);
  }
  ~FlushSubnormals() { _mm_setcsr(saved); }

 private:
  unsigned saved;
#else
 public:
  explicit FlushSubnormals(bool) {}
#endif
};

enum Rounding { NEAREST, MASTER, STOCHASTIC };

struct Tensor {  // one tensor's part of the call
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;  // float, bfloat16 or codes
  float *max_exp_avg_sq, *master, *exp_avg_absmax, *exp_avg_sq_absmax;
  void* shadow;
  uint64_t seed, step;
  float lr_over_bias1, inverse_sqrt_bias2;
};

struct Scalars {  // the last two are the tensor's
  float grad_scale, coupled_decay, decoupled_decay, one_minus_beta1, beta2, one_minus_beta2, eps;
  float lr_over_bias1, inverse_sqrt_bias2;
};

constexpr int AHEAD = 2048;  // bytes; figures above
inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + AHEAD); }

struct None {  // in place of a shadow's type
};

template <class P>
inline Vec rounded(Vec x) {
  P lanes[W];
  store(lanes, x);
  return load(lanes);
}

/// a * b + c where c is a product too: left to the compiler, either of them is fused, not the same in every instance.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

/// The same where b is not 0, else c, whatever a: an infinite parameter times no decay would be NaN. No branch: the
/// compiler tests b for every vector.
inline Vec fused_unless_zero(Vec a, float b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_mask3_fmadd_ps((__m512)a, (__m512)splat(b), (__m512)c, b != 0.f ? 0xffff : 0);
#else
  return b != 0.f ? fused(a, splat(b), c) : c;
#endif
}

/// a / (sqrt(b) * scale + eps), b >= 0.
template <bool FAST>
inline Vec ratio(Vec a, Vec b, float scale, float eps) {
#if defined(__AVX512F__)
  if constexpr (FAST) {  // a Newton step each behind 14 bits: 2 ulp
    const Vec c = (Vec)_mm512_min_ps((__m512)splat(0x1.fffffep127f), (__m512)b);  // a NaN stays
    const Vec r = (Vec)_mm512_rsqrt14_ps(_mm512_max_ps((__m512)splat(0x1p-126f), (__m512)c));
    const Vec q = c * r;
    const Vec d = (q + (c - q * q) * (0.5f * r)) * scale + eps;
    const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)d);
    const Vec y = a * inverse;
    return y + (a - d * y) * inverse;
  }
#endif
  return a / (vsqrt(b) * scale + eps);
}

/// The step of W elements, before and after they are in memory.
template <bool FAST, bool AMSGRAD>
inline Vec advance(const Scalars& c, Vec w, Vec grad, Vec& first, Vec& second, Vec& highest) {
  grad *= c.grad_scale;
  grad = fused_unless_zero(w, c.coupled_decay, grad);
  first += (grad - first) * c.one_minus_beta1;
  second = fused(second, splat(c.beta2), grad * c.one_minus_beta2 * grad);
  if constexpr (AMSGRAD) highest = highest > second ? highest : second;  // a NaN in second stays, as in torch.maximum
  Vec update = ratio<FAST>(first, AMSGRAD ? highest : second, c.inverse_sqrt_bias2, c.eps) * c.lr_over_bias1;
  return w - fused_unless_zero(w, c.decoupled_decay, update);
}

/// What a parameter is read from and written to.
template <Rounding ROUNDING, class P, class S>
class Weights {
 public:
  Weights(const Tensor& t, int64_t offset)
      : p(static_cast<P*>(t.param) + offset),
        master(ROUNDING == MASTER ? t.master + offset : nullptr),
        key(ROUNDING == STOCHASTIC ? make_key(t.seed, t.step, uint64_t(offset) >> 32) : Key{}),
        index(uint32_t(offset)) {
    if constexpr (!std::is_same_v<S, None>) shadow = static_cast<S*>(t.shadow) + offset;
  }

  template <class N>
  Vec read(int64_t i, N n) const {
    Vec w = load(p + i, n);
    if constexpr (ROUNDING == MASTER) {
      // A parameter that is not its master's rounding was changed from outside (weights were loaded): it counts.
      const Vec exact = load(master + i, n);
      w = w == rounded<P>(exact) ? exact : w;
    }
    return w;
  }

  template <class N>
  void write(int64_t i, Vec w, N n) const {
    if constexpr (ROUNDING == MASTER) store(master + i, w, n);
    if constexpr (!std::is_same_v<S, None>) store(shadow + i, w, n);
    if constexpr (ROUNDING == STOCHASTIC) w = round_randomly(w, random_bits(index + uint32_t(i), key), P{});
    store(p + i, w, n);
  }

  void ahead(int64_t i) const {
    prefetch(p + i);
    if constexpr (ROUNDING == MASTER) prefetch(master + i);
    if constexpr (!std::is_same_v<S, None>) prefetch(shadow + i);
  }

 private:
  P* p;
  float* master;
  S* shadow = nullptr;
  Key key;
  uint32_t index;
};

template <bool FAST, bool AMSGRAD, Rounding ROUNDING, class P, class G, class M, class S>
void step_block(const Tensor& t, Scalars c, int64_t offset, int64_t count) {
  const Weights<ROUNDING, P, S> weights(t, offset);
  const G* const g = static_cast<const G*>(t.grad) + offset;
  M* const m = static_cast<M*>(t.exp_avg) + offset;
  M* const v = static_cast<M*>(t.exp_avg_sq) + offset;
  constexpr bool LOW = !std::is_same_v<M, float>;
  const Key key = LOW ? moment_key(t.seed, t.step, uint64_t(offset) >> 32) : Key{};
  float* const peak = AMSGRAD ? t.max_exp_avg_sq + offset : nullptr;
  for_vectors(count, [&](int64_t i, auto n) {
    weights.ahead(i);
    prefetch(g + i);
    prefetch(m + i);
    prefetch(v + i);
    Vec first = load(m + i, n), second = load(v + i, n), highest{};
    if constexpr (AMSGRAD) {
      prefetch(peak + i);
      highest = load(peak + i, n);
    }
    const Vec w = advance<FAST, AMSGRAD>(c, weights.read(i, n), load(g + i, n), first, second, highest);
    store_moments(m + i, v + i, first, second, LOW ? random_bits(uint32_t(offset + i), key) : UInt{}, n);
    if constexpr (AMSGRAD) store(peak + i, highest, n);
    weights.write(i, w, n);
  });
}

inline Int lanes() {
  Int x;
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

/// What numbers are multiplied by before they are encoded, for their block's largest magnitude, which comes as bits: a
/// NaN is above infinity there. Whose inverse would overflow counts as zero; the codes beside a scale that is not
/// finite do not matter.
inline float code_scale(UInt largest, float* absmax) {
#if defined(__AVX512F__)
  uint32_t top = _mm512_reduce_max_epu32((__m512i)largest);
#else
  uint32_t top = 0;
  for (int i = 0; i < W; ++i) top = largest[i] > top ? largest[i] : top;
#endif
  top &= 0x7fffffff;
  std::memcpy(absmax, &top, 4);
  return *absmax >= 0x1p-126f ? 1.f / *absmax : 0.f;
}

/// The same with moments of 8 bits, a block of codes at a time through 2 KiB of wide ones.
template <bool FAST, Rounding ROUNDING, class P, class G, class S>
void step_codes(const Tensor& t, Scalars c, const Book<true>& signed_book, const Book<false>& book, int64_t offset,
                int64_t count) {
  for (const int64_t end = offset + count; offset < end; offset += CODES) {
    const int64_t left = end - offset < CODES ? end - offset : CODES;
    const Weights<ROUNDING, P, S> weights(t, offset);
    const G* const g = static_cast<const G*>(t.grad) + offset;
    uint8_t* const m = static_cast<uint8_t*>(t.exp_avg) + offset;
    uint8_t* const v = static_cast<uint8_t*>(t.exp_avg_sq) + offset;
    float *const m_top = t.exp_avg_absmax + offset / CODES, *const v_top = t.exp_avg_sq_absmax + offset / CODES;
    const Book<true>::Decoder decode_m(signed_book, *m_top);
    const Book<false>::Decoder decode_v(book, *v_top);
    alignas(64) float wide_m[CODES], wide_v[CODES];
    UInt m_largest{}, v_largest{};
    for (int64_t i = 0; i < CODES; i += 64) {
      prefetch(m + i);
      prefetch(v + i);
    }
    for_vectors(left, [&](int64_t i, auto n) {
      weights.ahead(i);
      prefetch(g + i);
      Vec first = decode_m(load_codes(m + i, n)), second = decode_v(load_codes(v + i, n)), highest{};
      const Vec w = advance<FAST, false>(c, weights.read(i, n), load(g + i, n), first, second, highest);
      weights.write(i, w, n);
      store(wide_m + i, first);
      store(wide_v + i, second);
      UInt a = (UInt)vabs(first), b = (UInt)second;  // no zero without a sign has a sign
      if (n < W) {                                   // lanes behind the end were decoded too
        const UInt inside = (UInt)(lanes() < splat_int(static_cast<int32_t>(n)));
        a &= inside;
        b &= inside;
      }
      m_largest = a > m_largest ? a : m_largest;
      v_largest = b > v_largest ? b : v_largest;
    });
    const float m_inverse = code_scale(m_largest, m_top), v_inverse = code_scale(v_largest, v_top);
    const auto code_m = [&](int64_t i) { return signed_book.encode(load(wide_m + i) * m_inverse); };
    const auto code_v = [&](int64_t i) { return book.encode(load(wide_v + i) * v_inverse); };
    if (left == CODES) {
      for (int64_t i = 0; i < CODES; i += 4 * W) {
        store_codes(m + i, code_m(i), code_m(i + W), code_m(i + 2 * W), code_m(i + 3 * W));
        store_codes(v + i, code_v(i), code_v(i + W), code_v(i + 2 * W), code_v(i + 3 * W));
      }
    } else {
      for_vectors(left, [&](int64_t i, auto n) {
        store_codes(m + i, code_m(i), n);
        store_codes(v + i, code_v(i), n);
      });
    }
  }
}

/// f(std::true_type) or f(std::false_type); never the former unless POSSIBLE.
template <bool POSSIBLE, class F>
void with_flag_if(bool flag, F f) {
  if constexpr (POSSIBLE)
    with_flag(flag, f);
  else
    f(std::false_type{});
}

struct Options {
  bool fast, amsgrad, codes, low_moments;
};

/// run(step): step(tensor, scalars, offset, count) is the instance these options ask for.
template <Rounding ROUNDING, class P, class G, class S, class F>
void choose(const Options& o, F run) {
  // Elsewhere the step waits for the memory, not for a square root and a division, or has no approximations of them.
  constexpr bool WIDE = W == 16, LOW = !std::is_same_v<P, float> && ROUNDING != MASTER;
  with_flag_if<WIDE>(o.fast && (o.codes || LOW), [&](auto fast) {
    if (o.codes) {
      const Book<true> signed_book;
      const Book<false> book;
      return run([=](const Tensor& t, const Scalars& c, int64_t offset, int64_t n) {
        step_codes<fast.value, ROUNDING, P, G, S>(t, c, signed_book, book, offset, n);
      });
    }
    with_flag(o.amsgrad, [&](auto amsgrad) {
      if constexpr (std::is_same_v<P, bfloat16>)
        if (o.low_moments) return run(step_block<fast.value, amsgrad.value, ROUNDING, P, G, bfloat16, S>);
      run(step_block<fast.value, amsgrad.value, ROUNDING, P, G, float, S>);
    });
  });
}

template <class P, class G, class F>
void choose_rounding(bool master, bool stochastic, bool shadow, DType shadow_dtype, const Options& o, F run) {
  if constexpr (std::is_same_v<P, float>) {
    if (!shadow) return choose<NEAREST, P, G, None>(o, run);
    if (shadow_dtype == DType::bfloat16) return choose<NEAREST, P, G, bfloat16>(o, run);
    return choose<NEAREST, P, G, float16>(o, run);
  } else {
    if (master) return choose<MASTER, P, G, None>(o, run);
    if (stochastic) return choose<STOCHASTIC, P, G, None>(o, run);
    return choose<NEAREST, P, G, None>(o, run);
  }
}

}  // namespace

void adam_norm(DType dtype, const int64_t* grads, const int64_t* sizes, int64_t count, double* result, int threads) {
  int64_t total = 0, blocks = 0;
  for (int64_t t = 0; t < count; ++t) {
    total += sizes[t];
    blocks += ceil_div(sizes[t], BLOCK);
  }
  std::vector<Sum> partial(blocks);
  with_type(dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    parallel_for(threads, total, GRAIN, [&](int64_t begin, int64_t end) {
      for_blocks(sizes, count, begin, end, [&](int64_t t, int64_t offset, int64_t n, int64_t block) {
        partial[block].value = sum_of_squares(reinterpret_cast<const G*>(grads[t]) + offset, n);
      });
    });
  });
  double squares = 0;
  for (const Sum& part : partial) squares += part.value;
  *result = squares;
}

void adam_step(DType dtype, DType grad_dtype, DType moment_dtype, DType shadow_dtype, const int64_t* table,
               const int64_t* grads, int64_t count, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool decoupled, double grad_scale, bool stochastic, int threads) {
  const auto row = [=](int r, int64_t t) { return table[r * count + t]; };
  const auto floats = [=](int r, int64_t t) { return reinterpret_cast<float*>(row(r, t)); };
  const int64_t* const sizes = table;
  std::vector<Tensor> tensors(count);
  int64_t total = 0;
  // What is below 2^-63 is nothing beside eps: it is flushed, and an approximate inverse of eps is finite. Without eps
  // it could count. The portable conversion of float16 (W = 4) passes through subnormal numbers.
  const bool small = eps >= 1e-12, flush = small && (W > 4 || dtype != DType::float16);
  Options options{small, false, false, moment_dtype == DType::bfloat16};
  bool master = false, shadow = false;  // for all, but tensors without elements have no addresses
  for (int64_t t = 0; t < count; ++t) {
    float* const step = reinterpret_cast<float*>(row(1, t));
    *step += 1.f;
    const double now = *step;
    tensors[t] = {reinterpret_cast<void*>(row(2, t)),
                  reinterpret_cast<const void*>(grads[t]),
                  reinterpret_cast<void*>(row(3, t)),
                  reinterpret_cast<void*>(row(4, t)),
                  floats(5, t),
                  floats(6, t),
                  floats(8, t),
                  floats(9, t),
                  reinterpret_cast<void*>(row(10, t)),
                  static_cast<uint64_t>(row(7, t)),
                  static_cast<uint64_t>(now),
                  static_cast<float>(lr / (1 - std::pow(beta1, now))),
                  static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, now)))};
    master |= tensors[t].master != nullptr;
    shadow |= tensors[t].shadow != nullptr;
    options.amsgrad |= tensors[t].max_exp_avg_sq != nullptr;
    options.codes |= tensors[t].exp_avg_absmax != nullptr;
    total += sizes[t];
  }
  if (total == 0) return;
  const Scalars scalars{static_cast<float>(grad_scale),
                        static_cast<float>(decoupled ? 0 : weight_decay),
                        static_cast<float>(decoupled ? lr * weight_decay : 0),
                        static_cast<float>(1 - beta1),
                        static_cast<float>(beta2),
                        static_cast<float>(1 - beta2),
                        static_cast<float>(eps),
                        0.f,
                        0.f};
  const auto run = [&](auto step) {
    parallel_for(threads, total, GRAIN, [&](int64_t begin, int64_t end) {
      const FlushSubnormals guard(flush);
      for_blocks(sizes, count, begin, end, [&](int64_t t, int64_t offset, int64_t n, int64_t) {
        Scalars c = scalars;
        c.lr_over_bias1 = tensors[t].lr_over_bias1;
        c.inverse_sqrt_bias2 = tensors[t].inverse_sqrt_bias2;
        step(tensors[t], c, offset, n);
      });
    });
  };
  with_type(dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    if (grad_dtype == dtype)
      choose_rounding<P, P>(master, stochastic, shadow, shadow_dtype, options, run);
    else
      choose_rounding<P, float>(master, stochastic, shadow, shadow_dtype, options, run);
  });
}

}  // namespace fastlm::FASTLM_ISA

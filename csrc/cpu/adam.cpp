// Adam and AdamW over all tensors of a list in one call, and the sum of squares that clipping needs.
//   norm      per block: squares summed in float32 over 16 vectors at a time, those sums in double; blocks in order
//   step      per element: g = grad * scale [+ weight_decay * p], m and v updated, p -= lr * (m^ / (sqrt(v^) + eps)
//             [+ weight_decay * p]); the bias corrections are per tensor, in double
//   memory    norm reads the gradients; step reads p, g, m, v and writes p, m, v once: 28 bytes an element in float32,
//             22 with 16-bit parameters (30 with master copies), no temporaries
//   parallel  blocks of BLOCK elements of all tensors laid end to end, an equal share of the elements for each thread;
//             no result depends on the number of threads
//   papers    Kingma and Ba 2014 (arXiv:1412.6980), Loshchilov and Hutter 2017 (arXiv:1711.05101), AMSGrad: Reddi et
//             al. 2018 (openreview ryQu7f-RZ); stochastic rounding: Zamirai et al. 2020 (arXiv:2010.06192)
#include <cmath>
#include <vector>

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
  float *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master;
  uint64_t seed, step;
  float lr_over_bias1, inverse_sqrt_bias2;
};

struct Scalars {  // the same for all tensors
  float grad_scale, coupled_decay, decoupled_decay, one_minus_beta1, beta2, one_minus_beta2, eps;
};

template <class P>
inline Vec rounded(Vec x) {
  P lanes[W];
  store(lanes, x);
  return load(lanes);
}

template <Rounding ROUNDING, bool AMSGRAD, class P, class G>
void step_block(const Tensor& t, const Scalars& c, int64_t offset, int64_t count) {
  P* const p = static_cast<P*>(t.param) + offset;
  const G* const g = static_cast<const G*>(t.grad) + offset;
  float* const m = t.exp_avg + offset;
  float* const v = t.exp_avg_sq + offset;
  const Key key = ROUNDING == STOCHASTIC ? make_key(t.seed, t.step, uint64_t(offset) >> 32) : Key{};
  const float lr = t.lr_over_bias1, inverse = t.inverse_sqrt_bias2;
  for_vectors(count, [&](int64_t i, auto n) {
    Vec w = load(p + i, n);
    if constexpr (ROUNDING == MASTER) {
      // A parameter that is not its master's rounding was changed from outside (weights were loaded): it counts.
      const Vec exact = load(t.master + offset + i, n);
      w = w == rounded<P>(exact) ? exact : w;
    }
    Vec grad = load(g + i, n) * c.grad_scale;
    if (c.coupled_decay != 0.f) grad += w * c.coupled_decay;  // not always: an infinite parameter times 0 is NaN
    Vec first = load(m + i, n);
    first += (grad - first) * c.one_minus_beta1;
    store(m + i, first, n);
    Vec second = load(v + i, n) * c.beta2 + grad * c.one_minus_beta2 * grad;
    store(v + i, second, n);
    if constexpr (AMSGRAD) {
      const Vec highest = load(t.max_exp_avg_sq + offset + i, n);
      second = highest > second ? highest : second;  // a NaN in second stays, as in torch.maximum
      store(t.max_exp_avg_sq + offset + i, second, n);
    }
    Vec update = first / (vsqrt(second) * inverse + c.eps) * lr;
    if (c.decoupled_decay != 0.f) update += w * c.decoupled_decay;
    w -= update;
    if constexpr (ROUNDING == MASTER) store(t.master + offset + i, w, n);
    if constexpr (ROUNDING == STOCHASTIC) w = round_randomly(w, random_bits(uint32_t(offset + i), key), P{});
    store(p + i, w, n);
  });
}

template <class P, class G>
auto choose_step(bool master, bool stochastic, bool amsgrad) {
  if constexpr (!std::is_same_v<P, float>) {
    if (master) return amsgrad ? step_block<MASTER, true, P, G> : step_block<MASTER, false, P, G>;
    if (stochastic) return amsgrad ? step_block<STOCHASTIC, true, P, G> : step_block<STOCHASTIC, false, P, G>;
  }
  return amsgrad ? step_block<NEAREST, true, P, G> : step_block<NEAREST, false, P, G>;
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

void adam_step(DType dtype, DType grad_dtype, const int64_t* table, const int64_t* grads, int64_t count, double lr,
               double beta1, double beta2, double eps, double weight_decay, bool decoupled, double grad_scale,
               bool stochastic, int threads) {
  const auto row = [=](int r, int64_t t) { return table[r * count + t]; };
  const int64_t* const sizes = table;
  std::vector<Tensor> tensors(count);
  int64_t total = 0;
  bool master = false, amsgrad = false;  // for all, but tensors without elements have no addresses
  for (int64_t t = 0; t < count; ++t) {
    float* const step = reinterpret_cast<float*>(row(1, t));
    *step += 1.f;
    const double now = *step;
    tensors[t] = {reinterpret_cast<void*>(row(2, t)),
                  reinterpret_cast<const void*>(grads[t]),
                  reinterpret_cast<float*>(row(3, t)),
                  reinterpret_cast<float*>(row(4, t)),
                  reinterpret_cast<float*>(row(5, t)),
                  reinterpret_cast<float*>(row(6, t)),
                  static_cast<uint64_t>(row(7, t)),
                  static_cast<uint64_t>(now),
                  static_cast<float>(lr / (1 - std::pow(beta1, now))),
                  static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, now)))};
    master |= tensors[t].master != nullptr;
    amsgrad |= tensors[t].max_exp_avg_sq != nullptr;
    total += sizes[t];
  }
  if (total == 0) return;
  const Scalars scalars{static_cast<float>(grad_scale),
                        static_cast<float>(decoupled ? 0 : weight_decay),
                        static_cast<float>(decoupled ? lr * weight_decay : 0),
                        static_cast<float>(1 - beta1),
                        static_cast<float>(beta2),
                        static_cast<float>(1 - beta2),
                        static_cast<float>(eps)};
  // What is flushed is below 2^-63, nothing beside eps; without eps it could count. The portable conversion of float16
  // (W = 4) passes through subnormal numbers.
  const bool flush = eps >= 1e-12 && (W > 4 || dtype != DType::float16);
  const auto run = [&](auto step) {
    parallel_for(threads, total, GRAIN, [&](int64_t begin, int64_t end) {
      const FlushSubnormals guard(flush);
      for_blocks(sizes, count, begin, end,
                 [&](int64_t t, int64_t offset, int64_t n, int64_t) { step(tensors[t], scalars, offset, n); });
    });
  };
  with_type(dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    if (grad_dtype == dtype)
      run(choose_step<P, P>(master, stochastic, amsgrad));
    else
      run(choose_step<P, float>(master, stochastic, amsgrad));
  });
}

}  // namespace fastlm::FASTLM_ISA

// Adam and AdamW over the tensors of a list, and the sum of squares that clipping needs.
//
//   begin     a thread for each tensor: step += 1, bias corrections and scale in double, to eight floats a tensor
//   step      a block for each chunk of a tensor, a warp for 256 elements at a time, eight a lane: g = grad * scale
//             [+ weight_decay * p], m and v updated, p -= lr * (m^ / (sqrt(v^) + eps) [+ weight_decay * p])
//   squares   a block for each chunk: squares of one access in float32, then double; total: adds the blocks' numbers
//
// Memory: step reads p, g, m, v and writes p, m, v once: 28 bytes an element in float32, 22 with 16-bit parameters (30
// with master copies), 16 and 10 with 8-bit states, 2 more with 16-bit shadows; squares reads the gradients.
//
// Tables. The addresses of the tensors travel in the kernel's arguments, which the driver copies at the launch: 91
// tensors in a launch, 66 with two options more. A table on the device, as the Triton kernels have, would be one launch
// for any number, but is memory that a CUDA graph keeps a pointer to, that has to be filled through pinned memory, and
// that every block reads from twice, one read after the other, before it knows its tensor. Here a block searches a
// handful of words in the constant cache, and a graph holds copies of the arguments: there is nothing that could change
// or be freed beneath it but the tensors. The price is a launch for each 91 tensors in place of one.
// Steps are incremented by a launch of their own: all blocks of a parameter read what depends on its step.
//
// Lanes. A lane holds two fours of elements, 128 apart: 16 bytes of float32, 8 of 16-bit tensors, 4 of codes. Each
// access of a warp is one stretch of memory without holes. (Eight neighbouring elements a lane, 16 bytes of every
// 16-bit tensor, would make each access to a float32 one touch every other 16 bytes of twice the sectors.) In flight:
// float32 8 x 16 bytes a lane; with 3 blocks of 256 threads on a multiprocessor 96 KiB, 3 times what 4.8 TB/s over
// 132 multiprocessors and 0.8 us ask for. 16-bit parameters: 96 bytes a lane. Issue: 27 instructions an element
// (sm_90a, float32) of the 170 that there is time for. A tensor whose addresses do not allow that, and the last
// elements of a tensor, go element by element, lanes side by side, in the same order of operations: the same bits.
// Where only 16-bit tensors and codes take part, a lane does hold eight neighbours.
// 8-bit states: a warp's 256 elements share a scale, so that its largest magnitude is five shuffles. Codes are worked
// out (a search would be eight reads of shared memory), which costs about 30 instructions each: bound by these, not by
// memory, for 16-bit parameters.
//
// Kingma and Ba 2014 (arXiv:1412.6980), Loshchilov and Hutter 2017 (arXiv:1711.05101), AMSGrad: Reddi et al. 2018
// (openreview ryQu7f-RZ), stochastic rounding: Zamirai et al. 2020 (arXiv:2010.06192), 8-bit states: Dettmers et al.
// 2021 (arXiv:2110.02861).
//
// Never run on a GPU.
#include "cuda/adam.h"

#include "cuda/blockwise.cuh"
#include "cuda/device.cuh"

namespace fastlm::cuda {

// --- begin -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ double adam_number(const AdamNumber& n) {
  if (n.at == nullptr) return n.value;
  return n.is_double ? *static_cast<const double*>(n.at) : *static_cast<const float*>(n.at);
}

__device__ __forceinline__ void adam_begin_kernel(const AdamBeginArguments& a) {
  const int tensor = blockIdx.x * ADAM_BEGIN_THREADS + threadIdx.x;
  if (tensor >= a.count) return;
  const bool live = adam_number(a.found_inf) == 0;
  float* const step = reinterpret_cast<float*>(a.steps[tensor]);
  const float now = *step + 1.f;
  if (live) *step = now;
  const double bias1 = -expm1(now * a.log_beta1), bias2 = -expm1(now * a.log_beta2);  // 1 - beta^step
  const double lr = adam_number(a.lr), scale = 1 / adam_number(a.grad_scale);
  AdamScalars& s = a.scalars[tensor];
  s.lr = static_cast<float>(lr / bias1);
  s.inverse_root = static_cast<float>(1 / sqrt(bias2));
  s.decay = static_cast<float>(lr * a.weight_decay);
  s.grad_scale = static_cast<float>(a.maximize ? -scale : scale);
  s.step = now;
  s.live = live;
}

// --- where a block works ---------------------------------------------------------------------------------------------

/// The first block of a tensor, from a row of numbers of 32 bits.
__device__ __forceinline__ uint32_t adam_first(const int64_t* row, int tensor) {
  return static_cast<uint32_t>(static_cast<uint64_t>(row[tensor / 2]) >> 32 * (tensor % 2));
}

/// The last tensor whose first block is not behind this one; tensors without elements come before it.
__device__ __forceinline__ int adam_owner(const int64_t* row, int count) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (adam_first(row, middle) <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// --- a lane's elements of a tile -------------------------------------------------------------------------------------

struct alignas(8) AdamPair {
  uint32_t x, y;
};
struct AdamCode {
  uint8_t bits;
};

/// COUNT elements of a lane, as they lie in memory. VECTOR 8: neighbours; VECTOR 4: two fours, 128 elements apart;
/// VECTOR 1: every 32nd one of the first n.
template <int VECTOR, int COUNT, class T>
struct Elements {
  static constexpr int ACCESS = VECTOR * static_cast<int>(sizeof(T)) / 4;  // words of one; VECTOR 1: not used
  static constexpr int WORDS = VECTOR > 1 ? COUNT * static_cast<int>(sizeof(T)) / 4 : COUNT;
  uint32_t words[WORDS];

  __device__ __forceinline__ void load(const T* p, int lane, int n) {
    if constexpr (VECTOR == 1) {
      FASTLM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        words[i] = 0;
        if (32 * i + lane < n) words[i] = bits(p[32 * i + lane]);
      }
    } else {
      static_assert(ACCESS <= 4, "16 bytes");
      FASTLM_UNROLL
      for (int i = 0; i < COUNT / VECTOR; ++i) {
        const T* from = p + VECTOR * (32 * i + lane);
        uint32_t* to = words + i * ACCESS;
        if constexpr (ACCESS == 4) {
          const Words v = load_words(from);
          to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else if constexpr (ACCESS == 2) {
          const AdamPair v = *reinterpret_cast<const AdamPair*>(from);
          to[0] = v.x, to[1] = v.y;
        } else {
          to[0] = *reinterpret_cast<const uint32_t*>(from);
        }
      }
    }
  }

  __device__ __forceinline__ void store(T* p, int lane, int n) const {
    if constexpr (VECTOR == 1) {
      FASTLM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        if (32 * i + lane >= n) continue;
        if constexpr (sizeof(T) == 4) {
          reinterpret_cast<uint32_t*>(p)[32 * i + lane] = words[i];
        } else {
          p[32 * i + lane] = T{static_cast<decltype(T::bits)>(words[i])};
        }
      }
    } else {
      FASTLM_UNROLL
      for (int i = 0; i < COUNT / VECTOR; ++i) {
        T* to = p + VECTOR * (32 * i + lane);
        const uint32_t* from = words + i * ACCESS;
        if constexpr (ACCESS == 4) {
          store_words(to, {from[0], from[1], from[2], from[3]});
        } else if constexpr (ACCESS == 2) {
          *reinterpret_cast<AdamPair*>(to) = {from[0], from[1]};
        } else {
          *reinterpret_cast<uint32_t*>(to) = from[0];
        }
      }
    }
  }

  /// The bits of element i, and all of them from values.
  __device__ __forceinline__ uint32_t get(int i) const {
    if constexpr (VECTOR == 1 || sizeof(T) == 4) return words[i];
    constexpr int PER = 4 / sizeof(T), BITS = 8 * sizeof(T);
    return words[i / PER] >> BITS * (i % PER) & ((1u << BITS % 32) - 1);
  }
  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(get(i));
    if constexpr (sizeof(T) == 2) return to_float(T{static_cast<uint16_t>(get(i))});
    return 0;
  }
  __device__ __forceinline__ void put(const float (&values)[COUNT]) {
    if constexpr (sizeof(T) == 4) {
      FASTLM_UNROLL
      for (int i = 0; i < COUNT; ++i) words[i] = __float_as_uint(values[i]);
    } else if constexpr (VECTOR > 1) {
      const Words v = pack<T>(values);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
      FASTLM_UNROLL
      for (int i = 0; i < COUNT; ++i) words[i] = round_to<T>(values[i]).bits;
    }
  }
  __device__ __forceinline__ void put_codes(const uint32_t (&codes)[COUNT]) {
    if constexpr (VECTOR > 1) {
      FASTLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t* c = codes + 4 * half;
        words[half] = c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24;
      }
    } else {
      FASTLM_UNROLL
      for (int i = 0; i < COUNT; ++i) words[i] = codes[i];
    }
  }

 private:
  static __device__ __forceinline__ uint32_t bits(float x) { return __float_as_uint(x); }
  template <class U>
  static __device__ __forceinline__ uint32_t bits(U x) {
    return x.bits;
  }
};

/// Where element i of a lane is.
template <int VECTOR>
__device__ __forceinline__ int adam_index(int lane, int i) {
  return VECTOR * (32 * (i / VECTOR) + lane) + i % VECTOR;
}

// --- stochastic rounding ---------------------------------------------------------------------------------------------

struct AdamKey {
  uint32_t first, second;
};

/// splitmix64's finalizer (Steele et al. 2014) over seed, step and the upper half of the index.
__device__ __forceinline__ AdamKey adam_key(uint64_t seed, float step, int64_t start) {
  uint64_t z = seed + static_cast<uint64_t>(step) * 0x9e3779b97f4a7c15u;
  z += static_cast<uint64_t>(start >> 32) * 0xd1342543de82ef95u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

/// 32 bits for an element, as fastlm/reference/adam.py.
__device__ __forceinline__ uint32_t adam_random(uint32_t index, AdamKey key) {
  uint32_t x = index ^ key.first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + key.second) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/// w to one of its two neighbours in T, with probability by nearness; then it converts exactly.
template <class T>
__device__ __forceinline__ float round_randomly(float w, uint32_t random) {
  const uint32_t bits = __float_as_uint(w);
  float rounded;
  if constexpr (Same<T, bfloat16>::value) {
    rounded = __uint_as_float((bits + (random >> 16)) & 0xffff0000u);
  } else {
    rounded = __uint_as_float((bits + (random >> 19)) & 0xffffe000u);
    // below 2^-14 the neighbours are 2^-24 apart: round down after adding a random part of that
    const float part = static_cast<float>(random >> 8) * 5.9604644775390625e-08f;
    const float small = floorf(fmaf(w, 16777216.f, part)) * 5.9604644775390625e-08f;
    if (fabsf(w) < 6.103515625e-05f) rounded = small;
  }
  return w == w ? rounded : w;
}

// --- the step --------------------------------------------------------------------------------------------------------

struct UnsignedMax {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

/// What a block works on: its tensor's addresses, at the start of the chunk.
template <class T, class G, class State>
struct AdamBlock {
  const G* grad;
  T* param;
  State *mean, *square;
  float *peak, *master;
  float *mean_max, *square_max;                  // of 8-bit states, a number for each tile
  bfloat16* shadow;                              // or float16
  const float *signed_values, *unsigned_values;  // of the codes
  AdamKey key;
  uint32_t start;  // index of the chunk's first element, its lower half
};

/// The largest magnitude of a tile. As integers: a NaN is above infinity there, a maximum of floats would drop it.
template <int COUNT>
__device__ __forceinline__ float adam_largest(const float (&values)[COUNT]) {
  uint32_t largest = 0;
  FASTLM_UNROLL
  for (int i = 0; i < COUNT; ++i) largest = UnsignedMax()(largest, __float_as_uint(fabsf(values[i])));
  return __uint_as_float(warp_reduce(largest, UnsignedMax()));
}

/// COUNT elements a lane, from `offset` elements into the chunk on, of which n are left (VECTOR above 1: enough).
template <int VECTOR, int COUNT, AdamRounding ROUNDING, class T, class G, class State>
__device__ __forceinline__ void adam_tile(const AdamArguments& a, const AdamScalars& s, const AdamBlock<T, G, State>& b,
                                          int offset, int n) {
  constexpr bool CODES = sizeof(State) == 1;
  const int lane = threadIdx.x % 32;
  Elements<VECTOR, COUNT, T> params;
  Elements<VECTOR, COUNT, G> grads;
  Elements<VECTOR, COUNT, State> means, squares;
  Elements<VECTOR, COUNT, float> masters, peaks;
  params.load(b.param + offset, lane, n);
  grads.load(b.grad + offset, lane, n);
  means.load(b.mean + offset, lane, n);
  squares.load(b.square + offset, lane, n);
  if constexpr (ROUNDING == AdamRounding::master) masters.load(b.master + offset, lane, n);
  if constexpr (!CODES) {
    if (a.max_exp_avg_sq >= 0) peaks.load(b.peak + offset, lane, n);
  }
  float mean_max = 0, square_max = 0;
  if constexpr (CODES) {
    mean_max = b.mean_max[offset / ADAM_TILE];
    square_max = b.square_max[offset / ADAM_TILE];
  }
  float w[COUNT], first[COUNT], second[COUNT];
  FASTLM_UNROLL
  for (int i = 0; i < COUNT; ++i) {
    w[i] = params.value(i);
    if constexpr (ROUNDING == AdamRounding::master) {
      // A parameter that is not its master's rounding was changed from outside (weights were loaded): it counts.
      const float exact = masters.value(i);
      if (w[i] == to_float(round_to<T>(exact))) w[i] = exact;
    }
    float g = multiply(grads.value(i), s.grad_scale);
    if (a.coupled_decay != 0) g = fmaf(w[i], a.coupled_decay, g);  // else an infinite parameter would make it NaN
    if constexpr (CODES) {
      first[i] = multiply(b.signed_values[means.get(i)], mean_max);
      second[i] = multiply(b.unsigned_values[squares.get(i)], square_max);
    } else {
      first[i] = means.value(i);
      second[i] = squares.value(i);
    }
    first[i] = fmaf(g - first[i], a.one_minus_beta1, first[i]);
    second[i] = fmaf(multiply(g, a.one_minus_beta2), g, multiply(second[i], a.beta2));
    if constexpr (CODES && VECTOR == 1) {  // a largest magnitude over no more than the tensor
      if (32 * i + lane >= n) first[i] = second[i] = 0;
    }
  }
  if constexpr (CODES) {
    mean_max = adam_largest(first), square_max = adam_largest(second);
    const float mean_scale = code_scale(mean_max), square_scale = code_scale(square_max);
    uint32_t codes[COUNT];
    FASTLM_UNROLL
    for (int i = 0; i < COUNT; ++i) codes[i] = encode<true>(multiply(first[i], mean_scale));
    means.put_codes(codes);
    FASTLM_UNROLL
    for (int i = 0; i < COUNT; ++i) codes[i] = encode<false>(multiply(second[i], square_scale));
    squares.put_codes(codes);
    if (lane == 0) {
      b.mean_max[offset / ADAM_TILE] = mean_max;
      b.square_max[offset / ADAM_TILE] = square_max;
    }
  } else {
    means.put(first);
    squares.put(second);
  }
  means.store(b.mean + offset, lane, n);
  squares.store(b.square + offset, lane, n);
  if constexpr (!CODES) {
    if (a.max_exp_avg_sq >= 0) {
      FASTLM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        const float peak = peaks.value(i);
        second[i] = peak > second[i] ? peak : second[i];  // a NaN in second stays, as in torch.maximum
      }
      peaks.put(second);
      peaks.store(b.peak + offset, lane, n);
    }
  }
  FASTLM_UNROLL
  for (int i = 0; i < COUNT; ++i) {
    const float root = fmaf(sqrt_fast(second[i]), s.inverse_root, a.eps);
    float update = multiply(multiply(first[i], reciprocal_fast(root)), s.lr);
    if (a.decoupled) update = fmaf(w[i], s.decay, update);
    w[i] -= update;
  }
  if constexpr (ROUNDING == AdamRounding::master) {
    masters.put(w);
    masters.store(b.master + offset, lane, n);
  }
  if constexpr (ROUNDING == AdamRounding::stochastic) {
    FASTLM_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      w[i] = round_randomly<T>(w[i], adam_random(b.start + offset + adam_index<VECTOR>(lane, i), b.key));
    }
  }
  params.put(w);
  params.store(b.param + offset, lane, n);
  if constexpr (sizeof(T) == 4) {
    if (a.shadow < 0) return;
    if (a.shadow_dtype == static_cast<int>(DType::bfloat16)) {
      Elements<VECTOR, COUNT, bfloat16> shadows;
      shadows.put(w);
      shadows.store(b.shadow + offset, lane, n);
    } else {
      Elements<VECTOR, COUNT, float16> shadows;
      shadows.put(w);
      shadows.store(reinterpret_cast<float16*>(b.shadow) + offset, lane, n);
    }
  }
}

template <AdamRounding ROUNDING, class T, class G, class State>
__device__ __forceinline__ void adam_step_kernel(const AdamArguments& a) {
  constexpr bool CODES = sizeof(State) == 1;
  const int tensor = adam_owner(a.words + a.first * a.count, a.count);
  const int64_t block = blockIdx.x - adam_first(a.words + a.first * a.count, tensor);
  const int64_t start = block * a.chunk, left = a.words[ADAM_WORD_SIZE * a.count + tensor] - start;
  const int n = left < a.chunk ? static_cast<int>(left) : a.chunk;
  const AdamScalars s = a.scalars[tensor];
  if (s.live == 0) return;
  // Row 0 stands for what is not there. Null in its place would be a pointer that the compiler cannot tell is global.
  const auto word = [&](int row) { return a.words[(row < 0 ? 0 : row) * a.count + tensor]; };
  AdamBlock<T, G, State> b;
  b.grad = reinterpret_cast<const G*>(word(ADAM_WORD_GRAD)) + start;
  b.param = reinterpret_cast<T*>(word(ADAM_WORD_PARAM)) + start;
  b.mean = reinterpret_cast<State*>(word(ADAM_WORD_EXP_AVG)) + start;
  b.square = reinterpret_cast<State*>(word(ADAM_WORD_EXP_AVG_SQ)) + start;
  uintptr_t all = reinterpret_cast<uintptr_t>(b.grad) | reinterpret_cast<uintptr_t>(b.param) |
                  reinterpret_cast<uintptr_t>(b.mean) | reinterpret_cast<uintptr_t>(b.square);
  if constexpr (CODES) {
    b.mean_max = reinterpret_cast<float*>(word(a.exp_avg_absmax)) + start / ADAM_TILE;
    b.square_max = reinterpret_cast<float*>(word(a.exp_avg_sq_absmax)) + start / ADAM_TILE;
  } else {
    b.peak = reinterpret_cast<float*>(word(a.max_exp_avg_sq)) + start;
    if (a.max_exp_avg_sq >= 0) all |= reinterpret_cast<uintptr_t>(b.peak);
  }
  if constexpr (ROUNDING == AdamRounding::master) {
    b.master = reinterpret_cast<float*>(word(a.master)) + start;
    all |= reinterpret_cast<uintptr_t>(b.master);
  }
  if constexpr (sizeof(T) == 4) {
    b.shadow = reinterpret_cast<bfloat16*>(word(a.shadow)) + start;
    if (a.shadow >= 0) all |= reinterpret_cast<uintptr_t>(b.shadow);
  }
  b.start = static_cast<uint32_t>(start);
  if constexpr (ROUNDING == AdamRounding::stochastic) {
    b.key = adam_key(static_cast<uint64_t>(word(a.seed)), s.step, start);
  }
  if constexpr (CODES) {
    float* const values = shared<float>();
    for (int code = threadIdx.x; code < 256; code += ADAM_THREADS) {
      values[code] = decode<true>(code);
      values[256 + code] = decode<false>(code);
    }
    __syncthreads();
    b.signed_values = values;
    b.unsigned_values = values + 256;
  }
  const bool wide = all % 16 == 0;
  for (int offset = static_cast<int>(threadIdx.x) / 32 * ADAM_TILE; offset < n;
       offset += ADAM_THREADS / 32 * ADAM_TILE) {
    // Where no float32 tensor takes part, eight neighbours a lane leave no holes either, in half the accesses.
    constexpr int WIDEST = CODES && sizeof(T) == 2 && sizeof(G) == 2 && ROUNDING != AdamRounding::master ? 8 : 4;
    if (wide && offset + ADAM_TILE <= n) {
      adam_tile<WIDEST, 8, ROUNDING, T, G>(a, s, b, offset, ADAM_TILE);
      continue;
    }
    constexpr int COUNT = CODES ? 8 : 4;  // eight would need more registers than four in wide accesses
    const int end = offset + ADAM_TILE < n ? offset + ADAM_TILE : n;
    for (int at = offset; at < end; at += 32 * COUNT) adam_tile<1, COUNT, ROUNDING, T, G>(a, s, b, at, n - at);
  }
}

// --- norm ------------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void adam_squares_kernel(const AdamNormArguments& a) {
  constexpr int STEP = ADAM_THREADS * WIDTH<T>, FLIGHT = 4;
  const int tensor = adam_owner(a.words + 2 * a.count, a.count);
  const int64_t block = blockIdx.x - adam_first(a.words + 2 * a.count, tensor);
  const int64_t start = block * ADAM_NORM_CHUNK, left = a.words[tensor] - start;
  const int n = left < ADAM_NORM_CHUNK ? static_cast<int>(left) : ADAM_NORM_CHUNK;
  const T* const grad = reinterpret_cast<const T*>(a.words[a.count + tensor]) + start;
  double total = 0;
  int done = 0;
  const auto add = [&](Words words) {
    float values[WIDTH<T>], sum = 0;
    unpack<T>(words, values);
    FASTLM_UNROLL
    for (int i = 0; i < WIDTH<T>; ++i) sum = fmaf(values[i], values[i], sum);
    total += sum;
  };
  if (reinterpret_cast<uintptr_t>(grad) % 16 == 0) {
    const int first = static_cast<int>(threadIdx.x) * WIDTH<T>;
    for (; done + FLIGHT * STEP <= n; done += FLIGHT * STEP) {
      Words words[FLIGHT];
      FASTLM_UNROLL
      for (int i = 0; i < FLIGHT; ++i) words[i] = load_words_once(grad + done + i * STEP + first);
      FASTLM_UNROLL
      for (int i = 0; i < FLIGHT; ++i) add(words[i]);
    }
    for (; done + STEP <= n; done += STEP) add(load_words_once(grad + done + first));
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < n; i += ADAM_THREADS) {
    const float x = to_float(grad[i]);
    total += x * x;
  }
  total = group_reduce<ADAM_THREADS>(total, Sum(), shared<double>());
  if (threadIdx.x == 0) a.parts[blockIdx.x] = total;
}

__device__ __forceinline__ void adam_total_kernel(const AdamTotalArguments& a) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < a.count; i += ADAM_THREADS) total += a.parts[i];
  total = group_reduce<ADAM_THREADS>(total, Sum(), shared<double>());
  if (threadIdx.x == 0) *a.result = total;
}

// --- instances -------------------------------------------------------------------------------------------------------

FASTLM_KERNEL(adam_begin, 0, 128, 1, AdamBeginArguments, adam_begin_kernel)
FASTLM_KERNEL(adam_squares, 0, 256, 4, AdamNormArguments, adam_squares_kernel<Scalar>)
FASTLM_KERNEL(adam_total, 0, 256, 1, AdamTotalArguments, adam_total_kernel)

// Blocks of a multiprocessor: 3 leave 80 registers, 4 leave 64. With these nothing spills, for any of the six chips.
#define FASTLM_ADAM(variant, codes_blocks, rounding, G)                                                  \
  FASTLM_KERNEL(adam_step, variant, 256, 3, AdamArguments, adam_step_kernel<rounding, Scalar, G, float>) \
  FASTLM_KERNEL(adam_codes, variant, 256, codes_blocks, AdamArguments, adam_step_kernel<rounding, Scalar, G, AdamCode>)

FASTLM_ADAM(0, (FASTLM_DTYPE == 0 ? 3 : 4), AdamRounding::nearest, Scalar)
#if FASTLM_DTYPE != 0
FASTLM_ADAM(1, 4, AdamRounding::nearest, float)
FASTLM_ADAM(2, 3, AdamRounding::master, Scalar)
FASTLM_ADAM(3, 3, AdamRounding::master, float)
FASTLM_ADAM(4, 4, AdamRounding::stochastic, Scalar)
FASTLM_ADAM(5, 4, AdamRounding::stochastic, float)
#endif

}  // namespace fastlm::cuda

// What the kernels of norm.cu share: pieces of rows, parameters of any dtype, sums over the threads of a row.
#pragma once
#include "cuda/norm.h"
#include "cuda/random.cuh"

namespace fastlm::cuda {

/// 16 bytes of a row of n elements from this column on, 0 behind its end. ALIGNED: the addresses are multiples of 16
/// and n of the width; else they are put together from elements, so that a thread has the same ones either way.
/// ONCE: read-only for the whole kernel and not read again.
template <class T, bool ALIGNED, bool ONCE = true, class Index>
__device__ __forceinline__ Words load_piece(const T* row, Index column, Index n) {
  if constexpr (ALIGNED) {
    if (column >= n) return {0, 0, 0, 0};
    return ONCE ? load_words_once(row + column) : load_words(row + column);
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
    FASTLM_UNROLL
    for (int i = 0; i < WIDTH<T>; ++i) {
      if (column + i < n) {
        if constexpr (sizeof(T) == 4) {
          words[i] = __float_as_uint(row[column + i]);
        } else {
          words[i / 2] |= static_cast<uint32_t>(row[column + i].bits) << 16 * (i % 2);
        }
      }
    }
    Words v{words[0], words[1], words[2], words[3]};
    keep_packed(v);  // pieces are put together one after the other, not all at once, which takes more registers
    return v;
  }
}
template <class T, bool ALIGNED, class Index>
__device__ __forceinline__ void store_piece(T* row, Index column, Index n, Words v) {
  if constexpr (ALIGNED) {
    if (column < n) store_words_global(row + column, v);
  } else {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    FASTLM_UNROLL
    for (int i = 0; i < WIDTH<T>; ++i) {
      if (column + i < n) {
        if constexpr (sizeof(T) == 4) {
          row[column + i] = __uint_as_float(words[i]);
        } else {
          row[column + i].bits = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
        }
      }
    }
  }
}
/// Whether the element column + i exists; all of an ALIGNED piece do or none.
template <bool ALIGNED, class Index>
__device__ __forceinline__ bool exists(Index column, int i, Index n) {
  return ALIGNED ? column < n : column + i < n;
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits, DType dtype) {
  return dtype == DType::bfloat16 ? to_float(bfloat16{bits}) : to_float(float16{bits});
}

/// WIDTH<T> elements of weight or bias from this column on, as float32; 0 behind the end. Fastest where they are T too.
template <class T, bool ALIGNED, class Index>
__device__ __forceinline__ void load_parameter(const void* p, DType dtype, Index column, Index n,
                                               float (&out)[WIDTH<T>]) {
  constexpr int COUNT = WIDTH<T>;
  if (dtype == static_cast<DType>(FASTLM_DTYPE)) {
    unpack<T>(load_piece<T, ALIGNED, false>(static_cast<const T*>(p), column, n), out);
    return;
  }
  FASTLM_UNROLL
  for (int i = 0; i < COUNT; ++i) out[i] = 0.f;
  if (dtype == DType::float32) {
    FASTLM_UNROLL
    for (int k = 0; k < COUNT; k += 4) {
      const Words v = load_piece<float, ALIGNED, false, Index>(static_cast<const float*>(p), column + k, n);
      float part[4];
      unpack<float>(v, part);
      FASTLM_UNROLL
      for (int i = 0; i < 4; ++i) out[k + i] = part[i];
    }
  } else {
    const bfloat16* at = static_cast<const bfloat16*>(p) + column;  // float16 is 16 bits just so
    uint32_t words[COUNT / 2];
    FASTLM_UNROLL
    for (int i = 0; i < COUNT / 2; ++i) words[i] = 0;
    if constexpr (!ALIGNED) {
      FASTLM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        if (column + i < n) words[i / 2] |= static_cast<uint32_t>(at[i].bits) << 16 * (i % 2);
      }
    } else if (column < n) {
      if constexpr (COUNT == 8) {
        const Words v = load_words(at);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      } else {
        struct alignas(8) Half {
          uint32_t x, y;
        };
        const Half v = *reinterpret_cast<const Half*>(at);
        words[0] = v.x, words[1] = v.y;
      }
    }
    FASTLM_UNROLL
    for (int i = 0; i < COUNT; ++i)
      out[i] = half_bits_to_float(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)), dtype);
  }
}

struct Pair {
  float a, b;
  __device__ __forceinline__ Pair operator+(const Pair& other) const { return {a + other.a, b + other.b}; }
};
__device__ __forceinline__ float swapped(float v, int lanes) { return __shfl_xor_sync(FULL, v, lanes); }
__device__ __forceinline__ Pair swapped(Pair v, int lanes) { return {swapped(v.a, lanes), swapped(v.b, lanes)}; }

/// Sums over the threads of a row, which all get the same bits; each sum is one barrier of the block, and of the
/// cluster, where the row has more than a warp. Every thread of the block comes along.
class RowSum {
 public:
  __device__ __forceinline__ explicit RowSum(NormTeam team) : team_(team) {}

  template <class V>
  __device__ __forceinline__ V operator()(V value) {
    const int group = 1 << team_.group_bits;
    FASTLM_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const V other = swapped(value, lanes);
      if (lanes < group) value = value + other;
    }
    if (group <= 32) return value;
    // Two rooms in turn: who writes the one again has passed the barrier that all reach after reading from it.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = group / 32;
    Pair* const room = shared<Pair>() + turn_ * 17;
    turn_ ^= 1;
    if (lane == 0) *reinterpret_cast<V*>(room + warp) = value;
    __syncthreads();
    value = *reinterpret_cast<const V*>(room + (warp & -warps) + (lane & (warps - 1)));
    FASTLM_UNROLL
    for (int lanes = 8; lanes > 0; lanes /= 2) {
      const V other = swapped(value, lanes);
      if (lanes < warps) value = value + other;
    }
    if (team_.cluster_bits == 0) return value;
    const int blocks = 1 << team_.cluster_bits;
    if (threadIdx.x == 0) *reinterpret_cast<V*>(room + 16) = value;
    cluster_sync();
    value = *cluster_peer(reinterpret_cast<V*>(room + 16), lane & (blocks - 1));
    FASTLM_UNROLL
    for (int lanes = 4; lanes > 0; lanes /= 2) {
      const V other = swapped(value, lanes);
      if (lanes < blocks) value = value + other;
    }
    return value;
  }

  /// Before a block ends: the others of its cluster have read what they need from it.
  __device__ __forceinline__ void leave() const {
    if (team_.cluster_bits > 0) cluster_sync();
  }

 private:
  NormTeam team_;
  int turn_ = 0;
};

/// Where a thread stands in a grid of rows in registers: its row in each tile of rows, its first column, the distance
/// to the next one of its pieces.
template <class T>
struct NormPlace {
  int slot, column, step, rank;
  int64_t tile, tiles;  // of this block first, how many blocks (or clusters) there are

  __device__ __forceinline__ NormPlace(NormTeam team, int words) {
    const int group = 1 << team.group_bits;
    rank = team.cluster_bits > 0 ? cluster_rank() : 0;
    slot = static_cast<int>(threadIdx.x) >> team.group_bits;
    column = (rank * words * group + (threadIdx.x & (group - 1))) * WIDTH<T>;
    step = group * WIDTH<T>;
    tile = blockIdx.x >> team.cluster_bits;
    tiles = gridDim.x >> team.cluster_bits;
  }
};

/// 1 / sqrt(square + eps), correctly rounded twice: the approximations of either lean to one side.
__device__ __forceinline__ float norm_rstd(float square, float eps) { return 1.f / sqrtf(square + eps); }

// --- arithmetic of one piece
// ------------------------------------------------------------------------------------------

/// dropout(x) + residual, rounded as h is stored.
template <class T>
__device__ __forceinline__ Words added(Words x, Words residual, bool drop, const RowDropout& dropout, int64_t column) {
  constexpr int W = WIDTH<T>;
  keep_packed(x);
  float value[W], other[W];
  unpack<T>(x, value);
  if (drop) {
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) value[i] = dropout(value[i], column + i);
  }
  keep_packed(residual);
  unpack<T>(residual, other);
  FASTLM_UNROLL
  for (int i = 0; i < W; ++i) value[i] += other[i];
  return pack<T>(value);
}

/// Whether there is a weight, the parameters are of dtype T and no offset is added: what normalised<..., true> takes.
template <class T>
__device__ __forceinline__ bool plain_parameters(const NormForward& a) {
  constexpr DType OWN = static_cast<DType>(FASTLM_DTYPE);
  return a.weight && a.offset == 0.f && a.weight_dtype == OWN && (!a.bias || a.bias_dtype == OWN);
}

/// y of one piece: d = x - mean, y = (d * rstd - shift) * (weight + offset) + bias.
template <class T, bool ALIGNED, bool PLAIN, class Index>
__device__ __forceinline__ Words normalised(const NormForward& a, Words x, Index column, Index n, float mean,
                                            float rstd, float shift) {
  constexpr int W = WIDTH<T>;
  float value[W];
  unpack<T>(x, value);
  FASTLM_UNROLL
  for (int i = 0; i < W; ++i) value[i] = fmaf(value[i] - mean, rstd, -shift);
  float weight[W], bias[W];
  if constexpr (PLAIN) {
    unpack<T>(load_piece<T, ALIGNED, false>(static_cast<const T*>(a.weight), column, n), weight);
    if (a.bias) {
      unpack<T>(load_piece<T, ALIGNED, false>(static_cast<const T*>(a.bias), column, n), bias);
      FASTLM_UNROLL
      for (int i = 0; i < W; ++i) value[i] = fmaf(value[i], weight[i], bias[i]);
    } else {
      FASTLM_UNROLL
      for (int i = 0; i < W; ++i) value[i] *= weight[i];
    }
    return pack<T>(value);
  }
  if (a.weight) {
    load_parameter<T, ALIGNED>(a.weight, a.weight_dtype, column, n, weight);
  } else {
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) weight[i] = 1.f;
  }
  if (a.weight && a.offset != 0.f) {
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) weight[i] += a.offset;
  }
  if (a.bias) {
    load_parameter<T, ALIGNED>(a.bias, a.bias_dtype, column, n, bias);
  } else {
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) bias[i] = 0.f;
  }
  FASTLM_UNROLL
  for (int i = 0; i < W; ++i) value[i] = fmaf(value[i], weight[i], bias[i]);
  return pack<T>(value);
}

/// dx (and dresidual) of one piece, from d, the gradient of h without dh.
template <class T, bool ALIGNED, class Index>
__device__ __forceinline__ void store_gradient(const NormBackward& a, int64_t row, Index column, Index n,
                                               float (&d)[WIDTH<T>], Words dh) {
  constexpr int W = WIDTH<T>;
  if (a.dh) {
    float more[W];
    unpack<T>(dh, more);
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) d[i] += more[i];
  }
  if (a.seed) {
    store_piece<T, ALIGNED>(static_cast<T*>(a.dresidual) + row * n, column, n, pack<T>(d));
    const RowDropout dropout(*a.seed, row, a.threshold, a.scale);
    FASTLM_UNROLL
    for (int i = 0; i < W; ++i) d[i] = dropout(d[i], column + i);
  }
  store_piece<T, ALIGNED>(static_cast<T*>(a.dx) + row * n, column, n, pack<T>(d));
}

}  // namespace fastlm::cuda

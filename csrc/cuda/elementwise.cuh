// The skeleton of element-wise kernels over rows (gelu.cu, glu.cu). Threads count the units of all rows through, so
// that no lane idles whatever N is: row and place in it come from one product and a shift (Divider). Each thread loads
// all its units of all inputs before it computes anything. Units past the end load the last one again and are not
// stored: nothing of the hot path is masked.
#pragma once
#include "cuda/device.cuh"
#include "cuda/elementwise.h"

namespace fastlm::cuda {

/// Blocks of a multiprocessor at least. 2048 threads leave 32 registers: with two units of one input ptxas then puts
/// the second load behind the first one's arithmetic, and with three inputs it spills (sm_80).
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
template <int IN>
constexpr int ELEMENTWISE_BLOCKS = 1536 / ELEMENTWISE_THREADS;  // all that these chips hold
#else
template <int IN>
constexpr int ELEMENTWISE_BLOCKS = (IN == 2 ? 2048 : 1536) / ELEMENTWISE_THREADS;
#endif

template <class T, bool WIDE>
struct Unit {  // 16 bytes
  static constexpr int SIZE = WIDTH<T>;
  Words words;
  __device__ __forceinline__ void load(const void* p) { words = load_words_once(p); }
  __device__ __forceinline__ void read(float (&out)[SIZE]) const { unpack<T>(words, out); }
  static __device__ __forceinline__ void store(void* p, const float (&in)[SIZE]) { store_words(p, pack<T>(in)); }
};
template <class T>
struct Unit<T, false> {
  static constexpr int SIZE = 1;
  T element;
  __device__ __forceinline__ void load(const void* p) { element = *static_cast<const T*>(p); }
  __device__ __forceinline__ void read(float (&out)[1]) const { out[0] = to_float(element); }
  static __device__ __forceinline__ void store(void* p, const float (&in)[1]) {
    *static_cast<T*>(p) = round_to<T>(in[0]);
  }
};

/// Operation::apply(const float (&in)[IN], float (&out)[OUT]) computes one element. ROWS: whether there may be several.
template <class T, class Operation, bool WIDE, bool ROWS, int IN, int OUT>
__device__ __forceinline__ void elementwise(const Elementwise<IN, OUT>& a) {
  using U = Unit<T, WIDE>;
  constexpr int BYTES = U::SIZE * sizeof(T), COUNT = ELEMENTWISE_UNITS<IN, WIDE>;
  const uint32_t first = blockIdx.x * (COUNT * ELEMENTWISE_THREADS) + threadIdx.x;
  if (first < a.units) {
    uint32_t rows[COUNT], columns[COUNT];
    U units[COUNT][IN];
    FASTLM_UNROLL
    for (int k = 0; k < COUNT; ++k) {
      const uint32_t unit = first + k * ELEMENTWISE_THREADS, i = unit < a.units ? unit : a.units - 1;
      rows[k] = ROWS ? divide(i, a.per_row) : 0;
      columns[k] = i - rows[k] * a.per_row.divisor * ROWS;
      FASTLM_UNROLL
      for (int j = 0; j < IN; ++j) {
        const int64_t offset = static_cast<uint64_t>(rows[k]) * a.in_row[j] + static_cast<uint64_t>(columns[k]) * BYTES;
        units[k][j].load(static_cast<const char*>(a.in[j]) + offset);
      }
    }
    FASTLM_UNROLL
    for (int k = 0; k < COUNT; ++k) {
      float in[IN][U::SIZE], out[OUT][U::SIZE];
      FASTLM_UNROLL
      for (int j = 0; j < IN; ++j) units[k][j].read(in[j]);
      FASTLM_UNROLL
      for (int e = 0; e < U::SIZE; ++e) {
        float x[IN], y[OUT];
        FASTLM_UNROLL
        for (int j = 0; j < IN; ++j) x[j] = in[j][e];
        Operation::apply(x, y);
        FASTLM_UNROLL
        for (int j = 0; j < OUT; ++j) out[j][e] = y[j];
      }
      if (k > 0 && first + k * ELEMENTWISE_THREADS >= a.units) break;
      FASTLM_UNROLL
      for (int j = 0; j < OUT; ++j) {
        const int64_t offset =
            static_cast<uint64_t>(rows[k]) * a.out_row[j] + static_cast<uint64_t>(columns[k]) * BYTES;
        U::store(static_cast<char*>(a.out[j]) + offset, out[j]);
      }
    }
  }
  if (WIDE && a.tail > threadIdx.x && blockIdx.x == 0) {
    const int64_t i = static_cast<int64_t>(a.units) * U::SIZE + threadIdx.x;
    float in[IN], out[OUT];
    for (int j = 0; j < IN; ++j) in[j] = to_float(static_cast<const T*>(a.in[j])[i]);
    Operation::apply(in, out);
    for (int j = 0; j < OUT; ++j) static_cast<T*>(a.out[j])[i] = round_to<T>(out[j]);
  }
}

}  // namespace fastlm::cuda

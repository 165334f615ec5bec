// Launches of the kernels of elementwise.cuh. Plain C++.
#pragma once
#include "cuda/elementwise.h"
#include "cuda/plan.h"

namespace fastlm::cuda {

/// M rows of N elements of each tensor; strides between rows in elements.
template <int IN, int OUT>
struct Rows {
  const void* in[IN];
  void* out[OUT];
  int64_t in_row[IN];
  int64_t out_row[OUT];
  int64_t M, N;
};

/// Starts the kernel on all of it: in one launch, or in several where an index of units would leave 31 bits or a stride
/// in bytes 32. Rows that follow each other without a gap are one row.
template <int IN, int OUT>
void start_elementwise(Kernel& kernel, DType dtype, Activation activation, Rows<IN, OUT> x, int device, Stream stream) {
  constexpr int64_t MOST = int64_t{1} << 30;
  if (x.M <= 0 || x.N <= 0) return;
  const int64_t size = size_of(dtype);
  bool dense = true, near = true, wide = true;
  for (int64_t stride : x.in_row) dense &= stride == x.N;
  for (int64_t stride : x.out_row) dense &= stride == x.N;
  if (dense || x.M == 1) {
    x.N *= x.M;
    x.M = 1;
  }
  const auto look = [&](const void* address, int64_t stride) {
    near &= stride * size < int64_t{1} << 32;
    wide &= aligned(address) && (x.M == 1 || stride * size % 16 == 0);
  };
  for (int i = 0; i < IN; ++i) look(x.in[i], x.in_row[i]);
  for (int i = 0; i < OUT; ++i) look(x.out[i], x.out_row[i]);
  wide &= x.M == 1 || x.N * size % 16 == 0;

  const int64_t step = wide ? 16 / size : 1, units = x.N / step;  // of a row
  const int64_t rows = near ? max(1, min(x.M, MOST / max(units, 1))) : 1, across = max(1, min(units, MOST));
  const int64_t block = ELEMENTWISE_THREADS * (wide ? ELEMENTWISE_UNITS<IN, true> : ELEMENTWISE_UNITS<IN, false>);
  for (int64_t row = 0; row < x.M; row += rows) {
    for (int64_t column = 0; column == 0 || column < units; column += across) {
      const int64_t m = min(rows, x.M - row), n = min(across, units - column);
      Elementwise<IN, OUT> a;
      for (int i = 0; i < IN; ++i) {
        a.in[i] = static_cast<const char*>(x.in[i]) + (row * x.in_row[i] + column * step) * size;
        a.in_row[i] = static_cast<uint32_t>(m > 1 ? x.in_row[i] * size : 0);
      }
      for (int i = 0; i < OUT; ++i) {
        a.out[i] = static_cast<char*>(x.out[i]) + (row * x.out_row[i] + column * step) * size;
        a.out_row[i] = static_cast<uint32_t>(m > 1 ? x.out_row[i] * size : 0);
      }
      a.per_row = Divider(max(n, 1));
      a.units = static_cast<uint32_t>(m * n);
      a.tail = static_cast<uint32_t>(column + n == units ? x.N % step : 0);
      const Grid grid{max(1, ceil_div(m * n, block)), ELEMENTWISE_THREADS};
      kernel.launch(dtype, elementwise_variant(activation, wide), grid, a, device, stream);
    }
  }
}

}  // namespace fastlm::cuda

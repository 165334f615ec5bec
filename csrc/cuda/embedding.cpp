#include "cuda/embedding.h"

#include "cuda/plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

Kernel gather("embedding", "embedding_forward"), search("embedding", "embedding_starts"),
    add_pieces("embedding", "embedding_pieces"), add_rows("embedding", "embedding_sum");

}  // namespace

void embedding_forward(DType dtype, bool wide_ids, const void* ids, const void* weight, int64_t weight_stride, void* y,
                       int64_t M, int64_t V, int64_t N, int device, Stream stream) {
  if (N == 0) return;
  const int width = 16 / size_of(dtype);
  const bool wide = cut_of(N, size_of(dtype), {weight, y}, {V == 1 ? N : weight_stride, N}) == Cut::words;
  const int64_t units = wide ? N / width : N;
  // Whole rows, or equal parts of one; as many threads as have a unit each time.
  constexpr int64_t MOST = GATHER_UNITS * GATHER_THREADS;
  const int64_t across = ceil_div(units, MOST), tile = ceil_div(units, across);
  const int64_t rows = max(min(MOST / tile, M), 1);
  const int threads = static_cast<int>(warps_of(ceil_div(rows * tile, GATHER_UNITS)));
  const EmbeddingForward a{
      ids, weight, y, M, V, N, units, weight_stride, wide_ids, static_cast<int>(rows), Divider(tile), Divider(across)};
  gather.launch(dtype, wide, {ceil_div(M, rows) * across, threads}, a, device, stream);
}

void embedding_starts(bool wide_keys, const void* keys, int64_t* starts, int64_t M, int64_t V, int device,
                      Stream stream) {
  const EmbeddingStarts a{keys, starts, M, V, wide_keys};
  search.launch(DType::float32, 0, {ceil_div(V + 1, STARTS_THREADS), STARTS_THREADS}, a, device, stream);
}

void embedding_backward(DType dtype, const void* dy, int64_t dy_stride, bool wide_keys, const void* keys,
                        const int64_t* order, const int64_t* starts, float* partial, void* dweight, int64_t M,
                        int64_t V, int64_t N, int64_t padding_idx, int device, Stream stream) {
  if (N == 0) return;
  const int width = 16 / size_of(dtype);
  const bool whole =
      aligned(partial) && cut_of(N, size_of(dtype), {dy, dweight}, {M == 1 ? N : dy_stride, N}) == Cut::words;
  const int64_t words = ceil_div(N, width), most = dtype == DType::float32 ? SUM_WORDS<float> : SUM_WORDS<bfloat16>;
  // Eight lanes read 128 bytes side by side; more where a row is wider than they add.
  const int64_t lanes = min(max(next_power_of_2(ceil_div(words, most)), min(next_power_of_2(words), 8)), 32);
  const int64_t across = ceil_div(words, lanes * most), tile = ceil_div(words, across);
  const EmbeddingBackward a{dy,
                            keys,
                            order,
                            starts,
                            partial,
                            dweight,
                            V,
                            N,
                            dy_stride,
                            padding_idx,
                            static_cast<int>(words),
                            static_cast<int>(tile),
                            log2_of(lanes),
                            wide_keys,
                            Divider(across)};
  const int64_t room = most * width * SUM_THREADS / 2 * 4, abreast = SUM_THREADS / lanes * SUM_ROWS;
  add_pieces.launch(dtype, whole, {M / EMBEDDING_PIECE * across, SUM_THREADS, 1, room}, a, device, stream);
  add_rows.launch(dtype, whole, {ceil_div(V, abreast) * across, SUM_THREADS, 1, room + abreast * 16}, a, device,
                  stream);
}

}  // namespace fastlm::cuda

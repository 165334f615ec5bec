// Which turns the blocks of attention's backward take, by attention.cuh's own functions: for
// test_attention_pipeline.py.
#include "cuda/attention.cuh"

using namespace fastlm::cuda;

namespace {

/// Block, tile of dq, turn, first query and first key of every step of every block, blocks in the order of their start.
template <int M, int N>
int64_t walk(const AttentionArguments& a, int64_t* out) {
  int64_t count = 0;
  for (int number = 0; number < a.tiles * a.batches * a.kv_heads; ++number) {
    const Place p = place_keys(a, number);
    const Extent e = extent(a, p.batch);
    const int first = p.tile * N, group = a.heads / a.kv_heads;
    if (first >= e.len_k) continue;
    const Range r = seen_range<N, M>(first, e.len_k, e.len_q, a.after, e.after, a.before, e.before);
    for (int head = p.head * group; head < (p.head + 1) * group; ++head) {
      for (int m = r.low; m < r.high; m += M, ++count) {
        const int64_t step[] = {
            number, sum_tile<M>(a, e, p.batch, head, m / M), turn_of<M, N>(a, e, p.tile, m / M), m, first, p.batch,
            head};
        for (int i = 0; i < 7; ++i) out[7 * count + i] = step[i];
      }
    }
  }
  return count;
}

}  // namespace

/// The number of steps, or -1 where there are no such tiles.
extern "C" __attribute__((visibility("default"))) int64_t turns(int m, int n, const int* numbers, const int* cu_q,
                                                                const int* cu_k, int64_t* out) {
  AttentionArguments a{};
  int* const fields[] = {&a.batches, &a.heads, &a.kv_heads, &a.len_q,  &a.len_k, &a.tiles,    &a.tiles_q,
                         &a.span,    &a.left,  &a.right,    &a.before, &a.after, &a.align_end};
  for (int* field : fields) *field = *numbers++;
  a.cu_q = cu_q;
  a.cu_k = cu_k;
  if (m == 64 && n == 128) return walk<64, 128>(a, out);
  if (m == 128 && n == 128) return walk<128, 128>(a, out);
  if (m == 64 && n == 64) return walk<64, 64>(a, out);
  if (m == 32 && n == 64) return walk<32, 64>(a, out);
  if (m == 32 && n == 32) return walk<32, 32>(a, out);
  return -1;
}

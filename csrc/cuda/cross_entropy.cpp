#include "cuda/cross_entropy.h"

#include <stdexcept>
#include <string>

#include "cuda/plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

using Arguments = CrossEntropyArguments;

Kernel prepare("cross_entropy", "cross_entropy_prepare"), narrow("cross_entropy", "cross_entropy_narrow"),
    wide("cross_entropy", "cross_entropy_wide"), scale("cross_entropy", "cross_entropy_scale");

/// Shared memory that the GPU takes of each block for itself.
constexpr int64_t RESERVED = 1024;
static_assert(CrossEntropyScratch::LOSSES == cross_entropy_scratch, "what callers allocate");
constexpr int64_t MOST_CLASSES = (int64_t{1} << 31) - 65536;

struct Wide {
  int threads, parts, keep;
  int64_t shared;
};

/// Threads of a block for this many words of a row. 1024 threads an SM have the registers: 16 blocks for short rows.
int threads_for(int64_t words) {
  return words <= 512 ? 64 : words <= 1024 ? 128 : words <= 4096 ? 256 : CROSS_ENTROPY_WIDE;
}
/// Bytes of a round of copies.
int64_t round_for(int64_t words) { return int64_t{16} * CROSS_ENTROPY_ROUND * threads_for(words); }
int64_t rounds_for(int64_t words) { return ceil_div(16 * words, round_for(words)); }

/// How rows of `words` 16-byte words are walked. Only where sums are followed by the gradient is there a second pass;
/// the sums alone take the same blocks, so that a loss has the same bits with and without a gradient.
Wide plan(int64_t rows, int64_t words, bool sums, bool gradient, const Device& gpu) {
  const bool twice = sums && gradient, clusters = gpu.arch >= 90;
  int64_t room = min(gpu.shared, gpu.shared_sm / 2 - RESERVED) - CROSS_ENTROPY_ROOM;  // of one of two blocks
  int parts = 1;
  const auto share = [&] { return ceil_div(words, parts); };
  const auto fits = [&] { return rounds_for(share()) <= room / round_for(share()); };
  while (sums && clusters && parts < 8 && !fits()) parts *= 2;
  // Rows that leave multiprocessors idle are split, where it needs no exchange or a cluster is there for it.
  while ((clusters || !sums) && parts < 8 && rows * parts < gpu.sms && share() >= 512) parts *= 2;
  // What is read twice should lie in L2 meanwhile. Where two rows of each multiprocessor do not, there is one.
  if (twice && !fits() && 2 * gpu.sms * 16 * share() > gpu.l2 / 2)
    room = min(gpu.shared, gpu.shared_sm - RESERVED) - CROSS_ENTROPY_ROOM;
  const int64_t rounds = rounds_for(share()), round = round_for(share());
  const int64_t slots = twice ? room / round : CROSS_ENTROPY_STAGES;
  const int64_t keep = !sums ? 0 : rounds <= slots ? rounds : slots - CROSS_ENTROPY_STAGES;
  return {threads_for(share()), parts, static_cast<int>(keep), CROSS_ENTROPY_ROOM + min(rounds, slots) * round};
}

void start(DType dtype, Arguments a, int device, Stream stream) {
  if (a.v < 1 || a.v > MOST_CLASSES)
    throw std::invalid_argument("cross_entropy takes 1 to " + std::to_string(MOST_CLASSES) + " classes, got " +
                                std::to_string(a.v));
  const bool sums = a.loss != nullptr;
  if (a.mean || (sums && a.reduced) || (a.smoothing != 0 && a.weight != nullptr)) {
    a.partials = static_cast<int>(
        min(CrossEntropyScratch::MOST_PARTIALS, max(1, ceil_div(max(a.m, a.v), 8 * CROSS_ENTROPY_PREPARE))));
    prepare.launch(dtype, 0, {a.partials, CROSS_ENTROPY_PREPARE, 1, CROSS_ENTROPY_PREPARE / 32 * 4}, a, device, stream);
  }
  const int64_t K = 16 / size_of(dtype);
  const bool general = a.smoothing != 0 || a.softcap > 0;
  if (a.v <= CROSS_ENTROPY_WORDS * K * 32) {
    const bool long_row = a.v > K * 32;
    a.words = a.v % K == 0;
    a.aligned = a.words && aligned(a.x, a.out) && a.x_stride % K == 0 && a.out_stride % K == 0;
    while ((long_row ? CROSS_ENTROPY_WORDS : 1) * K << a.group < a.v) ++a.group;
    const int64_t rows = CROSS_ENTROPY_NARROW >> a.group;
    narrow.launch(dtype, cross_entropy_variant(general, long_row),
                  {ceil_div(a.m, rows), CROSS_ENTROPY_NARROW, 1, CROSS_ENTROPY_NARROW / 32 * 4}, a, device, stream);
    return;
  }
  const Wide how = plan(a.m, a.v / K, sums, a.out != nullptr, cuda::device(device));
  a.parts = how.parts;
  a.keep = how.keep;
  wide.launch(dtype, cross_entropy_variant(general, false),
              {a.m * how.parts, how.threads, sums ? how.parts : 1, how.shared}, a, device, stream);
}

}  // namespace

void cross_entropy_forward(DType dtype, const void* logits, int64_t stride, const int64_t* target,
                           int64_t target_stride, const void* weight, DType weight_dtype, int64_t ignore_index,
                           bool mean, bool reduced, float label_smoothing, float z_loss, float softcap, float* loss,
                           float* stats, void* dlogits, int64_t dlogits_stride, float* scratch, int64_t M, int64_t V,
                           int device, Stream stream) {
  Arguments a{};
  a.x = logits;
  a.out = dlogits;
  a.target = target;
  a.weight = weight;
  a.loss = loss;
  a.stats = stats;
  a.scratch = scratch;
  a.m = M;
  a.v = V;
  a.x_stride = stride;
  a.out_stride = dlogits == nullptr ? 0 : dlogits_stride;
  a.target_stride = target_stride;
  a.ignore_index = ignore_index;
  a.smoothing = label_smoothing;
  a.share = label_smoothing / static_cast<float>(V);
  a.z_loss = z_loss;
  a.softcap = softcap;
  a.weight_dtype = weight_dtype;
  a.mean = mean;
  a.reduced = reduced;
  start(dtype, a, device, stream);
}

void cross_entropy_backward(DType dtype, const float* dy, int64_t dy_stride, const void* logits, int64_t stride,
                            const int64_t* target, int64_t target_stride, const void* weight, DType weight_dtype,
                            int64_t ignore_index, bool mean, float label_smoothing, float z_loss, float softcap,
                            const float* stats, void* dlogits, int64_t dlogits_stride, float* scratch, int64_t M,
                            int64_t V, int device, Stream stream) {
  Arguments a{};
  a.x = logits;
  a.out = dlogits;
  a.target = target;
  a.weight = weight;
  a.dy = dy;
  a.stats = const_cast<float*>(stats);
  a.scratch = scratch;
  a.m = M;
  a.v = V;
  a.x_stride = stride;
  a.out_stride = dlogits_stride;
  a.target_stride = target_stride;
  a.dy_stride = dy_stride;
  a.ignore_index = ignore_index;
  a.smoothing = label_smoothing;
  a.share = label_smoothing / static_cast<float>(V);
  a.z_loss = z_loss;
  a.softcap = softcap;
  a.weight_dtype = weight_dtype;
  a.mean = mean;
  start(dtype, a, device, stream);
}

void cross_entropy_scale(DType dtype, void* x, const float* factor, int64_t n, int device, Stream stream) {
  Arguments a{};
  a.out = x;
  a.dy = factor;
  a.v = n;
  a.aligned = aligned(x);
  const int64_t blocks = ceil_div(n, int64_t{CROSS_ENTROPY_SCALE} * (a.aligned ? 16 / size_of(dtype) : 1));
  const int64_t most = int64_t{2048 / CROSS_ENTROPY_SCALE} * cuda::device(device).sms;
  scale.launch(dtype, 0, {min(blocks, most), CROSS_ENTROPY_SCALE}, a, device, stream);
}

}  // namespace fastlm::cuda

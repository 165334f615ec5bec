#include "cuda/softmax.h"

#include "cuda/plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

Kernel forward("softmax", "softmax_forward"), backward("softmax", "softmax_backward");

/// Threads of a block of long rows at most: two such blocks to a multiprocessor, one of which loads while the other
/// stores. 1024 where no more blocks can take part.
constexpr int64_t THREADS = 512, MOST_THREADS = 1024;
constexpr int64_t ROOM = ROW_ROOM * 8;  // bytes of shared memory for row_reduce

/// Fills in the rest of `a` and starts the kernel.
template <bool BACKWARD>
void start(Kernel& kernel, DType dtype, SoftmaxArguments a, int device, Stream stream) {
  if (a.m == 0 || a.n == 0) return;
  const Device& gpu = cuda::device(device);
  const int size = size_of(dtype);
  const int64_t stride = a.m == 1 ? a.n : a.stride;
  const Cut cut =
      BACKWARD ? cut_of(a.n, size, {a.x, a.y, a.out}, {stride, a.n}) : cut_of(a.n, size, {a.x, a.out}, {stride, a.n});
  const int64_t width = 16 / size, words = ceil_div(a.n, width);
  constexpr int64_t WORDS = SOFTMAX_WORDS<BACKWARD>;
  const auto launch = [&](SoftmaxForm form, const Grid& grid) {
    kernel.launch(dtype, 2 * static_cast<int>(form) + (cut == Cut::elements), grid, a, device, stream);
  };
  const auto in_warps = [&](SoftmaxForm form, int64_t lanes, int64_t rows) {
    a.lane_bits = log2_of(lanes);
    launch(form, {ceil_div(a.m, SOFTMAX_THREADS / lanes * rows), SOFTMAX_THREADS});
  };

  // Nothing here but the form's second instance may depend on where the tensors lie, unless no row of n elements can be
  // cut into whole words: what thread adds which columns decides the last bits of the sums.
  const bool whole = a.n % width == 0;
  if (words <= 32 && (whole || cut == Cut::elements))
    return in_warps(SoftmaxForm::few, next_power_of_2(words), SOFTMAX_ROWS<BACKWARD>);
  // Where rows are too few to give every multiprocessor a block of warps, each row gets a block.
  if (words <= 32 || (words <= 32 * WORDS && a.m >= 4 * gpu.sms)) {
    const int64_t edges = whole ? 1 : 16;  // a lane for each element of the edges
    return in_warps(SoftmaxForm::many, max(next_power_of_2(ceil_div(words, WORDS)), edges), 1);
  }

  // A row for a block or a cluster: more blocks where the row is long or multiprocessors would have none.
  a.cluster = 1;
  const auto threads = [&] { return max(warps_of(ceil_div(words, WORDS * a.cluster)), 64); };
  if (gpu.arch >= 90) {
    while (a.cluster < 8 && (threads() > THREADS || (a.m * a.cluster * 2 <= gpu.sms && threads() >= 256)))
      a.cluster *= 2;
  }
  const int block = static_cast<int>(min(threads(), MOST_THREADS));
  const int64_t stashed = max(ceil_div(words, block * a.cluster) - WORDS, 0);
  const int64_t shared = ROOM + stashed * block * 16 * (BACKWARD ? 2 : 1);
  const bool fits = shared <= gpu.shared;
  a.stashed = fits ? static_cast<int>(stashed) : 0;
  launch(fits ? SoftmaxForm::block : SoftmaxForm::twice, {a.m * a.cluster, block, a.cluster, fits ? shared : ROOM});
}

}  // namespace

void softmax_forward(DType dtype, bool log, const void* x, int64_t x_stride, void* y, int64_t M, int64_t N, int device,
                     Stream stream) {
  start<false>(forward, dtype, {x, nullptr, y, M, N, x_stride, log, 0, 1, 0}, device, stream);
}

void softmax_backward(DType dtype, bool log, const void* dy, int64_t dy_stride, const void* y, void* dx, int64_t M,
                      int64_t N, int device, Stream stream) {
  start<true>(backward, dtype, {dy, y, dx, M, N, dy_stride, log, 0, 1, 0}, device, stream);
}

}  // namespace fastlm::cuda

#include "cuda/norm.h"

#include "cuda/plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

Kernel forward("norm", "norm_forward"), forward_long("norm", "norm_forward_long");
Kernel backward("norm", "norm_backward"), backward_long("norm", "norm_backward_long");
Kernel columns("norm", "norm_columns"), sum_parts("norm", "norm_parts");

constexpr int MAX_CLUSTER = 8;

/// How a row of so many 16-byte words is divided.
struct Team {
  bool registers;  // else the row is a long one
  int group, cluster;

  NormTeam bits() const { return {log2_of(group), log2_of(cluster)}; }
};

Team team_for(int64_t words, int words_of_a_thread, const Device& gpu) {
  const int64_t block = int64_t{NORM_GROUP} * words_of_a_thread;
  if (words <= block) {
    // Neighbouring threads take neighbouring words: of the shortest rows one each, so that no sector is fetched twice.
    const int64_t threads = max(ceil_div(words, words_of_a_thread), min(words, 2));
    return {true, static_cast<int>(next_power_of_2(threads)), 1};
  }
  if (gpu.arch < 90 || words > MAX_CLUSTER * block) return {false, NORM_LONG_THREADS, 1};
  return {true, NORM_GROUP, static_cast<int>(next_power_of_2(ceil_div(words, block)))};
}

/// Threads of a block: `most`, fewer where blocks would be too few for the GPU, a whole row and a warp at least.
int threads_for(const Team& team, int most, int64_t M, int64_t blocks) {
  int threads = team.group > most ? team.group : most;
  while (threads > team.group && threads > 32 && ceil_div(M, threads / team.group) < blocks) threads /= 2;
  return threads;
}

struct BackwardPlan {
  Team team;
  int threads;
  int64_t parts;   // of dweight and dbias
  int64_t across;  // blocks along the columns of a long row
};

BackwardPlan plan_backward(DType dtype, int64_t M, int64_t N, const Device& gpu) {
  const int64_t words = ceil_div(N, 16 / size_of(dtype));
  const Team team = team_for(words, NORM_BACKWARD_WORDS, gpu);
  if (!team.registers) {
    const int64_t across = ceil_div(words, NORM_COLUMN_THREADS);
    return {team, NORM_LONG_THREADS, max(min(ceil_div(M, 8), min(4 * gpu.sms / across, 65535)), 1), across};
  }
  const int threads = threads_for(team, 256, M, 2 * gpu.sms);
  const int64_t tiles = max(ceil_div(M, threads / team.group), 1);
  const int64_t together = max(gpu.sms * (NORM_BACKWARD_RESIDENT / threads) / team.cluster, 1);
  return {team, threads, ceil_div(tiles, ceil_div(tiles, together)), 0};  // the same work for each, about
}

}  // namespace

void norm_forward(DType dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                  const void* weight, DType weight_dtype, float offset, const void* bias, DType bias_dtype,
                  const int64_t* seed, double dropout, void* h, void* y, float* mean, float* rstd, int64_t M, int64_t N,
                  float eps, int device, Stream stream) {
  if (M == 0 || N == 0) return;
  const Device& gpu = cuda::device(device);
  const int width = 16 / size_of(dtype);
  const int64_t words = ceil_div(N, width);
  const Team team = team_for(words, NORM_WORDS, gpu);
  const bool wide = aligned(x, residual, weight, bias, h, y) && N % width == 0 && x_stride % width == 0 &&
                    residual_stride % width == 0;
  NormForward a{x,
                residual,
                weight,
                bias,
                seed,
                h,
                y,
                mean,
                rstd,
                x_stride,
                residual_stride,
                M,
                N,
                weight_dtype,
                bias_dtype,
                eps,
                offset,
                static_cast<float>(1 / (1 - dropout)),
                drop_threshold(dropout),
                team.bits(),
                0};
  if (team.registers) {
    const int threads = threads_for(team, 128, M, 4 * gpu.sms);
    const Grid grid{ceil_div(M, threads / team.group) * team.cluster, threads, team.cluster, NORM_ROOM};
    forward.launch(dtype, !wide ? 0 : residual ? 2 : 1, grid, a, device, stream);
  } else {
    const int64_t row = ceil_div(words, NORM_LONG_THREADS) * NORM_LONG_THREADS * 16;
    a.held = NORM_ROOM + row <= gpu.shared;
    const Grid grid{M, NORM_LONG_THREADS, 1, NORM_ROOM + (a.held ? row : 0)};
    forward_long.launch(dtype, wide, grid, a, device, stream);
  }
}

int64_t norm_parts(DType dtype, int64_t M, int64_t N, int device) {
  return plan_backward(dtype, M, N, cuda::device(device)).parts;
}

void norm_backward(DType dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* weight,
                   DType weight_dtype, float offset, const float* mean, const float* rstd, const void* dh,
                   const int64_t* seed, double dropout, void* dx, void* dresidual, void* dweight, void* dbias,
                   float* parts, int64_t M, int64_t N, int device, Stream stream) {
  if (N == 0) return;
  const Device& gpu = cuda::device(device);
  const BackwardPlan plan = plan_backward(dtype, M, N, gpu);
  const int width = 16 / size_of(dtype);
  const bool wide =
      aligned(dy, x, weight, dh, dx, dresidual) && N % width == 0 && x_stride % width == 0 && dy_stride % width == 0;
  float* const bias_parts = dweight ? parts + plan.parts * N : parts;
  NormBackward a{dy,
                 x,
                 weight,
                 dh,
                 mean,
                 rstd,
                 seed,
                 dx,
                 dresidual,
                 dweight ? parts : nullptr,
                 dbias ? bias_parts : nullptr,
                 dy_stride,
                 x_stride,
                 M,
                 N,
                 weight_dtype,
                 offset,
                 static_cast<float>(1 / (1 - dropout)),
                 drop_threshold(dropout),
                 plan.team.bits(),
                 1,
                 0};
  const int sums = (dweight != nullptr) + (dbias != nullptr);
  if (plan.team.registers) {
    // As many rows on their way as the shared memory of a multiprocessor has room for, beside the kilobyte of each
    // block that is not ours.
    const int64_t stage = int64_t{plan.threads} * NORM_BACKWARD_WORDS * 16 * (dh ? 3 : 2);
    const int64_t room = min(gpu.shared, gpu.shared_sm * plan.threads / NORM_BACKWARD_RESIDENT - 1024) - NORM_ROOM;
    a.stages = static_cast<int>(max(min(room / stage, 3), 1));
    const Grid grid{plan.parts * plan.team.cluster, plan.threads, plan.team.cluster, NORM_ROOM + a.stages * stage};
    backward.launch(dtype, wide, grid, a, device, stream);
  } else {
    const int64_t words = ceil_div(N, width), row = ceil_div(words, NORM_LONG_THREADS) * NORM_LONG_THREADS * 16;
    a.held = NORM_ROOM + 2 * row <= gpu.shared;
    const Grid rows{M, NORM_LONG_THREADS, 1, NORM_ROOM + (a.held ? 2 * row : 0)};
    backward_long.launch(dtype, wide, rows, a, device, stream);
    const Grid tiles{sums ? plan.across : 0, NORM_COLUMN_THREADS, 1, 0, plan.parts};
    columns.launch(dtype, wide, tiles, a, device, stream);
  }
  const NormParts all{parts, {dweight ? dweight : dbias, dbias}, plan.parts, N, weight_dtype};
  const Grid grid{ceil_div(N, 32), NORM_PARTS_THREADS, 1, NORM_PARTS_THREADS * 4, sums};
  sum_parts.launch(dtype, 0, grid, all, device, stream);
}

}  // namespace fastlm::cuda

// attention by mma.sync: the tiles there are for each padded width. A kernel's unit takes its own from here, launchers
// choose among them. What they were chosen by stands in the kernels' files.
#pragma once
#include "cuda/attention.h"

namespace fastlm::cuda {

/// The tiles of a width: those of its row that are there.
template <int MOST>
constexpr AttentionTiles tiles_of(const AttentionTile (&table)[sizeof(HEAD_DIMS) / sizeof(int)][MOST], int width) {
  const int row = width_index(HEAD_DIMS, width);
  int count = 0;
  while (count < MOST && table[row][count].m > 0) ++count;
  return {table[row], count};
}

// Forward: a block holds m queries and walks over n keys and their values at a time.
constexpr AttentionTile forward_tile(int width, int m, int n, int warps, int stages, bool general) {
  return {m, n, warps, stages, general, int64_t{2} * width * (m + 2 * stages * n)};
}
constexpr AttentionTile AMPERE_FORWARD[][3] = {
    {forward_tile(32, 128, 64, 4, 2, false), forward_tile(32, 64, 64, 4, 2, true)},
    {forward_tile(64, 128, 64, 4, 2, false), forward_tile(64, 64, 64, 4, 2, true)},
    {forward_tile(96, 128, 32, 4, 2, false), forward_tile(96, 64, 64, 4, 1, true)},
    {forward_tile(128, 128, 32, 4, 2, false), forward_tile(128, 128, 32, 4, 1, false),
     forward_tile(128, 64, 64, 4, 1, true)},
    {forward_tile(192, 128, 64, 8, 2, false), forward_tile(192, 128, 32, 8, 2, false),
     forward_tile(192, 64, 32, 4, 1, true)},
    {forward_tile(256, 128, 32, 8, 2, false), forward_tile(256, 128, 32, 8, 1, false),
     forward_tile(256, 64, 32, 4, 1, true)},
};
constexpr AttentionTiles ampere_forward(int width) { return tiles_of(AMPERE_FORWARD, width); }

// Backward: a block holds n keys and their values, and walks over m queries and their gradients at a time. Shared
// memory has, beside those, the weights and their gradients, and what there is one number of for each query: its shift
// and delta, and for dropout two of its hash.
constexpr int BACKWARD_STANDING = 80;  // bytes: where a block stands
constexpr AttentionTile backward_tile(int width, int m, int n, int warps, int stages, bool general) {
  const int64_t rows = 2 * (general ? 4 : 2) * 4 * m;
  return {m,      n,       warps,
          stages, general, int64_t{2} * width * (2 * n + 2 * stages * m) + 4 * m * n + rows + BACKWARD_STANDING};
}
constexpr AttentionTile AMPERE_BACKWARD[][4] = {
    {backward_tile(32, 64, 128, 8, 2, false), backward_tile(32, 64, 128, 8, 2, true)},
    {backward_tile(64, 128, 128, 8, 2, false), backward_tile(64, 64, 128, 8, 2, false),
     backward_tile(64, 64, 128, 8, 2, true)},
    {backward_tile(96, 64, 128, 8, 2, false), backward_tile(96, 64, 64, 8, 2, false),
     backward_tile(96, 64, 64, 8, 2, true)},
    {backward_tile(128, 64, 128, 8, 2, false), backward_tile(128, 64, 64, 8, 1, false),
     backward_tile(128, 64, 64, 8, 1, true)},
    {backward_tile(192, 64, 64, 8, 2, false), backward_tile(192, 32, 64, 8, 1, false),
     backward_tile(192, 32, 64, 8, 1, true)},
    {backward_tile(256, 64, 64, 8, 2, false), backward_tile(256, 64, 64, 8, 1, false),
     backward_tile(256, 32, 32, 4, 1, false), backward_tile(256, 32, 32, 4, 1, true)},
};
constexpr AttentionTiles ampere_backward(int width) { return tiles_of(AMPERE_BACKWARD, width); }

// The gradient of the mask: all four tiles, and numbers as backward has them. Few warps, so that several blocks are
// there at once: a block waits for what it copies.
constexpr AttentionTile bias_tile(int width, int m, int n, int warps) {
  return {m, n, warps, 1, true, int64_t{4} * width * (m + n) + 4 * 4 * m};
}
constexpr AttentionTile AMPERE_BIAS[][1] = {{bias_tile(32, 64, 64, 4)},  {bias_tile(64, 64, 64, 4)},
                                            {bias_tile(96, 64, 64, 4)},  {bias_tile(128, 64, 64, 4)},
                                            {bias_tile(192, 32, 32, 4)}, {bias_tile(256, 32, 32, 4)}};
constexpr AttentionTiles ampere_bias(int width) { return tiles_of(AMPERE_BIAS, width); }

}  // namespace fastlm::cuda

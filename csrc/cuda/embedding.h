// embedding: what launchers and kernels share.
#pragma once
#include "cuda/divider.h"
#include "cuda/row.h"

namespace fastlm::cuda {

// A unit is 16 bytes of a row or, where rows cannot be cut so, an element.

struct EmbeddingForward {
  const void* ids;
  const void* weight;
  void* y;
  int64_t m, v, n, units;  // ids, rows and columns of the table; units of a row
  int64_t weight_row;
  int wide_ids;      // int64, else int32
  int rows;          // that a block copies, or a part of one
  Divider per_tile;  // units of a row that a block copies
  Divider across;    // blocks side by side over a row
};

constexpr int GATHER_UNITS = 4;      // that a thread copies, all on their way at once
constexpr int GATHER_THREADS = 256;  // of a block at most

struct EmbeddingStarts {
  const void* keys;
  int64_t* starts;
  int64_t m, v;
  int wide_keys;
};

constexpr int STARTS_THREADS = 256;

struct EmbeddingBackward {
  const void* dy;
  const void* keys;       // ids in ascending order, which
  const int64_t* order;   // stand at these places of ids
  const int64_t* starts;  // of the runs of the ids 0 .. v
  float* partial;         // a sum for each piece, rows of words * WIDTH
  void* dweight;
  int64_t v, n, dy_row, padding;
  int words;      // of a row
  int tile;       // words of a row that a block adds
  int lane_bits;  // 2^lane_bits lanes add a row together, up to 32; a block as many rows as it has room for
  int wide_keys;
  Divider across;  // blocks side by side over a row
};

constexpr int SUM_THREADS = 256;
/// Words of a row that a lane adds: sums that take 16 registers.
template <class T>
constexpr int SUM_WORDS = sizeof(T) == 4 ? 4 : 2;
/// Rows of dweight that the same lanes write.
constexpr int SUM_ROWS = 2;
/// Sorted positions that are added up beforehand where all have one id.
constexpr int EMBEDDING_PIECE = 128;
/// Positions of a run that some lanes add alone; more are for the whole block.
constexpr int EMBEDDING_SHORT = 8;

}  // namespace fastlm::cuda

// rope: queries and keys in one launch; the backward is the same kernel with the sine's sign turned. Each pair (a, b)
// becomes (a cos - b sin, b cos + a sin), in float32; channels from R on are copied. Su et al. 2021, arXiv:2104.09864.
//
// A thread takes two places of 16 bytes, R/2 channels apart, of one position: eight pairs of a 16-bit dtype either way
// they lie. It reads their cosines and sines once, into registers, and turns up to ROPE_HEADS heads by them, two at a
// time, whose four loads are on their way together. Threads count places, positions and batches through, so that no
// lane idles whatever D is; blocks count groups of heads first, so that neighbours read the same tables and, of a
// (B, S, H, D) tensor, the same rows. Where addresses, strides or R/2 are no multiples of 16 bytes a place is one
// element, by the same code.
//
// Reads q and k and writes their results, each once: 4 bytes an element of a 16-bit dtype, a floor of 25 instructions
// for one (gelu.cu has the arithmetic). Taken, from the SASS of sm_90a: 5.5, and 170 of a thread before its first head,
// 1.3 for each of 128 elements. Float32 tables add 8 bytes a pair and group of 8 heads, an eighth more, mostly from the
// L2 cache. On their way: 64 KB of a multiprocessor, four loads of 1024 threads.
//
// Lost: tables read before the first heads are asked for: two latencies one behind the other. Four heads at a time,
// whose 32 registers more leave 512 threads, the same bytes on their way. Interleaved pairs as one piece of 32 bytes a
// thread: each of its loads would use half of every 32 bytes fetched.
//
// Never run on a GPU.
#include "cuda/rope.h"

#include "cuda/elementwise.cuh"

namespace fastlm::cuda {

/// COUNT values of a table as float32. WIDE: from a place that is a multiple of their bytes, which are 32, 16 or 8.
template <int COUNT, bool WIDE, class Table>
__device__ __forceinline__ void read(const Table* at, float* out) {
  if constexpr (WIDE) {
    FASTLM_UNROLL
    for (int i = 0; i < COUNT; i += WIDTH<Table>) {
      Words words{};
      if constexpr (COUNT >= WIDTH<Table>) {
        words = load_words(at + i);
      } else {
        const uint64_t half = *reinterpret_cast<const uint64_t*>(at);
        words.x = static_cast<uint32_t>(half);
        words.y = static_cast<uint32_t>(half >> 32);
      }
      float value[WIDTH<Table>];
      unpack<Table>(words, value);
      FASTLM_UNROLL
      for (int j = 0; j < WIDTH<Table> && j < COUNT; ++j) out[i + j] = value[j];
    }
  } else {
    FASTLM_UNROLL
    for (int i = 0; i < COUNT; ++i) out[i] = to_float(at[i]);
  }
}

/// The angles of SIZE pairs, of which COUNT and COUNT lie together, from these places of the tables on.
template <int COUNT, bool WIDE, class Table, int SIZE>
__device__ __forceinline__ void read(const RopeArguments& a, const int64_t (&at)[SIZE / COUNT], float (&cos)[SIZE],
                                     float (&sin)[SIZE]) {
  FASTLM_UNROLL
  for (int i = 0; i < SIZE / COUNT; ++i) {
    read<COUNT, WIDE>(static_cast<const Table*>(a.cos) + at[i], cos + i * COUNT);
    read<COUNT, WIDE>(static_cast<const Table*>(a.sin) + at[i], sin + i * COUNT);
  }
}

/// Fused as written here in every instance: they give the same bits.
__device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
  const float turned = fmaf(a, cos, -(b * sin));
  b = fmaf(b, cos, a * sin);
  a = turned;
}

template <class T, bool WIDE, bool INTERLEAVED>
__device__ __forceinline__ void rope_kernel(const RopeArguments& a) {
  using Place = Unit<T, WIDE>;
  constexpr int SIZE = Place::SIZE, HEADS = 2;  // at a time
  const uint32_t block = divide(blockIdx.x, a.groups), group = blockIdx.x - block * a.groups.divisor;
  const uint32_t thread = block * ROPE_THREADS + threadIdx.x;
  if (thread >= a.threads) return;
  const uint32_t row = divide(thread, a.units), unit = thread - row * a.units.divisor;
  const int64_t batch = divide(row, a.positions), position = row - batch * a.positions.divisor;

  const bool turns = unit < a.turning;
  const int64_t one = turns ? static_cast<int64_t>(unit) * a.step : a.R + static_cast<int64_t>(unit - a.turning) * SIZE;
  int64_t two = one + (turns ? a.distance : a.gap);
  if (two >= a.D) two = one;  // a place that nothing stands beside is copied twice

  const bool keys = group >= a.q_groups;
  const RopeTensor& x = a.x[keys];
  int head = static_cast<int>(group - (keys ? a.q_groups : 0)) * a.group_heads;
  const int end = head + a.group_heads < x.heads ? head + a.group_heads : x.heads;
  const T* in = static_cast<const T*>(x.in) + batch * x.in_batch + position * x.in_position + head * x.in_head;
  T* out = static_cast<T*>(x.out) + batch * x.out_batch + position * x.out_position + head * x.out_head;
  Place places[HEADS][2] = {};
  const auto load = [&] {
    FASTLM_UNROLL
    for (int i = 0; i < HEADS; ++i) {
      if (i > 0 && head + i >= end) break;
      places[i][0].load(in + i * x.in_head + one);
      places[i][1].load(in + i * x.in_head + two);
    }
  };
  load();  // before anything waits for the tables

  float cos[SIZE] = {}, sin[SIZE] = {};
  if (turns) {
    constexpr int COUNT = INTERLEAVED ? SIZE / 2 : SIZE;
    int64_t at[SIZE / COUNT];
    FASTLM_UNROLL
    for (int i = 0; i < SIZE / COUNT; ++i) {
      const int64_t pair = INTERLEAVED ? (i == 0 ? one : two) / 2 : static_cast<int64_t>(unit) * SIZE;
      at[i] = batch * a.table_batch + position * a.table_position + pair;
    }
    if (WIDE && a.table == ROPE_WIDE_FLOAT32) {
      read<COUNT, WIDE, float>(a, at, cos, sin);
    } else if (WIDE && a.table == ROPE_WIDE_SAME) {
      read<COUNT, WIDE, T>(a, at, cos, sin);
    } else if (a.table == 0) {
      read<COUNT, false, float>(a, at, cos, sin);
    } else if (a.table == 1) {
      read<COUNT, false, bfloat16>(a, at, cos, sin);
    } else {
      read<COUNT, false, float16>(a, at, cos, sin);
    }
    FASTLM_UNROLL
    for (int i = 0; i < SIZE; ++i) sin[i] *= a.sign;
  }

  while (true) {
    FASTLM_UNROLL
    for (int i = 0; i < HEADS; ++i) {
      if (i > 0 && head + i >= end) return;
      float p[SIZE], q[SIZE];
      places[i][0].read(p);
      places[i][1].read(q);
      if (turns) {
        FASTLM_UNROLL
        for (int j = 0; j < SIZE; ++j) {
          if constexpr (!INTERLEAVED) {
            turn(p[j], q[j], cos[j], sin[j]);
          } else if (j % 2 == 0) {
            turn(p[j], p[j + 1], cos[j / 2], sin[j / 2]);
            turn(q[j], q[j + 1], cos[(SIZE + j) / 2], sin[(SIZE + j) / 2]);
          }
        }
      }
      Place::store(out + i * x.out_head + one, p);
      Place::store(out + i * x.out_head + two, q);
    }
    head += HEADS;
    if (head >= end) return;
    in += HEADS * x.in_head;
    out += HEADS * x.out_head;
    load();
  }
}

FASTLM_KERNEL(rope, 0, ROPE_THREADS, 4, RopeArguments, rope_kernel<Scalar, false, false>)
FASTLM_KERNEL(rope, 1, ROPE_THREADS, 4, RopeArguments, rope_kernel<Scalar, true, false>)
FASTLM_KERNEL(rope, 2, ROPE_THREADS, 4, RopeArguments, rope_kernel<Scalar, true, true>)

}  // namespace fastlm::cuda

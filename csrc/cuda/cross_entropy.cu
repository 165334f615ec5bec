// cross_entropy: loss, and with it the gradient, from logits that are read from memory once.
//
// 1. prepare: the sum of the rows' class weights, which a mean divides by, as up to 128 partial sums; whoever needs it
//    adds those up. It also sets the counter below to 0.
// 2. narrow, rows of up to 2 KB: each in the registers of a group of lanes, 1 to 32, with up to 64 bytes a lane, many
//    rows a block. wide, longer rows: a block, or on sm_90 and newer a cluster of 2, 4 or 8, brings its row to shared
//    memory by 16-byte copies (cp.async), sums up what has come, and makes the gradient from shared memory.
// 3. The last block to end adds up what all left, in a fixed order: no third launch, and the same bits every time.
// The arithmetic of a row stands in log_sum_exp.cuh.
//
// Bytes: logits read, gradients written, labels 8 a row. A row that does not fit is read a second time, but for the
// rounds that stay (`keep`) and the last three, still in the ring of copies: from L2, where the plan lets it lie.
//
// Layout of wide: a thread's round is two words of 16 bytes, a block apart, three rounds on their way at once: 48 KB
// for 512 threads. A thread reads back only what it copied itself, so the stream needs no barrier; a row has one, at
// which warps exchange their sums, a cluster one more, for reading each other's. The gradient walks backwards. Up to 7
// logits before the first 16 bytes of a row and behind the last (V = 50257 puts every row elsewhere) are one warp's,
// element by element. Where gradient rows begin on other bytes than the logits' rows, lanes store single neighbouring
// elements.
//
// Floor: at 4.8 TB/s each of an H200's 132 SMs moves 36 bytes a nanosecond, in and out. Half of that read, at 0.8 us:
// 15 KB must be on their way to an SM, 29 KB while the others write. V = 50304 in bfloat16: 201 KB a row take 5.5 us an
// SM, so 11 us for each of the two blocks that its 227 KB hold. A block alone needs about 7: 0.8 us for the label, 0.8
// until data come, 2 for 1.06 exponentials a logit at 16 a cycle and 1.8 GHz, 0.5 for the exchange, 1.8 for the
// gradient's exponentials, a block's start. So loads of one block meet stores of the other, and larger V is split so
// that two blocks an SM fit again. 5.1 bfloat16 logits a cycle and SM need 10.5 exponentials of 16, and at 9 and 8
// instructions a logit in the two passes (of which 5 each are arithmetic) 87 of 128 lanes.
//
// Not built, by arithmetic: exponentials kept for the second pass: as bfloat16 they lose accuracy, as float32 the room.
// A block that loads its next row while it writes this one: two blocks do the same. A row in registers: 64 logits a
// thread leave one block an SM. Bulk copies: sm_90 alone, and save a tenth of the instructions.
// Tried and lost, on instructions of sm_90a (no GPU figure stands behind any of this): a ring indexed by a remainder,
// pointers of 64 bits into shared memory, a comparison with the row's end and the label for each logit, which made 18
// and 13 instructions a logit of the 9 and 8; the row's ticket (atomicInc) behind the gradient, whose stores it would
// wait for.
//
// Never run on a GPU.
#include "cuda/cross_entropy.h"

#include "cuda/log_sum_exp.cuh"

namespace fastlm::cuda {

using Arguments = CrossEntropyArguments;
using Scratch = CrossEntropyScratch;
constexpr int ROUND = CROSS_ENTROPY_ROUND, STAGES = CROSS_ENTROPY_STAGES;

// --- rows ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float class_weight(const Arguments& a, int64_t i) {
  if (a.weight_dtype == DType::float32) return static_cast<const float*>(a.weight)[i];
  if (a.weight_dtype == DType::bfloat16) return to_float(static_cast<const bfloat16*>(a.weight)[i]);
  return to_float(static_cast<const float16*>(a.weight)[i]);
}

struct Label {
  bool kept;     // the row counts
  int at;        // 0 where it is ignored or wrong
  float weight;  // of the row: 0 where it is ignored, NaN where it is wrong
};

__device__ __forceinline__ Label labelled(const Arguments& a, int64_t row) {
  const int64_t given = a.target[row * a.target_stride];
  const bool kept = given != a.ignore_index, right = given >= 0 && given < a.v;
  if (!kept || !right) return {kept, 0, kept ? not_a_number() : 0};
  return {true, static_cast<int>(given), a.weight == nullptr ? 1 : class_weight(a, given)};
}

/// A sum that prepare left in parts; every lane of the warp gets it.
__device__ __forceinline__ float prepared(const Arguments& a, int which) {
  float sum = 0;
  for (int i = threadIdx.x % 32; i < a.partials; i += 32) sum += a.scratch[which + i];
  return warp_reduce(sum, Sum());
}

/// Sum over the block, for every thread; room: a float for each warp.
__device__ __forceinline__ float block_sum(float value, float* room) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  value = warp_reduce(value, Sum());
  if (lane == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_reduce(lane < warps ? room[lane] : 0, Sum());
  __syncthreads();
  return value;
}

template <bool GENERAL>
__device__ __forceinline__ LossOptions loss_options(const Arguments& a) {
  LossOptions o{GENERAL ? a.smoothing : 0, GENERAL ? a.share : 0, a.z_loss, 0};
  if (GENERAL && a.smoothing != 0) {
    o.whole = a.weight == nullptr ? static_cast<float>(a.v) : prepared(a, Scratch::CLASS_WEIGHTS);
  }
  return o;
}

/// What a row's gradient is multiplied by; total: what a mean divides by.
__device__ __forceinline__ float gradient_scale(const Arguments& a, int64_t row, float total) {
  const float dy = a.dy == nullptr ? 1 : a.dy[row * a.dy_stride];
  return a.mean ? dy / total : dy;
}

__device__ __forceinline__ void store_stats(const Arguments& a, int64_t row, const RowLoss& loss) {
  a.stats[row] = loss.top;
  a.stats[a.m + row] = loss.log_sum;
  a.stats[2 * a.m + row] = loss.rest_share;
}
__device__ __forceinline__ RowLoss load_stats(const Arguments& a, int64_t row) {
  return {0, a.stats[row], a.stats[a.m + row], a.stats[2 * a.m + row]};
}

/// z[t]; 0 where the row is ignored.
template <bool GENERAL>
__device__ __forceinline__ float label_logit(const Arguments& a, const Scalar* x, const Label& label) {
  if (!label.kept) return 0;
  const float z = to_float(x[label.at]);
  return GENERAL ? capped(z, a.softcap) : z;
}

/// z of a column; takes it into the sum of all classes under smoothing.
__device__ __forceinline__ float pull(const Arguments& a, LogSum& sum, float x, float pivot, int64_t column) {
  const float z = capped(x, a.softcap);
  if (a.smoothing != 0) sum.pulled += (z - pivot) * (a.weight == nullptr ? 1 : class_weight(a, column));
  return z;
}

/// The gradient of one logit, the label's being in place of z where own.
template <bool GENERAL>
__device__ __forceinline__ float slope(const Arguments& a, const RowGradient& g, float x, int64_t column, bool own) {
  const float z = GENERAL ? capped(x, a.softcap) : x, p = softmax(z, g);
  float d = own ? p * g.extra - g.pull_rest : p * g.push;
  if constexpr (GENERAL) {
    if (a.smoothing != 0) d -= a.weight == nullptr ? g.spread : g.spread * class_weight(a, column);
    if (a.softcap > 0) {
      const float u = z / a.softcap;
      d *= 1 - u * u;
    }
  }
  return d;
}

/// Thread 0 leaves its block's loss for the last of `blocks` blocks to add up; whether this is it. Before the gradient,
/// whose stores this would otherwise wait for.
__device__ __forceinline__ bool leave(const Arguments& a, float loss, int64_t at, unsigned blocks) {
  a.scratch[Scratch::LOSSES + at] = loss;
  __threadfence();
  return atomicInc(reinterpret_cast<unsigned*>(a.scratch), blocks - 1) == blocks - 1;
}

/// Every thread of the block, `last` being what leave() gave thread 0: the last block adds up `count` losses.
__device__ __forceinline__ void finish(const Arguments& a, bool last, int64_t count, float total, float* room) {
  if (!__syncthreads_or(last)) return;
  __threadfence();
  const volatile float* losses = a.scratch + Scratch::LOSSES;
  constexpr int AHEAD = 8;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += AHEAD * blockDim.x) {
    float part[AHEAD];
    FASTLM_UNROLL
    for (int k = 0; k < AHEAD; ++k) part[k] = i + k * blockDim.x < count ? losses[i + k * blockDim.x] : 0;
    FASTLM_UNROLL
    for (int k = 0; k < AHEAD; ++k) sum += part[k];
  }
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) *a.loss = a.mean ? sum / total : sum;
}

// --- prepare, scale --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void cross_entropy_prepare(const Arguments& a) {
  float* room = shared<float>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, step = a.partials * blockDim.x;
  float rows = 0, classes = 0;
  if (a.mean) {
    for (int64_t row = first; row < a.m; row += step) rows += labelled(a, row).weight;
  }
  if (a.smoothing != 0 && a.weight != nullptr) {
    for (int64_t i = first; i < a.v; i += step) classes += class_weight(a, i);
  }
  rows = block_sum(rows, room);
  classes = block_sum(classes, room);
  if (threadIdx.x != 0) return;
  a.scratch[Scratch::ROW_WEIGHTS + blockIdx.x] = rows;
  a.scratch[Scratch::CLASS_WEIGHTS + blockIdx.x] = classes;
  if (blockIdx.x != 0) return;
  *reinterpret_cast<unsigned*>(a.scratch) = 0;
  if (a.m == 0 && a.reduced) *a.loss = a.mean ? not_a_number() : 0;  // no block will
}

/// x *= factor for a.v elements at a.out, *a.dy being the factor, which is nearly always 1: then nothing is touched.
template <class T>
__device__ __forceinline__ void cross_entropy_scale(const Arguments& a) {
  constexpr int K = WIDTH<T>;
  const float factor = *a.dy;
  if (factor == 1) return;  // not NaN
  T* x = static_cast<T*>(a.out);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, words = a.aligned ? a.v / K : 0;

  for (int64_t i = first; i < words; i += step) {
    float value[K];
    unpack<T>(load_words(x + i * K), value);
    FASTLM_UNROLL
    for (int k = 0; k < K; ++k) value[k] *= factor;
    store_words(x + i * K, pack<T>(value));
  }
  for (int64_t i = words * K + first; i < a.v; i += step) x[i] = round_to<T>(to_float(x[i]) * factor);
}

/// 16 bytes of elements that were read one by one.
__device__ __forceinline__ Words join(const float (&x)[4]) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}
template <class T>
__device__ __forceinline__ Words join(const T (&x)[8]) {
  const auto pair = [&](int i) { return x[i].bits | static_cast<uint32_t>(x[i + 1].bits) << 16; };
  return {pair(0), pair(2), pair(4), pair(6)};
}

// --- narrow ----------------------------------------------------------------------------------------------------------

/// A group of lanes holds a row. Rows of whole words: word w of a lane is word lane + w * group of the row. Else a
/// lane's elements lie `group` apart, so that neighbouring lanes access neighbouring elements. In both a lane has the
/// first `count` of its elements, and the label's, if it has it, is number `own`. Which it is depends on V alone, so
/// that the bits do not depend on where rows lie.
template <class T, bool GENERAL, int WORDS>
__device__ __forceinline__ void cross_entropy_narrow(const Arguments& a) {
  constexpr int K = WIDTH<T>;
  const int group = 1 << a.group, lane = threadIdx.x & (group - 1), v = static_cast<int>(a.v);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (CROSS_ENTROPY_NARROW >> a.group) + (threadIdx.x >> a.group);
  const bool inside = at < a.m;
  const int64_t row = inside ? at : 0;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const int units = a.words ? v / K : v, unit = a.words ? K : 1;
  const int count = ((units - lane + group - 1) >> a.group) * unit;  // 0 for lanes behind the row's end
  const int mine = lane * unit, leap = K << a.group, step = a.words ? 1 : group;
  const auto column = [&](int i) { return mine + i / K * leap + i % K * step; };

  Words held[WORDS];  // as they were read: unpacked twice, which is cheaper than twice the registers
  FASTLM_UNROLL
  for (int w = 0; w < WORDS; ++w) {
    held[w] = {0, 0, 0, 0};
    if (!inside) continue;
    if (a.aligned) {
      if (w * K < count) held[w] = load_words(x + mine + w * leap);
    } else {
      T elements[K] = {};
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        if (w * K + k < count) elements[k] = x[column(w * K + k)];
      }
      held[w] = join(elements);
    }
  }
  const Label label = labelled(a, row);
  const bool kept = label.kept && inside;
  const int own_unit = a.words ? label.at / K : label.at;
  const int own = (own_unit & (group - 1)) == lane ? (own_unit >> a.group) * unit + label.at % unit : -1;
  const LossOptions o = loss_options<GENERAL>(a);
  const float total = a.mean ? prepared(a, Scratch::ROW_WEIGHTS) : 1;

  RowLoss loss{};
  bool last = false;
  if (a.loss != nullptr) {
    const float own_z = label_logit<GENERAL>(a, x, label), pivot = finite_or_zero(own_z);
    LogSum sum;
    FASTLM_UNROLL
    for (int w = 0; w < WORDS; ++w) {
      float z[1][K];
      unpack<T>(held[w], z[0]);
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        const int i = w * K + k;
        if constexpr (GENERAL) {
          if (kept && i < count) z[0][k] = pull(a, sum, z[0][k], pivot, column(i));
        }
        if (i >= count || i == own) z[0][k] = minus_infinity();
      }
      add(sum, z);
    }
    reduce(sum, group, GENERAL);
    loss = row_loss(sum, own_z, label.weight, o);
    if (!kept) loss = RowLoss{};
    if (inside && lane == 0) {
      store_stats(a, row, loss);
      if (!a.reduced) a.loss[row] = loss.value;
    }
    if (a.reduced) {
      const float sum = block_sum(lane == 0 ? loss.value : 0, shared<float>());
      if (threadIdx.x == 0) last = leave(a, sum, blockIdx.x, gridDim.x);
    }
  } else {
    loss = load_stats(a, row);
  }

  if (a.out != nullptr) {
    __syncwarp();  // out may be x: every lane has read its label's logit
    const RowGradient g = row_gradient(loss, label.weight, gradient_scale(a, row, total), o);
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    FASTLM_UNROLL
    for (int w = 0; w < WORDS; ++w) {
      float d[K];
      unpack<T>(held[w], d);
      FASTLM_UNROLL
      for (int k = 0; k < K; ++k) {
        const int i = w * K + k;
        d[k] = kept && i < count ? slope<GENERAL>(a, g, d[k], column(i), i == own) : 0;
        if (!a.aligned && inside && i < count) out[column(i)] = round_to<T>(d[k]);
      }
      if (a.aligned && inside && w * K < count) store_words(out + mine + w * leap, pack<T>(d));
    }
  }

  if (a.loss != nullptr && a.reduced) finish(a, last, gridDim.x, total, shared<float>());
}

// --- wide ------------------------------------------------------------------------------------------------------------

/// The sums of all threads of the row's blocks, for each of them. One barrier, and two of the cluster, the second one
/// of which is only arrived at.
__device__ __forceinline__ void reduce_row(LogSum& sum, int parts, bool pulled) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  LogSum* room = shared<LogSum>();
  reduce(sum, 32, pulled);
  if (lane == 0) room[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = lane < warps ? room[lane] : LogSum();
  reduce(sum, 32, pulled);
  if (parts == 1) return;
  LogSum* mine = room + CROSS_ENTROPY_WIDE / 32;
  if (threadIdx.x == 0) *mine = sum;
  cluster_sync();
  sum = lane < parts ? *cluster_peer(mine, lane) : LogSum();
  reduce(sum, 32, pulled);
  cluster_begin();
}

/// Where a part of a row lies.
template <class T>
struct Span {
  const T* body;   // its first word
  int first;       // column of that
  int words;       // of 16 bytes
  int head, tail;  // columns before the row's first word and behind its last

  /// The one of those columns that is this thread's, or -1: they are the first warp's of the row's first part.
  __device__ __forceinline__ int edge(int part, int v) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (part != 0 || thread >= 32) return -1;
    if (thread < head) return thread;
    return thread >= 16 && thread < 16 + tail ? v - tail + thread - 16 : -1;
  }
};

template <class T>
__device__ __forceinline__ Span<T> span_of(const T* x, int v, int part, int parts) {
  constexpr int K = WIDTH<T>;
  const int apart = static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int head = apart == 0 ? 0 : (K - apart < v ? K - apart : v), words = (v - head) / K;
  const int share = (words + parts - 1) / parts, begin = part * share;
  const int count = words - begin < share ? words - begin : share;
  const int first = head + begin * K;
  return {x + first, first, count < 0 ? 0 : count, head, v - head - words * K};
}

template <class T, bool GENERAL>
__device__ __forceinline__ void cross_entropy_wide(const Arguments& a) {
  constexpr int K = WIDTH<T>;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x / a.parts;
  const int part = static_cast<int>(blockIdx.x % a.parts), v = static_cast<int>(a.v);
  const Label label = labelled(a, row);
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const Span<T> span = span_of(x, v, part, a.parts);
  const int edge = span.edge(part, v), step = ROUND * threads;
  const int rounds = (span.words + step - 1) / step, words = label.kept ? span.words : 0;  // an ignored row is not read
  // The label's column and word in this part, and its round, where it is this thread's.
  const int own_at = label.at - span.first, own_word = own_at / K;
  const int own_round = own_at >= 0 && own_word % threads == thread ? own_word / step : -1;

  // A round's slot in shared memory. The last STAGES of what does not fit lie in a ring behind what is kept.
  const uint32_t line = 16 * threads, round = ROUND * line;  // bytes of a word of every thread; of a round
  const uint32_t kept = shared_address(shared<Words>(CROSS_ENTROPY_ROOM) + thread);
  const uint32_t ring = kept + a.keep * round, end = ring + STAGES * round;
  const auto slot = [&](int i) { return i < a.keep ? kept + i * round : ring + (i - a.keep) % STAGES * round; };
  const Words* const body = reinterpret_cast<const Words*>(span.body);
  // Every call makes a group, so that counting groups is counting rounds.
  const auto fetch = [&](uint32_t to, int word) {
    FASTLM_UNROLL
    for (int u = 0; u < ROUND; ++u) {
      if (word + u * threads < words) copy_async(to + u * line, body + (word + u * threads));
    }
    copy_commit();
  };
  for (int k = 0; k < STAGES; ++k) {
    const int i = a.loss != nullptr || rounds < STAGES ? k : rounds - 1 - k;
    fetch(slot(i), i * step + thread);
  }

  const LossOptions o = loss_options<GENERAL>(a);
  const float total = a.mean ? prepared(a, Scratch::ROW_WEIGHTS) : 1;
  RowLoss loss{};
  bool last = false;
  if (a.loss != nullptr) {
    const float own_z = label_logit<GENERAL>(a, x, label), pivot = finite_or_zero(own_z);
    LogSum sum;
    uint32_t from = kept, to = slot(STAGES);
    int word = thread;
    for (int i = 0; i < rounds; ++i, word += step) {
      copy_wait<STAGES - 1>();
      // Nearly all rounds are whole and without the label: a path without a comparison for each logit.
      if (!GENERAL && i != own_round && word + (ROUND - 1) * threads < words) {
        float z[ROUND][K];
        FASTLM_UNROLL
        for (int u = 0; u < ROUND; ++u) unpack<T>(load_shared(from + u * line), z[u]);
        add(sum, z);
      } else {
        for (int u = 0; u < ROUND && word + u * threads < words; ++u) {
          float z[1][K];
          unpack<T>(load_shared(from + u * line), z[0]);
          const int column = span.first + (word + u * threads) * K;
          FASTLM_UNROLL
          for (int k = 0; k < K; ++k) {
            if constexpr (GENERAL) z[0][k] = pull(a, sum, z[0][k], pivot, column + k);
            if (column + k == label.at) z[0][k] = minus_infinity();
          }
          add(sum, z);
        }
      }
      fetch(to, word + STAGES * step);
      from = from + round == end ? ring : from + round;
      to = to + round == end ? ring : to + round;
    }
    if (edge >= 0 && label.kept) {
      const float z = GENERAL ? pull(a, sum, to_float(x[edge]), pivot, edge) : to_float(x[edge]);
      add(sum, {{edge == label.at ? minus_infinity() : z}});
    }
    reduce_row(sum, a.parts, GENERAL);
    loss = row_loss(sum, own_z, label.weight, o);
    if (!label.kept) loss = RowLoss{};
    if (thread == 0 && part == 0) {
      store_stats(a, row, loss);
      if (a.reduced) {
        last = leave(a, loss.value, row, gridDim.x / a.parts);
      } else {
        a.loss[row] = loss.value;
      }
    }
  } else {
    loss = load_stats(a, row);
  }

  if (a.out != nullptr) {
    const RowGradient g = row_gradient(loss, label.weight, gradient_scale(a, row, total), o);
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    if (reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(out) % 16) {
      Words* const words_out = reinterpret_cast<Words*>(out + span.first);
      uint32_t from = rounds > 0 ? slot(rounds - 1) : kept;
      int word = (rounds - 1) * step + thread;
      for (int i = rounds - 1; i >= 0; --i, word -= step) {
        const bool more = i - STAGES >= a.keep;
        if (more) {
          copy_wait<STAGES - 1>();
        } else {
          copy_wait<0>();
        }
        Words* const to = words_out + word;
        if (!GENERAL && i != own_round && word + (ROUND - 1) * threads < words) {
          FASTLM_UNROLL
          for (int u = 0; u < ROUND; ++u) {
            float value[K];
            unpack<T>(load_shared(from + u * line), value);
            FASTLM_UNROLL
            for (int k = 0; k < K; ++k) value[k] = softmax(value[k], g) * g.push;
            store_words_once(to + u * threads, pack<T>(value));
          }
        } else {
          for (int u = 0; u < ROUND && word + u * threads < span.words; ++u) {
            const int column = span.first + (word + u * threads) * K;
            float value[K] = {};
            if (label.kept) {
              unpack<T>(load_shared(from + u * line), value);
              FASTLM_UNROLL
              for (int k = 0; k < K; ++k) value[k] = slope<GENERAL>(a, g, value[k], column + k, column + k == label.at);
            }
            store_words_once(to + u * threads, pack<T>(value));
          }
        }
        if (more) fetch(from, word - STAGES * step);
        from = (from == ring && i > a.keep ? end : from) - round;
      }
    } else {
      constexpr int AHEAD = 8;
      const int elements = span.words * K, here = a.loss == nullptr ? 0 : a.keep * step * K;
      const T* near = shared<T>(CROSS_ENTROPY_ROOM);
      for (int first = thread; first < elements; first += AHEAD * threads) {
        float d[AHEAD];
        FASTLM_UNROLL
        for (int n = 0; n < AHEAD; ++n) {
          const int i = first + n * threads;
          d[n] = label.kept && i < elements ? to_float(i < here ? near[i] : span.body[i]) : 0;
        }
        FASTLM_UNROLL
        for (int n = 0; n < AHEAD; ++n) {
          const int i = first + n * threads;
          if (label.kept && i < elements) d[n] = slope<GENERAL>(a, g, d[n], span.first + i, i == own_at);
          if (i < elements) out[span.first + i] = round_to<T>(d[n]);
        }
      }
    }
    if (edge >= 0) {
      const float d = label.kept ? slope<GENERAL>(a, g, to_float(x[edge]), edge, edge == label.at) : 0;
      out[edge] = round_to<T>(d);
    }
  }

  if (a.loss == nullptr) return;
  if (a.reduced && part == 0) finish(a, last, a.m, total, shared<float>());
  if (a.parts > 1) cluster_wait();
}

FASTLM_KERNEL(cross_entropy_prepare, 0, 512, 2, Arguments, cross_entropy_prepare)
FASTLM_KERNEL(cross_entropy_scale, 0, 256, 4, Arguments, cross_entropy_scale<Scalar>)
FASTLM_KERNEL(cross_entropy_narrow, 0, 256, 4, Arguments, cross_entropy_narrow<Scalar, false, 1>)
FASTLM_KERNEL(cross_entropy_narrow, 1, 256, 3, Arguments, cross_entropy_narrow<Scalar, false, CROSS_ENTROPY_WORDS>)
FASTLM_KERNEL(cross_entropy_narrow, 2, 256, 4, Arguments, cross_entropy_narrow<Scalar, true, 1>)
FASTLM_KERNEL(cross_entropy_narrow, 3, 256, 2, Arguments, cross_entropy_narrow<Scalar, true, CROSS_ENTROPY_WORDS>)
FASTLM_KERNEL(cross_entropy_wide, 0, 512, 2, Arguments, cross_entropy_wide<Scalar, false>)
FASTLM_KERNEL(cross_entropy_wide, 2, 512, 2, Arguments, cross_entropy_wide<Scalar, true>)

}  // namespace fastlm::cuda

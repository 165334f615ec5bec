// Softmax cross-entropy over class indices. The formula stands in fastlm/ops/cross_entropy.py.
//   forward   per row, in blocks that stay in the first-level cache: the block's maximum, then e = exp(z - largest so
//             far) and its sum, the target left out; e goes to a scratch row that stays in the second-level cache. When
//             the row is read, its gradient is e * (softmax coefficient * exp(block's reference - largest) / sum): one
//             exp per element, and no second read of the logits. Without a gradient e is not kept.
//   backward  (where the forward made no gradient) one read, one exp, one write, from the saved statistics
//   accuracy  the target is left out of the sum, so that loss and gradient of a row that is nearly certain come from
//             log1p(rest) and -rest / sum instead of the difference of nearly equal numbers
//   memory    forward reads the logits once and writes the gradient once, past the cache where it is large; backward
//             the same
//   parallel  blocks of rows; a row's result does not depend on its thread, the sum of losses is taken in row order
//   slices    for a head that never holds whole rows: what was read of a row is kept between slices of its classes, and
//             the backward writes a slice's gradient once more, transposed: with a transposed left side torch's
//             bfloat16 product runs at half its rate
//   papers    Milakov and Gimelshein 2018 (arXiv:1805.02867) for the running maximum
//   lost      a running maximum per lane with two exp per element: slower for bfloat16, where exp is the limit
#include <type_traits>

#include "fastlm.h"
#include "parallel.h"
#include "simd_math.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t BLOCK = cross_entropy_block;
constexpr int64_t FEW = 256;     // classes up to which every vector is masked: no branch on the label
constexpr float LOWEST = -87.f;  // exp below this is 0: a float's normal numbers end there
constexpr int64_t STREAM_BYTES = int64_t(32) << 20;  // outputs that no cache keeps until they are read

/// e^x for x <= about 0, 0 below LOWEST.
template <class T>
inline Vec exp_negative(Vec x) {
  const Vec p = exp2<T>(x * 1.44269504f, Vec{});
  return x < splat(LOWEST) ? Vec{} : p;  // NaN passes through
}

/// z = softcap * tanh(x / softcap), or x.
template <bool CAP>
struct Cap {
  float softcap, inverse;
  explicit Cap(float cap) : softcap(cap), inverse(CAP ? 1.f / cap : 0.f) {}
  Vec operator()(Vec x) const {
    if constexpr (CAP) return tanh(x * inverse) * softcap;
    return x;
  }
  float operator()(float x) const { return CAP ? (*this)(splat(x))[0] : x; }
  Vec slope(Vec x) const {
    const Vec t = tanh(x * inverse);
    return 1.f - t * t;
  }
};

inline Int lanes() {
  Int index;
  for (int i = 0; i < W; ++i) index[i] = i;
  return index;
}

template <class T>
inline float value_of(const T* p) {
  return load_n(p, 1)[0];
}

template <class T>
float largest(const T* x, int64_t n) {  // NaN is passed over here and met again in the sum
  Vec a = splat(-INFINITY), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = vmax(load(x + i), a);
    b = vmax(load(x + i + W), b);
    c = vmax(load(x + i + 2 * W), c);
    d = vmax(load(x + i + 3 * W), d);
  }
  for (; i + W <= n; i += W) a = vmax(load(x + i), a);
  if (i < n) a = vmax(load_n(x + i, n - i, -INFINITY), a);
  return max(vmax(vmax(a, b), vmax(c, d)));
}

struct Row {
  float top = -INFINITY;  // largest z
  double others = 0.;     // sum of exp(z - top) but for the target
  double spread = 0.;     // sum of w * (z - origin), for label smoothing
  float origin = 0.f;
};

/// One pass over V logits of a row, the first of it where `fresh`; row is what was read before them. Keeps
/// e = exp(z - tops[block]) when KEEP, with 0 at the target.
template <bool CAP, bool SMOOTH, bool KEEP, class T>
Row read_row(const T* x, int64_t V, int64_t target, const Cap<CAP>& cap, const float* weight, float* e, float* tops,
             Row row = {}, bool fresh = true) {
  const Int index = lanes();
  for (int64_t begin = 0, block = 0; begin < V; begin += BLOCK, ++block) {
    const int64_t n = V - begin < BLOCK ? V - begin : BLOCK;
    const T* xb = x + begin;
    float* eb = e + begin;
    const float here = cap(largest(xb, n));
    if (here > row.top) {
      row.others *= std::exp(double(row.top) - here);
      row.top = here;
    }
    const float base = row.top == -INFINITY ? 0.f : row.top;
    if (fresh && begin == 0) row.origin = base;
    if (KEEP) tops[block] = base;
    Vec total[2] = {}, spread{};
    const auto whole = [&](int64_t i, Vec& sum) {
      // The next block, or the next row, is on its way while this one is worked on.
      if (sizeof(T) == 4 || i % (2 * W) == 0) __builtin_prefetch(xb + i + BLOCK);
      const Vec z = cap(load(xb + i));
      const Vec v = exp_negative<T>(z - base);
      sum += v;
      if (KEEP) store(eb + i, v);
      if (SMOOTH) spread += weight ? load(weight + begin + i) * (z - row.origin) : z - row.origin;
    };
    const auto part = [&](int64_t i, auto count, int64_t without) {
      const Vec z = cap(load(xb + i, count));
      const Vec v = index < int32_t(count) && index != int32_t(without) ? exp_negative<T>(z - base) : Vec{};
      total[0] += v;
      if (KEEP) store(eb + i, v, count);
      if (SMOOTH) {
        const Vec w = weight ? load(weight + begin + i, count) : splat(1.f);
        spread += index < int32_t(count) ? w * (z - row.origin) : Vec{};
      }
    };
    const int64_t t = target - begin;
    if (n <= FEW) {
      for_vectors(n, [&](int64_t i, auto count) { part(i, count, t - i); });
      row.others += sum(total[0]);
      if (SMOOTH) row.spread += sum(spread);
      continue;
    }
    const bool inside = t >= 0 && t < n;
    const int64_t stop = inside ? t / W * W : n / W * W;
    int64_t i = 0;
    const auto run = [&](int64_t end) {
      for (; i + 2 * W <= end; i += 2 * W) {
        whole(i, total[0]);
        whole(i + W, total[1]);
      }
      for (; i + W <= end; i += W) whole(i, total[0]);
    };
    run(stop);
    if (inside) {
      part(i, n - i < W ? n - i : W, t - i);
      i += W;
      run(n);
    }
    if (i < n) part(i, n - i, -1);
    row.others += sum(total[0] + total[1]);
    if (SMOOTH) row.spread += sum(spread);
  }
  return row;
}

/// out[i] = make(i, n) for i in [0, n): past the cache where asked.
template <class T, class F>
void write(T* out, int64_t n, bool past_cache, F make) {
  int64_t i = 0;
  constexpr int64_t line = sizeof(Vec) / sizeof(T);
  if (past_cache && reinterpret_cast<uintptr_t>(out) % sizeof(T) == 0) {
    const int64_t skew = reinterpret_cast<uintptr_t>(out) % sizeof(Vec) / sizeof(T);
    int64_t head = skew ? line - skew : 0;
    if (head > n) head = n;
    for (; i < head; i += W) store_n(out + i, make(i, head - i < W ? head - i : W), head - i < W ? head - i : W);
    i = head;
    for (; i + line <= n; i += line) {
      if constexpr (line == W)
        stream(out + i, make(i, std::integral_constant<int64_t, W>{}));
      else
        stream(out + i, make(i, std::integral_constant<int64_t, W>{}),
               make(i + W, std::integral_constant<int64_t, W>{}));
    }
  }
  for (; i + W <= n; i += W) store(out + i, make(i, std::integral_constant<int64_t, W>{}));
  if (i < n) store_n(out + i, make(i, n - i), n - i);
}

struct Options {
  const float* weight;
  double weights;  // sum of weight, or V
  double uniform;  // smoothing / V
  float smoothing, z_loss, softcap;
};

/// What multiplies what in a row's gradient: push * softmax - share * w[c] - pull at the target.
struct Coefficients {
  double pull, push, share;
  Coefficients(const Options& o, int64_t target, double lse, double scale) {
    const double w = o.weight ? o.weight[target] : 1.;
    pull = scale * w * (1. - o.smoothing);
    share = scale * o.uniform;
    push = scale * (w * (1. - o.smoothing) + o.uniform * o.weights + 2. * o.z_loss * w * lse);
  }
  /// The target's own element, from miss = 1 - softmax, where the difference above would cancel.
  double at_target(double miss, double w) const { return (push - pull) * (1. - miss) - pull * miss - share * w; }
};

/// A row's loss, its statistics, and what its gradient is made of.
struct Conclusion {
  double base, total, miss, log_sum, lse, loss;
  Conclusion(const Row& row, double z_target, const Options& o, int64_t target) {
    base = row.top == -INFINITY ? 0. : double(row.top);
    const double own = exp_negative<float>(splat(float(z_target - base)))[0], w = o.weight ? o.weight[target] : 1.;
    total = row.others + own;
    miss = row.others / total;
    log_sum = own == 1. ? std::log1p(row.others) : std::log(total);
    lse = double(row.top) + log_sum;
    loss = w * (1. - o.smoothing) * ((double(row.top) - z_target) + log_sum);
    if (o.smoothing != 0.f) loss += o.uniform * (o.weights * ((double(row.top) - row.origin) + log_sum) - row.spread);
    if (o.z_loss != 0.f) loss += double(o.z_loss) * w * lse * lse;
  }
  void store(float* losses, float* stats, int64_t stats_stride, int64_t m, float top) const {
    losses[m] = static_cast<float>(loss);
    stats[m] = top;
    stats[stats_stride + m] = static_cast<float>(log_sum);
    stats[2 * stats_stride + m] = static_cast<float>(miss);
  }
};

inline void store_ignored(float* losses, float* stats, int64_t stats_stride, int64_t m) {
  losses[m] = stats[m] = stats[stats_stride + m] = stats[2 * stats_stride + m] = 0.f;
}

/// How rows are handed out: `rows` at a time, as many as a small number of logits makes, in multiples of `step`.
struct Shares {
  int64_t rows, items;
  Shares(int64_t M, int64_t V, int64_t step = 1) : rows(ceil_div(1 + 4096 / (V + 1), step) * step) {
    items = ceil_div(M, rows);
  }
};

template <bool CAP, bool SMOOTH, bool KEEP, class T>
void forward(const T* logits, int64_t stride, const int64_t* target, int64_t ignore_index, const Options& o,
             double scale, float* loss, float* stats, int64_t stats_stride, T* dlogits, int64_t dlogits_stride,
             float* scratch, int64_t M, int64_t V, int threads) {
  const Cap<CAP> cap(o.softcap);
  const bool in_place = static_cast<const void*>(dlogits) == static_cast<const void*>(logits);
  const bool past_cache = KEEP && !in_place && M * V * int64_t(sizeof(T)) > STREAM_BYTES;
  const Shares shares(M, V);
  parallel_items(threads, shares.items, [&](int64_t item, int thread) {
    float* const room = scratch + thread * cross_entropy_room(V);
    float* const tops = room + V;
    const int64_t last = (item + 1) * shares.rows < M ? (item + 1) * shares.rows : M;
    for (int64_t m = item * shares.rows; m < last; ++m) {
      const T* x = logits + m * stride;
      T* out = KEEP ? dlogits + m * dlogits_stride : nullptr;
      const int64_t t = target[m];
      if (t == ignore_index) {
        store_ignored(loss, stats, stats_stride, m);
        if (KEEP) std::memset(static_cast<void*>(out), 0, V * sizeof(T));
        continue;
      }
      float* e = room;
      if constexpr (std::is_same_v<T, float> && KEEP && !CAP)
        if (!past_cache) e = out;  // the gradient's own memory serves as scratch
      const float x_target = value_of(x + t);
      const Row row = read_row<CAP, SMOOTH, KEEP>(x, V, t, cap, o.weight, e, tops);
      const Conclusion end(row, cap(x_target), o, t);
      end.store(loss, stats, stats_stride, m, row.top);
      if constexpr (KEEP) {
        const Coefficients c(o, t, end.lse, scale);
        const float share = static_cast<float>(c.share);
        for (int64_t begin = 0, block = 0; begin < V; begin += BLOCK, ++block) {
          const int64_t n = V - begin < BLOCK ? V - begin : BLOCK;
          const double risen = tops[block] == end.base ? 1. : std::exp(tops[block] - end.base);
          const float factor = static_cast<float>(c.push * risen / end.total);
          const bool own_block = t >= begin && t < begin + n;
          write(out + begin, n, past_cache && !own_block, [&](int64_t i, auto count) {
            Vec d = load(e + begin + i, count) * factor;
            if (SMOOTH) d -= o.weight ? load(o.weight + begin + i, count) * share : splat(share);
            if (CAP) d *= cap.slope(load(x + begin + i, count));
            return d;
          });
        }
        Vec own_gradient = splat(static_cast<float>(c.at_target(end.miss, o.weight ? o.weight[t] : 1.)));
        if (CAP) own_gradient *= cap.slope(splat(x_target));
        store_n(out + t, own_gradient, 1);
      }
    }
    if (past_cache) stream_fence();
  });
}

/// What was read of a row, between two slices of its classes: largest z, others, spread, origin, z of the target.
struct State {
  double top, others, spread, origin, z_target;
};

template <bool CAP, bool SMOOTH, class T>
void read_slice(const T* logits, int64_t stride, const int64_t* target, int64_t ignore_index, const Options& o,
                State* states, float* loss, float* stats, int64_t stats_stride, int64_t M, int64_t first, int64_t count,
                int64_t V, int threads) {
  const Cap<CAP> cap(o.softcap);
  const Shares shares(M, count);
  const float* weight = o.weight ? o.weight + first : nullptr;
  parallel_items(threads, shares.items, [&](int64_t item, int) {
    const int64_t last = (item + 1) * shares.rows < M ? (item + 1) * shares.rows : M;
    for (int64_t m = item * shares.rows; m < last; ++m) {
      if (target[m] == ignore_index) {
        store_ignored(loss, stats, stats_stride, m);
        continue;
      }
      const T* x = logits + m * stride;
      const int64_t t = target[m] - first;
      State& state = states[m];
      Row row;
      if (first) row = {float(state.top), state.others, state.spread, float(state.origin)};
      row = read_row<CAP, SMOOTH, false>(x, count, t, cap, weight, nullptr, nullptr, row, first == 0);
      if (t >= 0 && t < count) state.z_target = cap(value_of(x + t));
      if (first + count == V)
        Conclusion(row, state.z_target, o, target[m]).store(loss, stats, stats_stride, m, row.top);
      else
        state = {row.top, row.others, row.spread, row.origin, state.z_target};
    }
  });
}

constexpr int64_t TILE = 32;  // rows and columns transposed at a time: a cache line of a half type

typedef uint16_t Eight __attribute__((vector_size(16)));

/// The transpose of 8 x 8 elements of 2 bytes.
inline void transpose_8x8(const uint16_t* in, int64_t stride, uint16_t* out, int64_t out_stride) {
  Eight a[8], b[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&a[i], in + i * stride, 16);
  const auto round = [](const Eight* from, Eight* to) {  // three perfect shuffles of the rows make the transpose
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = __builtin_shufflevector(from[i], from[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
  };
  round(a, b);
  round(b, a);
  round(a, b);
  for (int i = 0; i < 8; ++i) std::memcpy(out + i * out_stride, &b[i], 16);
}

/// out[c, r] = in[r, c] for rows x columns. By way of a tile of whole lines: rows that lie a power of two apart share
/// their place in the first-level cache, and a line written in pieces would come and go.
template <class T>
void transpose(const T* in, int64_t stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
  alignas(64) T tile[TILE * TILE];
  for (int64_t r = 0; r < rows; r += TILE)
    for (int64_t c = 0; c < columns; c += TILE) {
      const int64_t height = rows - r < TILE ? rows - r : TILE, width = columns - c < TILE ? columns - c : TILE;
      const T* from = in + r * stride + c;
      T* to = out + c * out_stride + r;
      if (sizeof(T) == 2 && height == TILE && width == TILE) {
        for (int i = 0; i < TILE; i += 8)
          for (int j = 0; j < TILE; j += 8)
            transpose_8x8(reinterpret_cast<const uint16_t*>(from + i * stride + j), stride,
                          reinterpret_cast<uint16_t*>(tile + j * TILE + i), TILE);
        for (int j = 0; j < TILE; ++j)
          std::memcpy(static_cast<void*>(to + j * out_stride), tile + j * TILE, sizeof(T) * TILE);
      } else {
        for (int64_t j = 0; j < width; ++j)
          for (int64_t i = 0; i < height; ++i) to[j * out_stride + i] = from[i * stride + j];
      }
    }
}

template <bool CAP, bool SMOOTH, class T>
void backward(const T* logits, int64_t stride, const int64_t* target, int64_t ignore_index, const Options& o,
              const float* stats, int64_t stats_stride, const float* dy, int64_t dy_stride, double scale, T* dlogits,
              int64_t dlogits_stride, T* transposed, int64_t transposed_stride, int64_t M, int64_t first, int64_t count,
              int threads) {
  const Cap<CAP> cap(o.softcap);
  const bool in_place = static_cast<const void*>(dlogits) == static_cast<const void*>(logits);
  const bool past_cache = !in_place && M * count * int64_t(sizeof(T)) > STREAM_BYTES;
  const Shares shares(M, count, transposed ? TILE : 1);
  const float* weight = o.weight ? o.weight + first : nullptr;
  parallel_items(threads, shares.items, [&](int64_t item, int) {
    const int64_t begin = item * shares.rows, last = begin + shares.rows < M ? begin + shares.rows : M;
    for (int64_t m = begin; m < last; ++m) {
      const T* x = logits + m * stride;
      T* out = dlogits + m * dlogits_stride;
      if (target[m] == ignore_index) {
        std::memset(static_cast<void*>(out), 0, count * sizeof(T));
        continue;
      }
      const int64_t t = target[m] - first;
      const bool inside = t >= 0 && t < count;
      const float top = stats[m], log_sum = stats[stats_stride + m], x_target = inside ? value_of(x + t) : 0.f;
      const Coefficients c(o, target[m], double(top) + log_sum, scale * dy[m * dy_stride]);
      const float push = static_cast<float>(c.push), share = static_cast<float>(c.share);
      const auto gradient = [&](int64_t i, auto n) {
        if (sizeof(T) == 4 || i % (2 * W) == 0) __builtin_prefetch(x + i + 1024);
        const Vec logit = load(x + i, n);
        Vec d = exp_negative<T>((cap(logit) - top) - log_sum) * push;
        if (SMOOTH) d -= weight ? load(weight + i, n) * share : splat(share);
        if (CAP) d *= cap.slope(logit);
        return d;
      };
      const int64_t own_begin = inside ? t / BLOCK * BLOCK : count;
      const int64_t own_end = own_begin + BLOCK < count ? own_begin + BLOCK : count;
      write(out, own_begin, past_cache, gradient);
      const auto from = [&](int64_t skipped) {
        return [&gradient, skipped](int64_t i, auto n) { return gradient(skipped + i, n); };
      };
      write(out + own_begin, own_end - own_begin, false, from(own_begin));
      write(out + own_end, count - own_end, past_cache, from(own_end));
      if (!inside) continue;
      Vec own = splat(static_cast<float>(c.at_target(stats[2 * stats_stride + m], weight ? weight[t] : 1.)));
      if (CAP) own *= cap.slope(splat(x_target));
      store_n(out + t, own, 1);
    }
    if (past_cache) stream_fence();
    if (transposed)
      transpose(dlogits + begin * dlogits_stride, dlogits_stride, transposed + begin, transposed_stride, last - begin,
                count);
  });
}

Options options_of(const float* weight, int64_t V, float smoothing, float z_loss, float softcap) {
  double weights = double(V);
  if (weight && smoothing != 0.f) {
    weights = 0.;
    for (int64_t c = 0; c < V; ++c) weights += weight[c];
  }
  return {weight, weights, smoothing / double(V), smoothing, z_loss, softcap};
}

template <class F>
void with_bool(bool value, F f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

}  // namespace

void cross_entropy_labels(const int64_t* target, const float* weight, int64_t ignore_index, double* total,
                          int64_t* wrong_row, int64_t M, int64_t V, int) {
  *total = 0.;
  *wrong_row = -1;
  for (int64_t m = 0; m < M; ++m) {
    const int64_t t = target[m];
    if (t == ignore_index) continue;
    if (t < 0 || t >= V) {
      *wrong_row = m;
      return;
    }
    *total += weight ? weight[t] : 1.;
  }
}

void cross_entropy_forward(DType dtype, const void* logits, int64_t stride, const int64_t* target, const float* weight,
                           int64_t ignore_index, float label_smoothing, float z_loss, float softcap, double scale,
                           float* loss, double* loss_sum, float* stats, int64_t stats_stride, void* dlogits,
                           int64_t dlogits_stride, float* scratch, int64_t M, int64_t V, int threads) {
  const Options o = options_of(weight, V, label_smoothing, z_loss, softcap);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_bool(softcap != 0.f, [&](auto capped) {
      with_bool(label_smoothing != 0.f, [&](auto smooth) {
        with_bool(dlogits != nullptr, [&](auto keep) {
          forward<capped.value, smooth.value, keep.value>(static_cast<const T*>(logits), stride, target, ignore_index,
                                                          o, scale, loss, stats, stats_stride, static_cast<T*>(dlogits),
                                                          dlogits_stride, scratch, M, V, M * V < 32768 ? 1 : threads);
        });
      });
    });
  });
  for (int64_t m = 0; m < M; ++m) *loss_sum += loss[m];
}

void cross_entropy_slice(DType dtype, const void* logits, int64_t stride, const int64_t* target, const float* weight,
                         int64_t ignore_index, float label_smoothing, float z_loss, float softcap, double* state,
                         float* loss, double* loss_sum, float* stats, int64_t stats_stride, int64_t M, int64_t first,
                         int64_t count, int64_t V, int threads) {
  const Options o = options_of(weight, V, label_smoothing, z_loss, softcap);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_bool(softcap != 0.f, [&](auto capped) {
      with_bool(label_smoothing != 0.f, [&](auto smooth) {
        read_slice<capped.value, smooth.value>(static_cast<const T*>(logits), stride, target, ignore_index, o,
                                               reinterpret_cast<State*>(state), loss, stats, stats_stride, M, first,
                                               count, V, M * count < 32768 ? 1 : threads);
      });
    });
  });
  if (first + count == V)
    for (int64_t m = 0; m < M; ++m) *loss_sum += loss[m];
}

void cross_entropy_backward(DType dtype, const void* logits, int64_t stride, const int64_t* target, const float* weight,
                            int64_t ignore_index, float label_smoothing, float z_loss, float softcap,
                            const float* stats, int64_t stats_stride, const float* dy, int64_t dy_stride, double scale,
                            void* dlogits, int64_t dlogits_stride, void* transposed, int64_t transposed_stride,
                            int64_t M, int64_t first, int64_t count, int64_t V, int threads) {
  const Options o = options_of(weight, V, label_smoothing, z_loss, softcap);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_bool(softcap != 0.f, [&](auto capped) {
      with_bool(label_smoothing != 0.f, [&](auto smooth) {
        backward<capped.value, smooth.value>(static_cast<const T*>(logits), stride, target, ignore_index, o, stats,
                                             stats_stride, dy, dy_stride, scale, static_cast<T*>(dlogits),
                                             dlogits_stride, static_cast<T*>(transposed), transposed_stride, M, first,
                                             count, M * count < 32768 ? 1 : threads);
      });
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

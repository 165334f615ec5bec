// Attention, backward: P is made again from Q, K and the saved lse (Dao et al. 2022, arXiv:2205.14135).
//   algorithm  an item is a share of the queries of one key head (all query heads of its group). K and V are packed
//              once; for each 64 queries and each tile of keys
//                S^T = K Q^T, dP^T = V dO^T, P^T = e^(S^T - lse), dS^T = P^T (dP^T - delta) with delta = rowsum(dO O) -
//                dlse, dV += P^T dO, dK += dS^T Q, dQ += dS K.
//   memory     reads q, k, v, out, dout once, writes dq, dk, dv once; scratch 4 T D floats per thread
//   parallel   items. Where B * Hk is small, the queries of a key head are shared among attention_splits() items (a
//              function of the shape alone), whose dK and dV are added up in order: the result does not depend on the
//              number of threads.
//   bias       its gradient is a pass of its own, over the bias: every element is summed by one thread in order,
//              however the bias is broadcast. Two of the five products are made again; only a learned bias pays for it.
//   sinks      their gradients are a pass of their own over out and dout.
#include "attention_gradients.h"
#ifdef __AMX_BF16__
#include "attention_backward_amx.h"
#endif

namespace fastlm::FASTLM_ISA {
namespace {

/// Up to 64 queries of one head, in the forms the products need.
struct QueryTile {
  float *q, *qt, *g, *gt;  // [BQ][Dp], [D][BQ] and the same of the upstream gradient
  float *lse, *delta;      // [BQ]; lse is +inf for padding and for rows that saw no key: P is 0 there
  bool finite;

  QueryTile(const Problem& p, int64_t Dp, int64_t Dvp, Arena& arena)
      : q(arena.take(BQ * Dp)),
        qt(arena.take(p.D * BQ)),
        g(arena.take(BQ * Dvp)),
        gt(arena.take(p.Dv * BQ)),
        lse(arena.take(BQ)),
        delta(arena.take(BQ)) {}

  template <class T>
  void read(const Problem& p, const Gradients& grad, int64_t b, int64_t h, int64_t i, int64_t rows, int64_t Dp,
            int64_t Dvp) {
    finite = pack(at<T>(p.q, p.qs, b, h, i), p.qs[2], rows, p.D, q, Dp);
    finite &= pack(at<T>(grad.dout, grad.gs, b, h, i), grad.gs[2], rows, p.Dv, g, Dvp);
    transpose_tile(q, Dp, rows, p.D, qt);
    transpose_tile(g, Dvp, rows, p.Dv, gt);
    read_statistics<T>(p, grad, b, h, i, rows, lse, delta);
  }
};

/// x: products -> P^T as V's gradient needs it (dropped, scaled up); dx: dO V^T -> dS^T times `out_scale` and, unless
/// null, the softcap's `slope`.
inline void gradient_tile(float* x, float* dx, int64_t keys, int vectors, float scale, float out_scale,
                          const Dropout& dropout, int64_t j0, const QueryTile& tile, const float* slope) {
  for (int n = 0; n < vectors; ++n) {
    const Vec lse = load(tile.lse + n * W), delta = load(tile.delta + n * W);
    for (int64_t j = 0; j < keys; ++j) {
      float *const px = x + j * BQ + n * W, *const pd = dx + j * BQ + n * W;
      const Vec p = exp_logit(load(px) * scale - lse);
      Vec dp = load(pd), kept = p;
      if (dropout.used) {
        kept = dropout.apply(p, n, j0 + j) * dropout.keep_scale;
        dp = dropout.apply(dp, n, j0 + j) * dropout.keep_scale;
      }
      store(px, kept);
      Vec ds = p * (dp - delta) * out_scale;
      if (slope) ds *= load(slope + j * BQ + n * W);
      store(pd, p == Vec{} ? Vec{} : ds);  // dp may be NaN where the key is masked
    }
  }
}

template <class T>
void write_rows(const float* from, int64_t ld, int64_t rows, int64_t cols, void* to, const Strides& s, int64_t b,
                int64_t h, int64_t first) {
  for (int64_t r = 0; r < rows; ++r) {
    T* const out = at<T>(to, s, b, h, first + r);
    for_vectors(cols, [&](int64_t c, auto n) { store(out + c, load(from + r * ld + c), n); });
  }
}

/// Query tiles [first, last) of the group of key head hk, counted through its heads.
template <class T>
void backward_item(const Problem& p, const Gradients& grad, int64_t b, int64_t hk, int64_t first, int64_t last,
                   float* dk, float* dv, float* scratch) {
  Arena arena(scratch);
  const int64_t Dp = round_up(p.D, 32), Dvp = round_up(p.Dv, 32), tiles = ceil_div(p.S, BQ);
  float* const x = arena.take(BK * BQ);
  float* const dx = arena.take(BK * BQ);
  float* const dq = arena.take(BQ * Dp);
  Logits logits(p, arena, true);
  Dropout dropout(p, arena);
  QueryTile tile(p, Dp, Dvp, arena);
  float* const k = arena.take(p.T * Dp);
  float* const v = arena.take(p.T * Dvp);
  const bool finite = pack(at<T>(p.k, p.ks, b, hk), p.ks[2], p.T, p.D, k, Dp) &
                      pack(at<T>(p.v, p.vs, b, hk), p.vs[2], p.T, p.Dv, v, Dvp);
  std::memset(dk, 0, p.T * Dp * sizeof(float));
  std::memset(dv, 0, p.T * Dvp * sizeof(float));
  for (int64_t item = first; item < last; ++item) {
    const int64_t h = hk * p.group() + item / tiles, i = item % tiles * BQ, rows = min64(BQ, p.S - i);
    const int vectors = static_cast<int>(ceil_div(rows, W));
    tile.read<T>(p, grad, b, h, i, rows, Dp, Dvp);
    dropout.set_rows(p, b, h, i);
    std::memset(dq, 0, BQ * Dp * sizeof(float));
    for (int64_t j0 = p.first_key(i); j0 < p.keys(i + rows); j0 += BK) {
      const int64_t keys = min64(BK, p.T - j0);
      if (!logits.read(b, h, i, rows, j0, keys)) continue;
      gemm<Lie::by_rows, false>(keys, rows, p.D, k + j0 * Dp, Dp, tile.qt, BQ, x, BQ);
      gemm<Lie::by_rows, false>(keys, rows, p.Dv, v + j0 * Dvp, Dvp, tile.gt, BQ, dx, BQ);
      float scale = p.scale;
      if (!logits.plain) {
        logits.transform(x, vectors);
        scale = 1.f;
      }
      gradient_tile(x, dx, keys, vectors, scale, p.scale, dropout, j0, tile, logits.slope);
      if (finite && tile.finite) {
        gemm<Lie::by_rows, true>(keys, p.Dv, rows, x, BQ, tile.g, Dvp, dv + j0 * Dvp, Dvp);
        gemm<Lie::by_rows, true>(keys, p.D, rows, dx, BQ, tile.q, Dp, dk + j0 * Dp, Dp);
        gemm<Lie::by_columns, true>(rows, p.D, keys, dx, BQ, k + j0 * Dp, Dp, dq, Dp);
      } else {
        gemm<Lie::by_rows, true, true>(keys, p.Dv, rows, x, BQ, tile.g, Dvp, dv + j0 * Dvp, Dvp);
        gemm<Lie::by_rows, true, true>(keys, p.D, rows, dx, BQ, tile.q, Dp, dk + j0 * Dp, Dp);
        gemm<Lie::by_columns, true, true>(rows, p.D, keys, dx, BQ, k + j0 * Dp, Dp, dq, Dp);
      }
    }
    write_rows<T>(dq, Dp, rows, p.D, grad.dq, grad.dqs, b, h, i);
  }
}

/// What one key head of a batch or of a packed sequence works on.
template <class T>
struct KeyHead {
  Problem p;
  Gradients grad;
  int64_t b, hk;

  KeyHead(const Problem& all, const Gradients& gradients, int64_t head)
      : p(all), grad(gradients), b(head / all.Hk), hk(head % all.Hk) {
    if (!all.options.cu_seqlens_q) return;
    p = sequence<T>(all, b);
    grad = sequence<T>(all, gradients, b);
    b = 0;
  }
};

template <class T>
void backward(const Problem& all, const Gradients& gradients, float* scratch, int threads) {
  const AttentionOptions& o = all.options;
  const bool packed = o.cu_seqlens_q;
  const int64_t batches = packed ? o.sequences : all.B, S = packed ? o.longest_q : all.S;
  const int64_t T_max = packed ? o.longest_k : all.T;
  const int64_t Dp = round_up(all.D, 32), Dvp = round_up(all.Dv, 32), heads = batches * all.Hk;
  const int64_t Tp = round_up(T_max, BK);  // whole tiles: the products round up
  const int64_t splits = attention_splits(batches, all.H, all.Hk, S);
  const int64_t share = attention_backward_scratch(batches, all.H, all.Hk, S, T_max, all.D, all.Dv),
                partial = Tp * (Dp + Dvp);
  float* const partials = scratch + threads * share;
  const double work = 5. * all.B * all.H * all.S * T_max * (all.D + all.Dv);
  const int team = work < 2e6 ? 1 : threads;
  parallel_items(team, heads * splits, [&](int64_t item, int thread) {
    const int64_t split = item % splits;
    const KeyHead<T> head(all, gradients, item / splits);
    const Problem& p = head.p;
    const Gradients& grad = head.grad;
    float* const own = scratch + thread * share;
    Arena arena(own);
    float* const dk = splits > 1 ? partials + item * partial : arena.take(Tp * Dp);
    float* const dv = splits > 1 ? dk + Tp * Dp : arena.take(Tp * Dvp);
    const int64_t tiles = p.group() * ceil_div(p.S, BQ);
    const int64_t first = tiles * split / splits, last = tiles * (split + 1) / splits;
    bool done = false;
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<T, bfloat16>)
      done = backward_item_amx(p, grad, head.b, head.hk, first, last, dk, dv, arena.next);
#endif
    if (!done) backward_item<T>(p, grad, head.b, head.hk, first, last, dk, dv, arena.next);
    if (splits > 1) return;
    write_rows<T>(dk, Dp, p.T, p.D, grad.dk, grad.dks, head.b, head.hk, 0);
    write_rows<T>(dv, Dvp, p.T, p.Dv, grad.dv, grad.dvs, head.b, head.hk, 0);
  });
  if (splits > 1)
    parallel_items(team, heads * ceil_div(T_max, BK), [&](int64_t item, int) {  // add up the shares, in order
      const int64_t number = item / ceil_div(T_max, BK), j0 = item % ceil_div(T_max, BK) * BK;
      const KeyHead<T> head(all, gradients, number);
      const int64_t keys = min64(BK, head.p.T - j0);
      if (keys <= 0) return;
      float* const total = partials + number * splits * partial;
      for (int64_t split = 1; split < splits; ++split) {
        const auto add = [&](int64_t from, int64_t count) {
          for (int64_t c = from; c < from + count; c += W)
            store(total + c, load(total + c) + load(total + split * partial + c));
        };
        add(j0 * Dp, keys * Dp);
        add(Tp * Dp + j0 * Dvp, keys * Dvp);
      }
      const Gradients& grad = head.grad;
      write_rows<T>(total + j0 * Dp, Dp, keys, all.D, grad.dk, grad.dks, head.b, head.hk, j0);
      write_rows<T>(total + Tp * Dp + j0 * Dvp, Dvp, keys, all.Dv, grad.dv, grad.dvs, head.b, head.hk, j0);
    });
  if (!packed) return;
  clear_rest<T>(gradients.dq, gradients.dqs, o.cu_seqlens_q, batches, all.H, all.S, all.D);
  clear_rest<T>(gradients.dk, gradients.dks, o.cu_seqlens_k, batches, all.Hk, all.T, all.D);
  clear_rest<T>(gradients.dv, gradients.dvs, o.cu_seqlens_k, batches, all.Hk, all.T, all.Dv);
}

/// dsinks = -sum of e^(sink - lse) delta over the rows of a head, each head by one thread in order.
template <class T>
void sink_gradients(const Problem& all, const Gradients& gradients, int threads) {
  const int64_t batches = all.options.cu_seqlens_q ? all.options.sequences : all.B;
  parallel_items(all.B * all.H * all.S * all.Dv < 200000 ? 1 : threads, all.H, [&](int64_t h, int) {
    double total = 0;
    for (int64_t n = 0; n < batches; ++n) {
      const KeyHead<T> head(all, gradients, n * all.Hk);
      float lse[BQ], delta[BQ];
      for (int64_t i = 0; i < head.p.S; i += BQ) {
        const int64_t rows = min64(BQ, head.p.S - i);
        read_statistics<T>(head.p, head.grad, head.b, h, i, rows, lse, delta);
        for (int64_t r = 0; r < rows; ++r) total -= std::exp(all.options.sinks[h] - lse[r]) * delta[r];
      }
    }
    all.options.dsinks[h] = static_cast<float>(total);
  });
}

/// dS of one batch, head and tile of queries, added to the part of dbias they read.
template <class T>
void bias_item(const Problem& p, const Gradients& grad, int64_t b, int64_t h, int64_t i, float* dbias, const Strides& s,
               float* scratch) {
  Arena arena(scratch);
  const int64_t Dp = round_up(p.D, W), Dvp = round_up(p.Dv, W), rows = min64(BQ, p.S - i), hk = h / p.group();
  const int vectors = static_cast<int>(ceil_div(rows, W));
  float* const x = arena.take(BK * BQ);
  float* const dx = arena.take(BK * BQ);
  float* const k = arena.take(BK * Dp);
  float* const v = arena.take(BK * Dvp);
  Logits logits(p, arena);
  Dropout dropout(p, arena);
  QueryTile tile(p, Dp, Dvp, arena);
  tile.read<T>(p, grad, b, h, i, rows, Dp, Dvp);
  dropout.set_rows(p, b, h, i);
  for (int64_t j0 = p.first_key(i); j0 < p.keys(i + rows); j0 += BK) {
    const int64_t keys = min64(BK, p.T - j0);
    if (!logits.read(b, h, i, rows, j0, keys)) continue;
    pack(at<T>(p.k, p.ks, b, hk, j0), p.ks[2], keys, p.D, k, Dp);
    pack(at<T>(p.v, p.vs, b, hk, j0), p.vs[2], keys, p.Dv, v, Dvp);
    gemm<Lie::by_rows, false>(keys, rows, p.D, k, Dp, tile.qt, BQ, x, BQ);
    gemm<Lie::by_rows, false>(keys, rows, p.Dv, v, Dvp, tile.gt, BQ, dx, BQ);
    logits.transform(x, vectors);
    gradient_tile(x, dx, keys, vectors, 1.f, 1.f, dropout, j0, tile, nullptr);
    float* const to = dbias + j0 * s[3];
    if (s[2] == 0) {  // one value per key (or for all)
      for (int64_t j = 0; j < keys; ++j) {
        Vec total{};
        for (int n = 0; n < vectors; ++n) total += load(dx + j * BQ + n * W);
        to[j * s[3]] += sum(total);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < keys; ++j) to[r * s[2] + j * s[3]] += dx[j * BQ + r];
    }
  }
}

}  // namespace

void attention_backward(DType dtype, const void* q, Strides qs, const void* k, Strides ks, const void* v, Strides vs,
                        const void* mask, int32_t mask_type, Strides ms, const int64_t* seed, const void* out,
                        Strides os, const void* dout, Strides gs, const float* lse, const float* dlse, void* dq,
                        Strides dqs, void* dk, Strides dks, void* dv, Strides dvs, float* dbias, Strides bs,
                        float* scratch, int64_t B, int64_t H, int64_t Hk, int64_t S, int64_t T, int64_t D, int64_t Dv,
                        bool bottom_right, int64_t right, AttentionOptions options, float scale, double dropout,
                        int threads) {
  const Problem p{q, k,  v, mask, qs, ks, vs,           ms,    mask_type, seed,  B,
                  H, Hk, S, T,    D,  Dv, bottom_right, right, options,   scale, dropout};
  const Gradients grad{out, dout, os, gs, lse, dlse, dq, dk, dv, dqs, dks, dvs};
  with_type(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    backward<E>(p, grad, scratch, threads);
    if (options.dsinks) sink_gradients<E>(p, grad, threads);
    if (!dbias) return;
    // One item holds everything that reads the same elements: the dimensions over which the bias is broadcast.
    const int64_t tiles = ceil_div(S, BQ), bb = bs[0] ? B : 1, hh = bs[1] ? H : 1, tt = bs[2] ? tiles : 1;
    const int64_t share = attention_backward_scratch(B, H, Hk, S, T, D, Dv);
    parallel_items(threads, bb * hh * tt, [&](int64_t item, int thread) {
      const int64_t b0 = item / (hh * tt), h0 = item / tt % hh, t0 = item % tt;
      for (int64_t b = b0; b < B; b += bb)
        for (int64_t h = h0; h < H; h += hh)
          for (int64_t t = t0; t < tiles; t += tt)
            bias_item<E>(p, grad, b, h, t * BQ, dbias + b * bs[0] + h * bs[1] + t * BQ * bs[2], bs,
                         scratch + thread * share);
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

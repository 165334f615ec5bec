// Attention, forward: softmax(scale * Q K^T + mask) V with the online softmax (Milakov and Gimelshein 2018, Rabe and
// Staats 2021, Dao et al. 2022).
//   algorithm  an item is up to CHUNK queries of one head. For each tile of 64 keys: pack K and V as float32 once, then
//              for each 64 queries S^T = K Q^T, running maximum and sum per lane, O^T += V^T P^T.
//              Running sums are rescaled only where the maximum grew by more than RESCALE: P stays below e^RESCALE.
//   bfloat16   with AMX the same loop on bfloat16 tiles (attention_forward_amx.h): P is rounded, sums are float32
//   few        one or two queries of a head go another way: attention_decode.h
//   memory     reads Q once, K and V once per CHUNK queries, writes O and lse once; scratch O(CHUNK * D) per thread
//   parallel   items, handed out one by one, the longest (last) queries first; each is summed in key order by one
//              thread, so the result does not depend on the number of threads
#include "attention_decode.h"
#ifdef __AMX_BF16__
#include "attention_forward_amx.h"
#endif

namespace fastlm::FASTLM_ISA {
namespace {

/// One step of the online softmax: logits -> P in place.
inline void softmax_tile(float* x, int64_t keys, int vectors, float scale, const Dropout& dropout, int64_t j0,
                         Running& run, int64_t Dv) {
  for (int n = 0; n < vectors; ++n) {
    float* const column = x + n * W;
    const Vec center = raise_maximum(column_maximum(column, keys, scale), RESCALE, n, run, Dv, exp_logit);
    Vec total[4] = {};  // the errors of one long sum would be those of the whole row
    const auto weigh = [&](int64_t j, Vec& sum) {
      const Vec p = exp_logit(load(column + j * BQ) * scale - center);
      sum += p;
      store(column + j * BQ, dropout.used ? dropout.apply(p, n, j0 + j) : p);
    };
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4)
      for (int u = 0; u < 4; ++u) weigh(j + u, total[u]);
    for (; j < keys; ++j) weigh(j, total[0]);
    store(run.total + n * W, load(run.total + n * W) + ((total[0] + total[1]) + (total[2] + total[3])));
  }
}

/// Chunks of queries of packed sequences, counted with room: sequence n has those from cu[n] / CHUNK + n on, as many as
/// its length needs, and the next one's come no sooner. So no table of them is needed.
inline int64_t packed_chunks(const AttentionOptions& o, int64_t S) {
  return o.sequences == 0 ? 0 : max64(0, min64(o.cu_seqlens_q[o.sequences], S)) / CHUNK + o.sequences;
}
struct PackedChunk {
  int64_t n = 0, i;  // sequence, and first query of it
  bool used;

  PackedChunk(const AttentionOptions& o, int64_t S, int64_t number) {
    const auto start = [&](int64_t s) { return Extent(o.cu_seqlens_q, s, S).first / CHUNK + s; };
    for (int64_t end = o.sequences; end - n > 1;) {
      const int64_t middle = (n + end) / 2;
      (start(middle) <= number ? n : end) = middle;
    }
    i = (number - start(n)) * CHUNK;
    used = i < Extent(o.cu_seqlens_q, n, S).length();
  }
};

template <class T>
void forward_item(const Problem& p, void* out, const Strides& os, float* lse, int64_t b, int64_t h, int64_t i0,
                  float* scratch) {
  Arena arena(scratch);
  const int64_t i1 = min64(p.S, i0 + CHUNK), blocks = ceil_div(i1 - i0, BQ);
  const int64_t Dp = round_up(p.D, W), Dvp = round_up(p.Dv, W);
  float* const kt = arena.take(BK * Dp);
  float* const vt = arena.take(BK * Dvp);
  float* const x = arena.take(BK * BQ);
  Logits logits(p, arena);
  Dropout dropout(p, arena);
  float* qt[CHUNK / BQ];
  Running run[CHUNK / BQ];
  for (int64_t c = 0; c < blocks; ++c) {
    qt[c] = arena.take(p.D * BQ);
    run[c] = {arena.take(BQ), arena.take(BQ), arena.take(p.Dv * BQ)};
    run[c].start(p.Dv);
    const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i);
    pack(at<T>(p.q, p.qs, b, h, i), p.qs[2], rows, p.D, kt, Dp);  // kt is free until the first tile of keys
    transpose_tile(kt, Dp, rows, p.D, qt[c]);
  }
  const int64_t hk = h / p.group();
  for (int64_t j0 = p.first_key(i0); j0 < p.keys(i1); j0 += BK) {
    const int64_t keys = min64(BK, p.T - j0);
    bool packed = false, finite = true;
    for (int64_t c = 0; c < blocks; ++c) {
      const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i);
      if (!logits.read(b, h, i, rows, j0, keys)) continue;
      if (!packed) {
        pack(at<T>(p.k, p.ks, b, hk, j0), p.ks[2], keys, p.D, kt, Dp);
        finite = pack(at<T>(p.v, p.vs, b, hk, j0), p.vs[2], keys, p.Dv, vt, Dvp);
        packed = true;
      }
      const int vectors = static_cast<int>(ceil_div(rows, W));
      gemm<Lie::by_rows, false>(keys, rows, p.D, kt, Dp, qt[c], BQ, x, BQ);
      float scale = p.scale;
      if (!logits.plain) {
        logits.transform(x, vectors);
        scale = 1.f;
      }
      if (dropout.used) dropout.set_rows(p, b, h, i);
      softmax_tile(x, keys, vectors, scale, dropout, j0, run[c], p.Dv);
      if (finite)
        gemm<Lie::by_columns, true>(p.Dv, rows, keys, vt, Dvp, x, BQ, run[c].out, BQ);
      else
        gemm<Lie::by_columns, true, true>(p.Dv, rows, keys, vt, Dvp, x, BQ, run[c].out, BQ);
    }
  }
  for (int64_t c = 0; c < blocks; ++c) {
    const int64_t i = i0 + c * BQ, rows = min64(BQ, i1 - i);
    finish<T>(p, run[c], dropout.keep_scale, 1.f, out, os, lse, b, h, i, rows);
  }
}

}  // namespace

void attention_forward(DType dtype, const void* q, Strides qs, const void* k, Strides ks, const void* v, Strides vs,
                       const void* mask, int32_t mask_type, Strides ms, const int64_t* seed, void* out, Strides os,
                       float* lse, float* scratch, int64_t B, int64_t H, int64_t Hk, int64_t S, int64_t T, int64_t D,
                       int64_t Dv, bool bottom_right, int64_t right, AttentionOptions options, float scale,
                       double dropout, int threads) {
  const Problem p{q, k,  v, mask, qs, ks, vs,           ms,    mask_type, seed,  B,
                  H, Hk, S, T,    D,  Dv, bottom_right, right, options,   scale, dropout};
  if (S == 0) return;
  const bool packed = options.cu_seqlens_q;
  const int64_t share = attention_forward_share(S, D, Dv);
  with_type(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    const auto run = [&](const Problem& one, void* to, int64_t b, int64_t h, int64_t i, int thread) {
      if (one.S <= ATTENTION_FEW) return decode_head<E>(one, to, os, lse, b, h, scratch + thread * share);
#ifdef __AMX_BF16__
      if constexpr (std::is_same_v<E, bfloat16>)
        return forward_item_amx(one, to, os, lse, b, h, i, scratch + thread * share);
#endif
      forward_item<E>(one, to, os, lse, b, h, i, scratch + thread * share);
    };
    const double work = 2. * B * H * S * (packed ? options.longest_k : T) * (D + Dv);
    const int team = work < 2e6 ? 1 : threads;
    if (!packed && S <= ATTENTION_FEW) return decode<E>(p, out, os, lse, scratch, share, threads);
    if (!packed) {
      const int64_t chunks = ceil_div(S, CHUNK);
      return parallel_items(team, B * H * chunks, [&](int64_t item, int thread) {
        const int64_t head = item % (B * H), chunk = chunks - 1 - item / (B * H);
        run(p, out, head / H, head % H, chunk * CHUNK, thread);
      });
    }
    parallel_items(team, H * packed_chunks(options, S), [&](int64_t item, int thread) {
      const PackedChunk chunk(options, S, item / H);
      if (!chunk.used) return;
      const Problem one = sequence<E>(p, chunk.n);
      run(one, at<E>(out, os, 0, 0, one.first), 0, item % H, chunk.i, thread);
    });
    clear_rest<E>(out, os, options.cu_seqlens_q, options.sequences, H, S, Dv);
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = max64(0, options.cu_seqlens_q[options.sequences]); i < S; ++i) lse[h * S + i] = -INF;
  });
}

}  // namespace fastlm::FASTLM_ISA

// Threads. One OpenMP pool, torch's: the extension links the same libgomp.so.1 that torch ships.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlm::FASTLM_ISA {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/// f(begin, end) over contiguous shares of [0, n), each of at least `grain` items. No parallel region is opened for
/// one thread: it costs 100 us on busy cores, and one opened in a forked child hangs.
template <class F>
void parallel_for(int threads, int64_t n, int64_t grain, F f) {
  if (n <= 0) return;
  const int64_t shares = n / grain < threads ? (n / grain > 1 ? n / grain : 1) : threads;
  if (shares <= 1) return f(int64_t(0), n);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(shares))
  for (int64_t s = 0; s < shares; ++s) f(n * s / shares, n * (s + 1) / shares);
}

/// f(item, thread) for items of unequal cost, handed out one by one. `thread` is in [0, threads).
template <class F>
void parallel_items(int threads, int64_t n, F f) {
  if (n <= 0) return;
  const int team = static_cast<int>(n < threads ? n : threads);
  if (team <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t i = 0; i < n; ++i) f(i, omp_get_thread_num());
#else
  for (int64_t i = 0; i < n; ++i) f(i, 0);
#endif
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA

// mma.cuh on the CPU. A collective of a warp is one meeting: every lane gives its registers, and whoever goes on first
// does what the instruction does, at once for all. Fragments are taken apart and put together as PTX lays them out, so
// a kernel that has them otherwise gets other numbers.
#pragma once
#include "cuda/device.cuh"

namespace fastlm::cuda {

/// Half h of a register as float32.
template <class T>
inline float half_of(uint32_t r, int h) {
  return to_float(T{static_cast<uint16_t>(r >> 16 * h)});
}

struct MmaShape {
  typedef float Row __attribute__((vector_size(32)));
  Row b[16], d[16];
  float a[16][16];
};

template <class T, int R>
__attribute__((no_sanitize("address", "undefined"))) inline void mma(float (&d)[R], int at, const uint32_t (&a)[4],
                                                                     uint32_t b0, uint32_t b1) {
  static_assert(sizeof(T) == 2, "a product of 16-bit numbers");
  if (at < 0 || 4 * at + 4 > R) simt::fail("a product behind the end of its sums");
  const unsigned row = simt::current->lane / 4, column = 2 * (simt::current->lane % 4);
  const MmaShape& s = simt::together<MmaShape>(
      20,
      [&](MmaShape& s) {
        for (unsigned h = 0; h < 2; ++h) {
          for (unsigned j = 0; j < 4; ++j) s.a[row + 8 * (j % 2)][column + 8 * (j / 2) + h] = half_of<T>(a[j], h);
          s.b[column + h][row] = half_of<T>(b0, h);
          s.b[column + 8 + h][row] = half_of<T>(b1, h);
        }
      },
      [](MmaShape& s) __attribute__((no_sanitize("address", "undefined"))) {
        for (int i = 0; i < 16; ++i) {
          MmaShape::Row sum{};
          for (int k = 0; k < 16; ++k) sum += s.a[i][k] * s.b[k];
          s.d[i] = sum;
        }
      });
  for (unsigned i = 0; i < 4; ++i) d[4 * at + i] += s.d[row + 8 * (i / 2)][column + i % 2];
}

struct MatricesShape {
  char* rows[4][8];
  union {
    uint16_t numbers[4][8][8];
    uint32_t words[4][8][4];
  };
};

template <bool TRANSPOSED>
void load_four(uint32_t (&r)[4], uint32_t address) {
  const unsigned lane = simt::current->lane;
  const MatricesShape& s = simt::together<MatricesShape>(
      21 + TRANSPOSED,
      [&](MatricesShape& s) { s.rows[lane / 8][lane % 8] = simt::shared_at(address, 16, simt::Access::read); },
      [](MatricesShape& s) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          for (int row = 0; row < 8; ++row) {
            uint16_t numbers[8];
            std::memcpy(numbers, s.rows[matrix][row], 16);
            for (int i = 0; i < 8; ++i)
              (TRANSPOSED ? s.numbers[matrix][i][row] : s.numbers[matrix][row][i]) = numbers[i];
          }
        }
      });
  for (int j = 0; j < 4; ++j) r[j] = s.words[j][lane / 4][lane % 4];
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) { load_four<false>(r, address); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { load_four<true>(r, address); }

template <bool TRANSPOSED>
void store_four(uint32_t address, const uint32_t (&r)[4]) {
  const unsigned lane = simt::current->lane;
  simt::together<MatricesShape>(
      23 + TRANSPOSED,
      [&](MatricesShape& s) {
        s.rows[lane / 8][lane % 8] = simt::shared_at(address, 16, simt::Access::write);
        for (int j = 0; j < 4; ++j) s.words[j][lane / 4][lane % 4] = r[j];
      },
      [](MatricesShape& s) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          for (int row = 0; row < 8; ++row) {
            uint16_t numbers[8];
            for (int i = 0; i < 8; ++i) numbers[i] = TRANSPOSED ? s.numbers[matrix][i][row] : s.numbers[matrix][row][i];
            std::memcpy(s.rows[matrix][row], numbers, 16);
          }
        }
      });
}
inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) { store_four<false>(address, r); }
inline void store_matrices_transposed(uint32_t address, const uint32_t (&r)[4]) { store_four<true>(address, r); }

inline void copy_async_or_zero(uint32_t to, const void* from, bool there) {
  if (from == nullptr) simt::fail("an asynchronous copy from an address that cannot be");
  simt::copy_later(simt::shared_at(to, 16, simt::Access::copy), there ? from : nullptr);
}

inline void store_shared(uint32_t to, uint32_t v) { std::memcpy(simt::shared_at(to, 4, simt::Access::write), &v, 4); }
inline void store_shared(uint32_t to, Words v) { std::memcpy(simt::shared_at(to, 16, simt::Access::write), &v, 16); }

template <class T>
inline uint32_t pack2(float low, float high) {
  return round_to<T>(low).bits | static_cast<uint32_t>(round_to<T>(high).bits) << 16;
}

inline void add_global(float* at, float v) { *at += v; }
inline void add_global(float* at, float v0, float v1) {
  if (reinterpret_cast<uintptr_t>(at) % 8) simt::fail("an addition to two neighbours at no multiple of 8");
  at[0] += v0;
  at[1] += v1;
}

/// Blocks run one after the other: a turn that is not there yet is one that no block before has given.
inline void await_turn(const int* turn, int mine) {
  simt::note("await_turn", reinterpret_cast<intptr_t>(turn), mine);
  if (*turn != mine)
    simt::fail("a turn that no started block will give: " + std::to_string(mine) + ", now " + std::to_string(*turn));
}
inline void pass_turn(int* turn, int next) {
  simt::note("pass_turn", reinterpret_cast<intptr_t>(turn), next);
  simt::check_written();
  *turn = next;
}

}  // namespace fastlm::cuda

// What every kernel on AMX tiles begins with.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace fastlm::FASTLM_ISA {
namespace {

/// Configures all eight tiles as 16 rows of 64 bytes for as long as it lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

}  // namespace
}  // namespace fastlm::FASTLM_ISA

// The tile instructions. With TRANSLOAD_EMULATE_AMX they are plain C++, so that the kernel is tested on any AVX512 CPU.
//
// The instructions are opaque to the compiler: it does not see that a tile load reads memory or a tile store writes it.
// TILE_FENCE() stands between ordinary code and tile code that share a buffer.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define TILE_FENCE() __asm__ volatile("" ::: "memory")

namespace transload {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

}  // namespace
}  // namespace transload

#if !defined(TRANSLOAD_EMULATE_AMX)

#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_DOT_SS(c, a, b) _tile_dpbssd(c, a, b)
#define TILE_DOT_SU(c, a, b) _tile_dpbsud(c, a, b)

namespace transload {
namespace {

inline void tile_configure(const TileConfig &config) {
  TILE_FENCE();  // gcc 12 declares that ldtilecfg reads 8 bytes and would drop the stores to the others
  _tile_loadconfig(&config);
}

inline void tile_release() { _tile_release(); }

}  // namespace
}  // namespace transload

#else

namespace transload {
namespace {

// One tile of up to 16 rows of 64 bytes, per thread like the real ones.
struct EmulatedTiles {
  TileConfig config;
  bool configured = false;
  int8_t bytes[8][16][64];
};

inline EmulatedTiles &tiles() {
  static thread_local EmulatedTiles state;
  return state;
}

inline void tile_configure(const TileConfig &config) {
  tiles().config = config;
  tiles().configured = true;
}

inline void tile_release() { tiles().configured = false; }

inline void tile_zero(int t) {
  if (!tiles().configured) __builtin_trap();  // as the instruction does
  std::memset(tiles().bytes[t], 0, sizeof tiles().bytes[t]);
}

inline void tile_load(int t, const void *from, int64_t stride) {
  tile_zero(t);
  const TileConfig &c = tiles().config;
  for (int r = 0; r < c.rows[t]; r++)
    std::memcpy(tiles().bytes[t][r], static_cast<const int8_t *>(from) + r * stride, c.row_bytes[t]);
}

inline void tile_store(int t, void *to, int64_t stride) {
  const TileConfig &c = tiles().config;
  for (int r = 0; r < c.rows[t]; r++)
    std::memcpy(static_cast<int8_t *>(to) + r * stride, tiles().bytes[t][r], c.row_bytes[t]);
}

inline void tile_dot(int c, int a, int b, bool unsigned_b) {
  EmulatedTiles &s = tiles();
  for (int m = 0; m < s.config.rows[c]; m++)
    for (int k = 0; k < s.config.row_bytes[a]; k++)
      for (int n = 0; n < s.config.row_bytes[c] / 4; n++) {
        const int8_t byte = s.bytes[b][k / 4][n * 4 + k % 4];
        int32_t sum;
        std::memcpy(&sum, &s.bytes[c][m][n * 4], 4);
        sum += s.bytes[a][m][k] * (unsigned_b ? static_cast<int>(static_cast<uint8_t>(byte)) : byte);
        std::memcpy(&s.bytes[c][m][n * 4], &sum, 4);
      }
}

}  // namespace
}  // namespace transload

#define TILE_ZERO(t) tile_zero(t)
#define TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define TILE_DOT_SS(c, a, b) tile_dot(c, a, b, false)
#define TILE_DOT_SU(c, a, b) tile_dot(c, a, b, true)

#endif

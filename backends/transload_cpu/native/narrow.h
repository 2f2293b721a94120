// Codes of 5 and 6 bits: four bits lie as 4-bit codes do, the fifth and sixth in a plane behind them (see layout.h).
// Unnamed namespace: see floats.h.
#pragma once

#include <cstring>

#include "layout.h"

namespace transload {
namespace {

inline bool is_narrow(const tl_geometry &g) { return g.bits == 5 || g.bits == 6; }

inline uint32_t load_dword(const uint8_t *from) {
  uint32_t out;
  std::memcpy(&out, from, 4);
  return out;
}

// Four bits as the lowest ones of four bytes, and back.
inline uint32_t spread(uint32_t four) { return four * 0x00204081u & 0x01010101u; }
inline uint32_t gather(uint32_t bytes) { return (bytes * 0x10204080u) >> 28; }

// What a code has above its fourth bit, for output j (0..31) of a step: inputs 0..3 and 4..7, a byte each.
struct Upper {
  uint32_t first, second;
};

template <int BITS>
inline Upper read_upper(const uint8_t *step, int j) {
  const uint8_t *plane = step + 128;
  if (BITS == 5) {
    const int shift = j % 2 * 4;
    return {spread(uint32_t(plane[j / 2]) >> shift & 15), spread(uint32_t(plane[16 + j / 2]) >> shift & 15)};
  }
  const uint32_t all = load_dword(plane + j % kHalf * 4) >> (j / kHalf * 2);
  return {all & 0x03030303u, all >> 4 & 0x03030303u};
}

// Into a plane that holds zeros for this output.
inline void write_upper(Upper u, int bits, uint8_t *step, int j) {
  uint8_t *plane = step + 128;
  if (bits == 5) {
    const int shift = j % 2 * 4;
    plane[j / 2] = static_cast<uint8_t>(plane[j / 2] | gather(u.first) << shift);
    plane[16 + j / 2] = static_cast<uint8_t>(plane[16 + j / 2] | gather(u.second) << shift);
    return;
  }
  const uint32_t all = load_dword(plane + j % kHalf * 4) | (u.first | u.second << 4) << (j / kHalf * 2);
  std::memcpy(plane + j % kHalf * 4, &all, 4);
}

}  // namespace
}  // namespace transload

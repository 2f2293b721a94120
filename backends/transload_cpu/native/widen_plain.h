// Narrow codes as 8-bit codes (see Isa::widen), for any processor. Unnamed namespace: see floats.h.
#pragma once

#include "narrow.h"

namespace transload {
namespace {

template <int BITS>
void widen_steps(const uint8_t *codes, int64_t steps, uint8_t *wide) {
  for (int64_t i = 0; i < steps; i++, codes += BITS * kPanel, wide += 8 * kPanel)
    for (int j = 0; j < kPanel; j++) {
      const uint32_t low = load_dword(codes + j * 4);
      const Upper upper = read_upper<BITS>(codes, j);
      const uint32_t first = (low & 0x0f0f0f0fu) | upper.first << 4, second = (low >> 4 & 0x0f0f0f0fu) | upper.second << 4;
      std::memcpy(wide + j * 4, &first, 4);
      std::memcpy(wide + 128 + j * 4, &second, 4);
    }
}

void widen(int bits, const uint8_t *codes, int64_t steps, uint8_t *wide) {
  (bits == 5 ? widen_steps<5> : widen_steps<6>)(codes, steps, wide);
}

}  // namespace
}  // namespace transload

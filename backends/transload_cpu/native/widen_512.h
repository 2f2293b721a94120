// Narrow codes in 512-bit vectors. Unnamed namespace: see floats.h.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "layout.h"

namespace transload {
namespace {

// What codes of 5 or 6 bits have above their fourth: row 0..3 of the layout for 8 bits, in bits 4 and 5 of every byte.
template <int BITS>
inline __attribute__((always_inline)) __m512i upper_512(const uint8_t *step, int row) {
  const uint8_t *plane = step + 128;
  if constexpr (BITS == 5) {
    uint64_t mask;
    std::memcpy(&mask, plane + row * 8, 8);
    return _mm512_maskz_set1_epi8(mask, 16);
  } else {
    const __m512i all = _mm512_loadu_si512(plane), kept = _mm512_set1_epi8(0x30);
    // Whole dwords are shifted; what comes from a neighbouring byte is outside of the bits that are kept.
    const __m512i moved = row < 2 ? _mm512_slli_epi32(all, static_cast<unsigned>(4 - 2 * row))
                                  : _mm512_srli_epi32(all, static_cast<unsigned>(2 * row - 4));
    return _mm512_and_si512(moved, kept);
  }
}

template <int BITS>
void widen_steps(const uint8_t *codes, int64_t steps, uint8_t *wide) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < steps; i++, codes += BITS * kPanel, wide += 8 * kPanel)
    for (int t = 0; t < 2; t++) {
      const __m512i four = _mm512_loadu_si512(codes + t * 64);
      const __m512i first = _mm512_and_si512(four, low), second = _mm512_and_si512(_mm512_srli_epi16(four, 4), low);
      _mm512_storeu_si512(wide + t * 64, _mm512_or_si512(first, upper_512<BITS>(codes, t)));
      _mm512_storeu_si512(wide + 128 + t * 64, _mm512_or_si512(second, upper_512<BITS>(codes, 2 + t)));
    }
}

void widen(int bits, const uint8_t *codes, int64_t steps, uint8_t *wide) {
  (bits == 5 ? widen_steps<5> : widen_steps<6>)(codes, steps, wide);
}

}  // namespace
}  // namespace transload

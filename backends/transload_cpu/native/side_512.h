// Scales and zeros of 16 outputs, for the kernels with 512-bit vectors. Unnamed namespace: see floats.h.
#pragma once

#include <immintrin.h>

#include "row_math.h"

namespace transload {
namespace {

inline bool whole_zeros(const tl_geometry &g) { return g.zero == TL_ZERO_MIDPOINT || g.zero == TL_ZERO_CODES; }

inline __m512 load_floats(const uint8_t *from, int64_t at, int32_t dtype) {
  if (dtype == TL_FLOAT32) return _mm512_loadu_ps(from + at * 4);
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at * 2));
  if (dtype == TL_FLOAT16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512i load_zeros(const uint8_t *from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}

// Scale and zero of 16 outputs in one group.
struct Side {
  __m512 scale, offset;  // offset is added times the moment
  __m512i minus_zero;    // with TL_ZERO_CODES: pairs of int16 (-zero, 0), multiplied with the row sums
};

inline Side load_side(const tl_geometry &g, const Panel &panel, int64_t at) {
  Side s{load_floats(panel.scales, at, g.scale_dtype), _mm512_setzero_ps(),
         _mm512_setzero_si512()};
  if (g.zero == TL_ZERO_CODES) {
    const __m512i minus = _mm512_sub_epi32(_mm512_setzero_si512(), load_zeros(panel.zeros + at));
    s.minus_zero = _mm512_and_si512(minus, _mm512_set1_epi32(0xffff));
  } else if (g.zero == TL_ZERO_FLOATS) {
    s.offset = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), s.scale), load_floats(panel.zeros, at, g.scale_dtype));
  } else if (g.zero == TL_ZERO_MINS) {
    s.offset = load_floats(panel.zeros, at, g.scale_dtype);
  }
  return s;
}

}  // namespace
}  // namespace transload

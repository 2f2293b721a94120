// segment_plain.h with 512-bit vectors; the same results. Counts are multiples of 8. Unnamed namespace: see floats.h.
#pragma once

#include <immintrin.h>

#include "floats.h"

namespace transload {
namespace {

inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : 0x00ff; }

inline void store_bytes(__m512i values, int64_t left, int8_t *to) {
  const __m128i bytes = _mm512_cvtepi32_epi8(values);
  if (left >= 16)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), bytes);
  else
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to), bytes);
}

inline float largest(const float *x, int64_t count) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(count - i), x + i));
    top = _mm512_max_epi32(top, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return as_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(top)));
}

// 16 quotients as integers within +-limit. The conversion rounds half to even.
inline __m512i quotients(const float *x, int64_t left, __m512 step, int limit) {
  const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_loadu_ps(lanes(left), x), step));
  return _mm512_max_epi32(_mm512_min_epi32(code, _mm512_set1_epi32(limit)), _mm512_set1_epi32(-limit));
}

inline int32_t quantize_to_8(const float *x, int64_t count, float step, int8_t *q) {
  const __m512 divisor = _mm512_set1_ps(step);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i code = quotients(x + i, count - i, divisor, 127);
    sum = _mm512_add_epi32(sum, code);
    store_bytes(code, count - i, q + i);
  }
  return _mm512_reduce_add_epi32(sum);
}

inline void quantize_to_15(const float *x, int64_t count, float step, int8_t *upper, int8_t *lower, int32_t *sums) {
  const __m512 divisor = _mm512_set1_ps(step);
  __m512i upper_sum = _mm512_setzero_si512(), lower_sum = upper_sum;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i code = quotients(x + i, count - i, divisor, 16256);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(64)), 7);
    const __m512i low = _mm512_sub_epi32(code, _mm512_slli_epi32(high, 7));
    upper_sum = _mm512_add_epi32(upper_sum, high);
    lower_sum = _mm512_add_epi32(lower_sum, low);
    store_bytes(high, count - i, upper + i);
    store_bytes(low, count - i, lower + i);
  }
  sums[0] = _mm512_reduce_add_epi32(upper_sum);
  sums[1] = _mm512_reduce_add_epi32(lower_sum);
}

}  // namespace
}  // namespace transload

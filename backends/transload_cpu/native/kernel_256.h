// The 256-bit kernel of kernel_avx2.cpp and kernel_avx_vnni.cpp. A panel is walked twice, 16 outputs at a time: two
// vectors of 8 outputs, so that 4 rows of sums and their operands fit the 16 registers.
#pragma once

#include <immintrin.h>

#include <utility>

#include "row_math.h"

namespace transload {
namespace {

constexpr int kRows = 4;

inline __m256 load_floats(const uint8_t *from, int64_t at, int32_t dtype) {
  if (dtype == TL_FLOAT32) return _mm256_loadu_ps(reinterpret_cast<const float *>(from + at * 4));
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + at * 2));
  if (dtype == TL_FLOAT16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline __m256i load_codes(const uint8_t *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }

inline __m256i broadcast_four(const int8_t *q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return _mm256_set1_epi32(four);
}

// Adds 4 products per output. Without VNNI, vpmaddubsw adds pairs in 16 bits: with 4-bit codes at most 15 * 127 * 2;
// 8-bit codes would saturate and go nibble by nibble.
template <int BITS>
inline __m256i dot(__m256i sum, __m256i codes, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, codes, x);
#else
  const __m256i ones = _mm256_set1_epi16(1);
  if (BITS == 4)
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones));
  const __m256i nibble = _mm256_set1_epi8(15), sixteens = _mm256_set1_epi16(16);
  const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), x);
  const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), x);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(high, sixteens));
#endif
}

// Scale and zero of 8 outputs in one group.
struct Side {
  __m256 scale, offset;  // offset is added times the moment
  __m256i minus_zero;    // with TL_ZERO_CODES: pairs of int16 (-zero, 0), multiplied with the row sums
};

inline Side load_side(const tl_geometry &g, const Panel &panel, int64_t at) {
  const __m256i lower_half = _mm256_set1_epi32(0xffff);
  Side s{load_floats(panel.scales, at, g.scale_dtype), _mm256_setzero_ps(),
         _mm256_setzero_si256()};
  if (g.zero == TL_ZERO_CODES) {
    const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(panel.zeros + at)));
    s.minus_zero = _mm256_and_si256(_mm256_sub_epi32(_mm256_setzero_si256(), zero), lower_half);
  } else if (g.zero == TL_ZERO_FLOATS) {
    s.offset = _mm256_mul_ps(_mm256_sub_ps(_mm256_setzero_ps(), s.scale), load_floats(panel.zeros, at, g.scale_dtype));
  } else if (g.zero == TL_ZERO_MINS) {
    s.offset = load_floats(panel.zeros, at, g.scale_dtype);
  }
  return s;
}

// rows of a tile times the 16 outputs of half `half` of a panel.
template <int ROWS, int BITS, bool SPLIT>
void multiply_half(const Plan &p, const Panel &panel, const Tile &tile, int half, float *out) {
  constexpr int TOKENS = SPLIT ? ROWS / 2 : ROWS, STEP = BITS * kPanel;
  const tl_geometry &g = p.weight->geometry;
  const bool code_zeros = g.zero == TL_ZERO_CODES, float_zeros = g.zero >= TL_ZERO_FLOATS;
  const __m256i nibble = _mm256_set1_epi8(15);
  const int64_t stride = int64_t(p.rows) * 8, kp = p.weight->kp;
  __m256 y[TOKENS][2];
  for (auto &row : y) row[0] = row[1] = _mm256_setzero_ps();
  const uint8_t *codes = panel.codes + half * 64;
  const int8_t *q = tile.q;
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t left = kp - s * p.segment, steps = (left < p.segment ? left : p.segment) / 8;
    __m256i sum[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm256_set1_epi32(tile.start[s * p.rows + r]);
    for (int64_t i = 0; i < steps; i++, codes += STEP, q += stride) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        __m256i a = load_codes(codes + v * 32), b;
        if (BITS == 8) {
          b = load_codes(codes + 128 + v * 32);
        } else {
          b = _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble);
          a = _mm256_and_si256(a, nibble);
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          sum[r][v] = dot<BITS>(sum[r][v], a, broadcast_four(q + r * 8));
          sum[r][v] = dot<BITS>(sum[r][v], b, broadcast_four(q + r * 8 + 4));
        }
      }
    }
    const int64_t side = s * p.rows, group = s / p.segments_per_group * kPanel + half * kHalf;
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      const Side w = load_side(g, panel, group + v * 8);
      auto total = [&](int r) {
        if (!code_zeros) return sum[r][v];
        const __m256i row_sum = _mm256_set1_epi32(tile.sum[side + r]);
        return _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(w.minus_zero, row_sum));
      };
#pragma GCC unroll 4
      for (int m = 0; m < TOKENS; m++) {
        const int r = SPLIT ? 2 * m : m;
        __m256i all = total(r);
        if (SPLIT) all = _mm256_add_epi32(_mm256_slli_epi32(all, 7), total(r + 1));
        const __m256 scale = _mm256_mul_ps(w.scale, _mm256_set1_ps(tile.scale[side + r]));
        y[m][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), scale, y[m][v]);
        if (float_zeros) y[m][v] = _mm256_fmadd_ps(w.offset, _mm256_set1_ps(tile.moment[side + r]), y[m][v]);
      }
    }
  }
  for (int m = 0; m < TOKENS; m++) {
    _mm256_storeu_ps(out + m * kPanel + half * kHalf, y[m][0]);
    _mm256_storeu_ps(out + m * kPanel + half * kHalf + 8, y[m][1]);
  }
}

using MultiplyHalf = void (*)(const Plan &, const Panel &, const Tile &, int, float *);

template <int BITS>
MultiplyHalf half_of(bool split, int rows) {
  static constexpr MultiplyHalf whole_rows[] = {multiply_half<1, BITS, false>, multiply_half<2, BITS, false>,
                                                multiply_half<3, BITS, false>, multiply_half<4, BITS, false>};
  static constexpr MultiplyHalf split_rows[] = {multiply_half<2, BITS, true>, multiply_half<4, BITS, true>};
  return split ? split_rows[rows / 2 - 1] : whole_rows[rows - 1];
}

void multiply_tile(const Plan &p, const Panel &panel, const Tile &tile, int rows, float *out) {
  const MultiplyHalf multiply = p.weight->geometry.bits == 4 ? half_of<4>(p.split, rows) : half_of<8>(p.split, rows);
  multiply(p, panel, tile, 0, out);
  multiply(p, panel, tile, 1, out);
}

}  // namespace
}  // namespace transload

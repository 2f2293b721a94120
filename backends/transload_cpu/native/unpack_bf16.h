// Packed codes as operands of the bfloat16 dot product. Unnamed namespace: see floats.h.
//
// A panel is unpacked in passes of about 256 inputs: 32 outputs of them are 16 KB, which stay in the L1 cache while
// all rows pass. An operand is a vector of 16 outputs times 2 inputs, the pairs that one shift of packed dwords yields:
// inputs (0, 2), (1, 3), (4, 6), (5, 7) of every eight.
#pragma once

#include <algorithm>

#include "side_512.h"
#include "unroll.h"

namespace transload {
namespace {

constexpr int64_t kPassInputs = 256;
constexpr int64_t kEightBytes = 8 * kPanel * 2;  // eight inputs of 32 outputs, unpacked
constexpr int64_t kAhead = kPassInputs / 8 * 128;  // bytes of the next pass, fetched early

// weight = scale * number + offset, for 32 outputs in one segment.
struct Line {
  __m512 scale[2], offset[2];
};

struct Pass {
  alignas(64) uint8_t weights[kPassInputs / 8 * kEightBytes];  // [inputs / 8][4 pairs][2 halves][16 outputs][2]
  alignas(64) uint16_t numbers[32];                           // of 4-bit codes, twice
  Line lines[kPassInputs / 8];
  int64_t first, inputs;  // the pass is inputs first .. first + inputs - 1
  int64_t segment;        // inputs per line
  bool offsets;           // lines have offsets
};

// A plain function: gcc drops a prefetch that stands in a lambda, taking the lambda for one without effect.
inline __attribute__((always_inline)) void fetch(const uint8_t *line) {
  _mm_prefetch(reinterpret_cast<const char *>(line), _MM_HINT_T0);
}

// What is taken from a code to make a whole number, so that sums of either sign cancel little.
inline int base_of(const tl_geometry &g) {
  if (g.zero == TL_ZERO_MIDPOINT) return g.midpoint;
  return g.zero == TL_ZERO_MINS ? 0 : 1 << (g.bits - 1);
}

inline Line load_line(const tl_geometry &g, const Panel &panel, int64_t at) {
  Line line;
  const __m512 base = _mm512_set1_ps(static_cast<float>(base_of(g)));
  for (int t = 0; t < 2; t++, at += kHalf) {
    line.scale[t] = load_floats(panel.scales, at, g.scale_dtype);
    line.offset[t] = _mm512_setzero_ps();
    if (g.zero == TL_ZERO_MINS) line.offset[t] = load_floats(panel.zeros, at, g.scale_dtype);
    if (g.zero == TL_ZERO_CODES || g.zero == TL_ZERO_FLOATS) {
      const __m512 zero = g.zero == TL_ZERO_CODES ? _mm512_cvtepi32_ps(load_zeros(panel.zeros + at))
                                                  : load_floats(panel.zeros, at, g.scale_dtype);
      line.offset[t] = _mm512_mul_ps(line.scale[t], _mm512_sub_ps(base, zero));
    }
  }
  return line;
}

// The numbers of 4-bit codes, twice: vpermw takes 5 bits of an index, and the fifth belongs to a neighbour.
inline void fill_numbers(int base, Pass &pass) {
  for (int i = 0; i < 32; i++) pass.numbers[i] = to_bfloat16(static_cast<float>(i % 16 - base));
}

// Pair 0..3 of a row of packed 4-bit codes.
template <int PAIR>
inline __m512i numbers_of_4(__m512i row, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(row, PAIR % 2 * 8 + PAIR / 2 * 4), table);
}

// Pair 0..1 of a row of 8-bit codes. Numbers up to 255 have 8 significant bits: the upper half of a float32 is exact.
template <int PAIR>
inline __m512i numbers_of_8(__m512i row, __m512 base) {
  const auto number = [&](unsigned shift) {
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(row, shift), _mm512_set1_epi32(255));
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(code), base));
  };
  return _mm512_or_si512(_mm512_srli_epi32(number(PAIR * 8), 16), number(PAIR * 8 + 16));
}

// Numbers to weights, rounded to bfloat16.
inline __m512i weights_of(__m512i numbers, __m512 scale, __m512 offset) {
  const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(numbers, 16));
  const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(numbers, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(high, scale, offset),
                                                   _mm512_fmadd_ps(low, scale, offset));
  // From all first inputs, then all second ones, to one of each in turn.
  const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(in_turn, halves);
}

// Fills pass.weights with numbers, or with SCALED with weights.
template <int BITS, bool SCALED>
void unpack(const uint8_t *codes, int base, Pass &pass) {
  const __m512i table = _mm512_load_si512(pass.numbers);
  const __m512 zero = _mm512_set1_ps(static_cast<float>(base));
  uint8_t *to = pass.weights;
  for (int64_t k = 0; k < pass.inputs; k += 8, codes += BITS * kPanel, to += kEightBytes) {
    const Line &line = pass.lines[k / pass.segment];
    unroll<4>([&](auto pair) {
      unroll<2>([&](auto t) {
        const __m512i row = _mm512_loadu_si512(codes + (BITS == 8 ? pair / 2 * 128 : 0) + t * 64);
        __m512i two = BITS == 4 ? numbers_of_4<pair>(row, table) : numbers_of_8<pair % 2>(row, zero);
        if constexpr (SCALED) two = weights_of(two, line.scale[t], line.offset[t]);
        _mm512_store_si512(to + pair * 128 + t * 64, two);
      });
    });
    for (int at = 0; at < BITS * kPanel; at += 64) fetch(codes + kAhead + at);
  }
}

}  // namespace
}  // namespace transload

// Packed weights as floats with AVX512.
//
// A four-bit weight has 16 values per output and group: they are computed once, exactly as the loop for every processor
// does, and a code is then an index of one vector shuffle. Blocks of 16 outputs are transposed by dwords first, so that
// a 128-bit lane holds the codes of one output: 32 inputs of 4 bits, or 16 of 8 bits.
#include "dequantize.h"

#include <algorithm>

#include "side_512.h"
#include "unroll.h"

namespace transload {
namespace {

constexpr int kTileRows = 16;

// Scales, zeros and offsets of 16 outputs in one group; offset -0 changes nothing.
struct Sides {
  alignas(64) float scale[kTileRows], zero[kTileRows], offset[kTileRows];
};

void read_sides(const tl_geometry &g, const Panel &panel, int64_t at, Sides &s) {
  _mm512_store_ps(s.scale, load_floats(panel.scales, at, g.scale_dtype));
  __m512 zero = _mm512_setzero_ps(), offset = _mm512_set1_ps(-0.f);
  if (g.zero == TL_ZERO_MIDPOINT) zero = _mm512_set1_ps(static_cast<float>(g.midpoint));
  if (g.zero == TL_ZERO_CODES) zero = _mm512_cvtepi32_ps(load_zeros(panel.zeros + at));
  if (g.zero == TL_ZERO_FLOATS) zero = load_floats(panel.zeros, at, g.scale_dtype);
  if (g.zero == TL_ZERO_MINS) offset = load_floats(panel.zeros, at, g.scale_dtype);
  _mm512_store_ps(s.zero, zero);
  _mm512_store_ps(s.offset, offset);
}

inline __m512 weights_of(__m512i codes, const Sides &s, int j) {
  const __m512 shifted = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(s.zero[j]));
  return _mm512_add_ps(_mm512_mul_ps(shifted, _mm512_set1_ps(s.scale[j])), _mm512_set1_ps(s.offset[j]));
}

// Round to nearest even as floats.h does. The processor's own conversion would take subnormal numbers for zero.
inline __m256i to_bfloat16s(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

inline __m256i halves_of(__m512 values, int32_t dtype) {
  return dtype == TL_BFLOAT16 ? to_bfloat16s(values) : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
}

// Four rows of 16 dwords: lane L of column c becomes dword 4 * L + c of every row.
struct Columns {
  __m512i of[4];
};

inline Columns transpose(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i high_ab = _mm512_unpackhi_epi32(a, b), high_cd = _mm512_unpackhi_epi32(c, d);
  return {{_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd), _mm512_unpacklo_epi64(high_ab, high_cd),
           _mm512_unpackhi_epi64(high_ab, high_cd)}};
}

template <int LANE>
inline __m512i spread(__m512i column) {
  return _mm512_shuffle_i32x4(column, column, LANE * 0x55);
}

// 32 inputs of 4 bits: byte 4 * d + i of the lane holds inputs 8 * d + i and, in its upper nibble, 8 * d + 4 + i.
struct Nibbles {
  alignas(64) uint8_t bytes[64], more[64];  // where an input's byte is: for 32 words; for the first 16 dwords
  alignas(64) uint16_t word_shift[32];
  alignas(64) uint32_t dword_shift[16];

  Nibbles() {
    for (int i = 0; i < 32; i++) {
      const auto byte = static_cast<uint8_t>(i / 8 * 4 + i % 4);
      bytes[2 * i] = byte, bytes[2 * i + 1] = 0x80;
      word_shift[i] = i % 8 < 4 ? 0 : 4;
    }
    for (int i = 0; i < 64; i++) more[i] = i % 4 ? 0x80 : static_cast<uint8_t>(i / 32 * 4 + i / 4 % 4);
    for (int i = 0; i < 16; i++) dword_shift[i] = i % 8 < 4 ? 0 : 4;
  }
};

// Tables of the 16 weights of every output in a group: 16 floats, or 16 halves twice (see vpermw's 5 index bits).
struct Tables {
  alignas(64) uint8_t of[kTileRows][64];
};

void fill_tables(const Sides &s, int32_t dtype, Tables &tables) {
  const __m512i codes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int j = 0; j < kTileRows; j++) {
    const __m512 weights = weights_of(codes, s, j);
    if (dtype == TL_FLOAT32)
      _mm512_store_ps(tables.of[j], weights);
    else
      _mm512_store_si512(tables.of[j], _mm512_broadcast_i64x4(halves_of(weights, dtype)));
  }
}

// The rows of `out` that take part: outputs `first` .. `last` - 1 of the 16.
struct Rows {
  uint8_t *out;  // of output `first`
  int64_t row_bytes;
  int first, last;
};

inline __mmask32 below(int64_t count) { return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1; }

// Inputs at .. at + 31 of 16 outputs, of which `left` are wanted.
void store_nibbles(const Columns &columns, const Tables &tables, const Nibbles &n, int32_t dtype, const Rows &rows,
                   int64_t at, int64_t left) {
  const __m512i bytes = _mm512_load_si512(n.bytes), shifts = _mm512_load_si512(n.word_shift);
  const __m512i low = _mm512_load_si512(n.more), dword_shifts = _mm512_load_si512(n.dword_shift);
  const __m512i high = _mm512_add_epi8(low, _mm512_set1_epi32(8));
  const __mmask32 wanted = below(left);
  unroll<kTileRows>([&](auto j) __attribute__((always_inline)) {
    if (j < rows.first || j >= rows.last) return;
    const __m512i lane = spread<j / 4>(columns.of[j % 4]), table = _mm512_load_si512(tables.of[j]);
    uint8_t *to = rows.out + (j - rows.first) * rows.row_bytes;
    if (dtype != TL_FLOAT32) {
      const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(lane, bytes), shifts);
      _mm512_mask_storeu_epi16(to + at * 2, wanted, _mm512_permutexvar_epi16(index, table));
      return;
    }
    const auto sixteen = [&](__m512i where) {
      return _mm512_permutexvar_epi32(_mm512_srlv_epi32(_mm512_shuffle_epi8(lane, where), dword_shifts), table);
    };
    _mm512_mask_storeu_epi32(to + at * 4, static_cast<__mmask16>(wanted), sixteen(low));
    _mm512_mask_storeu_epi32(to + at * 4 + 64, static_cast<__mmask16>(wanted >> 16), sixteen(high));
  });
}

// Inputs at .. at + 15 of 16 outputs, 8 bits each.
void store_bytes_of(const Columns &columns, const Sides &s, int32_t dtype, const Rows &rows, int64_t at, int64_t left) {
  const auto wanted = static_cast<__mmask16>(below(std::min<int64_t>(left, 16)));
  unroll<kTileRows>([&](auto j) __attribute__((always_inline)) {
    if (j < rows.first || j >= rows.last) return;
    const __m128i lane = _mm512_extracti32x4_epi32(columns.of[j % 4], j / 4);
    const __m512 weights = weights_of(_mm512_cvtepu8_epi32(lane), s, j);
    uint8_t *to = rows.out + (j - rows.first) * rows.row_bytes;
    if (dtype == TL_FLOAT32)
      _mm512_mask_storeu_ps(to + at * 4, wanted, weights);
    else
      _mm256_mask_storeu_epi16(to + at * 2, wanted, halves_of(weights, dtype));
  });
}

// Outputs 16 * half .. of a panel.
void fill_half(const Layout &l, const Panel &panel, int half, int32_t dtype, const Rows &rows) {
  static const Nibbles nibbles;
  const tl_geometry &g = l.geometry;
  const bool four = g.bits == 4;
  const int64_t block = four ? 32 : 16, group = l.groups == 1 ? l.kp : g.group_size;
  Sides sides;
  Tables tables;
  const auto row = [&](const uint8_t *from) { return _mm512_loadu_si512(from + half * 64); };
  for (int64_t k = 0; k < g.k; k += block) {
    if (k % group == 0) {
      read_sides(g, panel, k / group * kPanel + half * kHalf, sides);
      if (four) fill_tables(sides, dtype, tables);
    }
    const uint8_t *codes = panel.codes + k / 8 * l.step_bytes;
    const int64_t next = 128;  // both bit widths: every 128 bytes hold the 32 outputs once
    const Columns columns = transpose(row(codes), row(codes + next), row(codes + 2 * next), row(codes + 3 * next));
    if (four)
      store_nibbles(columns, tables, nibbles, dtype, rows, k, g.k - k);
    else
      store_bytes_of(columns, sides, dtype, rows, k, g.k - k);
  }
}

}  // namespace

void dequantize_avx512(const Layout &l, const Panel &panel, int first, int count, int32_t dtype, uint8_t *out,
                       int64_t row_bytes) {
  if (l.groups > 1 && l.geometry.group_size % (l.geometry.bits == 4 ? 32 : 16))
    return dequantize_plain(l, panel, first, count, dtype, out, row_bytes);
  for (int half = 0; half < 2; half++) {
    const int from = std::max(first, half * kHalf), to = std::min(first + count, (half + 1) * kHalf);
    const Rows rows{out + (from - first) * row_bytes, row_bytes, from - half * kHalf, to - half * kHalf};
    if (from < to) fill_half(l, panel, half, dtype, rows);
  }
}

}  // namespace transload

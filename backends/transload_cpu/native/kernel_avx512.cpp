// AVX512-VNNI: one panel is two vectors of 16 outputs; vpdpbusd adds 4 products per output and instruction.
//
// Few rows are bound by reading weights, many rows by the two multiply ports; both run the same loop, with the weights
// unpacked in registers. With few rows there are registers to spare: the two nibbles of a byte get sums of their own,
// which makes the chains of dependent instructions shorter and leaves the high nibbles where they are, times 16.
#include <utility>

#include "side_512.h"

namespace transload {
namespace {

constexpr int kRows = 12;  // 12 rows * 2 vectors = 24 sums, leaving 8 of the 32 registers for operands

inline __m512i broadcast_four(const int8_t *q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}

template <int ROWS, int BITS, bool SPLIT>
void multiply_rows(const Plan &p, const Panel &panel, const Tile &tile, float *out) {
  constexpr bool APART = ROWS <= 4;  // separate sums for both halves of the 8 inputs
  constexpr int TOKENS = SPLIT ? ROWS / 2 : ROWS, STEP = BITS * kPanel;
  const tl_geometry &g = p.weight->geometry;
  const bool whole = whole_zeros(g);
  const __m512i low_mask = _mm512_set1_epi8(15), high_mask = _mm512_set1_epi8(static_cast<char>(0xf0));
  const int64_t stride = int64_t(p.rows) * 8, kp = p.weight->kp;
  __m512 y[TOKENS][2];
  for (auto &row : y) row[0] = row[1] = _mm512_setzero_ps();
  const uint8_t *codes = panel.codes;
  const int8_t *q = tile.q;
  int64_t group = 0, until_next_group = p.segments_per_group;
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t left = kp - s * p.segment, steps = (left < p.segment ? left : p.segment) / 8;
    __m512i low[ROWS][2], high[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) low[r][0] = low[r][1] = high[r][0] = high[r][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < steps; i++, codes += STEP, q += stride) {
      __m512i a[2], b[2];  // the operands for inputs 0..3 and 4..7
#pragma GCC unroll 2
      for (int t = 0; t < 2; t++) {
        a[t] = _mm512_loadu_si512(codes + t * 64);
        _mm_prefetch(reinterpret_cast<const char *>(codes + t * 64 + 4096), _MM_HINT_T0);
        if (BITS == 8) {
          b[t] = _mm512_loadu_si512(codes + 128 + t * 64);
        } else {
          b[t] = APART ? _mm512_and_si512(a[t], high_mask) : _mm512_and_si512(_mm512_srli_epi16(a[t], 4), low_mask);
          a[t] = _mm512_and_si512(a[t], low_mask);
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        const __m512i x = broadcast_four(q + r * 8);
        low[r][0] = _mm512_dpbusd_epi32(low[r][0], a[0], x);
        low[r][1] = _mm512_dpbusd_epi32(low[r][1], a[1], x);
      }
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        const __m512i x = broadcast_four(q + r * 8 + 4);
        auto &to = APART ? high[r] : low[r];
        to[0] = _mm512_dpbusd_epi32(to[0], b[0], x);
        to[1] = _mm512_dpbusd_epi32(to[1], b[1], x);
      }
    }
    const int64_t side = s * p.rows;
#pragma GCC unroll 2
    for (int t = 0; t < 2; t++) {
      const Side w = load_side(g, panel, group * kPanel + t * kHalf);
      auto total = [&](int r) {
        __m512i sum = low[r][t];
        if (APART) sum = _mm512_add_epi32(sum, BITS == 4 ? _mm512_srai_epi32(high[r][t], 4) : high[r][t]);
        return whole ? _mm512_dpwssd_epi32(sum, w.minus_zero, _mm512_set1_epi32(tile.sum[side + r])) : sum;
      };
#pragma GCC unroll 12
      for (int m = 0; m < TOKENS; m++) {
        const int r = SPLIT ? 2 * m : m;
        __m512i sum = total(r);
        if (SPLIT) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 7), total(r + 1));
        const __m512 scale = _mm512_mul_ps(w.scale, _mm512_set1_ps(tile.scale[side + r]));
        y[m][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, y[m][t]);
        if (!whole) y[m][t] = _mm512_fmadd_ps(w.offset, _mm512_set1_ps(tile.moment[side + r]), y[m][t]);
      }
    }
    if (--until_next_group == 0) group++, until_next_group = p.segments_per_group;
  }
  for (int m = 0; m < TOKENS; m++) {
    _mm512_storeu_ps(out + m * kPanel, y[m][0]);
    _mm512_storeu_ps(out + m * kPanel + kHalf, y[m][1]);
  }
}

using MultiplyRows = void (*)(const Plan &, const Panel &, const Tile &, float *);

template <int BITS, std::size_t... I>
void multiply_bits(const Plan &p, const Panel &panel, const Tile &tile, int rows, float *out,
                   std::index_sequence<I...>) {
  static constexpr MultiplyRows whole[] = {multiply_rows<int(I) + 1, BITS, false>...};
  static constexpr MultiplyRows split[] = {multiply_rows<(int(I) / 2 + 1) * 2, BITS, true>...};
  (p.split ? split : whole)[rows - 1](p, panel, tile, out);
}

void multiply_tile(const Plan &p, const Panel &panel, const Tile &tile, int rows, float *out) {
  if (p.weight->geometry.bits == 4)
    multiply_bits<4>(p, panel, tile, rows, out, std::make_index_sequence<kRows>{});
  else
    multiply_bits<8>(p, panel, tile, rows, out, std::make_index_sequence<kRows>{});
}

}  // namespace

const Isa avx512_vnni_isa = {"avx512-vnni", kRows,        1, 8, 384 << 10, read_row,
                             quantize_row, multiply_each<multiply_tile>, store_row, nullptr, nullptr};

}  // namespace transload

// AVX512-VNNI: one panel is two vectors of 16 outputs; vpdpbusd adds 4 products per output and instruction.
//
// Few rows are bound by reading weights, many rows by the two multiply ports; both run the same loop, with the weights
// unpacked in registers. With few rows there are registers to spare: the two nibbles of a byte get sums of their own,
// which makes the chains of dependent instructions shorter and leaves the high nibbles where they are, times 16.
#include <utility>

#include "side_512.h"
#include "unroll.h"

namespace transload {
namespace {

constexpr int64_t kPrefetch = 4096;  // bytes ahead in the weight's one stream
constexpr int kRows = 12;  // 12 rows * 2 vectors = 24 sums, leaving 8 of the 32 registers for operands

inline __m512i broadcast_four(const int8_t *q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}

// The operands of one panel for 8 inputs: inputs 0..3 and 4..7 of 16 + 16 outputs.
struct Eight {
  __m512i first[2], second[2];
};

// With `apart`, the high nibbles of 4-bit codes stay where they are and count 16 times.
template <int BITS, bool APART>
inline __attribute__((always_inline)) Eight load_eight(const uint8_t *codes) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  Eight e;
  unroll<2>([&](auto t) {
    const __m512i row = _mm512_loadu_si512(codes + t * 64);
    if constexpr (BITS == 8) {
      e.first[t] = row;
      e.second[t] = _mm512_loadu_si512(codes + 128 + t * 64);
    } else if constexpr (BITS > 4) {
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(row, 4), low);
      e.first[t] = _mm512_or_si512(_mm512_and_si512(row, low), upper_512<BITS>(codes, t));
      e.second[t] = _mm512_or_si512(second, upper_512<BITS>(codes, 2 + t));
    } else {
      e.first[t] = _mm512_and_si512(row, low);
      e.second[t] = APART ? _mm512_and_si512(row, high) : _mm512_and_si512(_mm512_srli_epi16(row, 4), low);
    }
  });
  return e;
}

template <int ROWS, int BITS, bool SPLIT>
void multiply_rows(const Plan &p, const Panel &panel, const Tile &tile, float *out) {
  constexpr bool APART = ROWS <= 5;  // separate sums for both halves of the 8 inputs
  // Where sums of a midpoint start: with few rows at what makes up for it. With many, 12 loads at the start of every
  // segment cost more than adding it at the end.
  constexpr bool FIRST = ROWS < 4;
  constexpr int TOKENS = SPLIT ? ROWS / 2 : ROWS, STEP = BITS * kPanel;
  const tl_geometry &g = p.weight->geometry;
  const bool code_zeros = g.zero == TL_ZERO_CODES, float_zeros = g.zero >= TL_ZERO_FLOATS;
  const bool last = !FIRST && g.zero == TL_ZERO_MIDPOINT;
  const int64_t stride = int64_t(p.rows) * 8, kp = p.weight->kp;
  __m512 y[TOKENS][2];
  unroll<TOKENS>([&](auto m) { y[m][0] = y[m][1] = _mm512_setzero_ps(); });
  const uint8_t *codes = panel.codes;
  const int8_t *q = tile.q;
  int64_t group = 0, until_next_group = p.segments_per_group;
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t left = kp - s * p.segment, steps = (left < p.segment ? left : p.segment) / 8;
    __m512i sum[ROWS][2], apart[APART ? ROWS : 1][2];
    const int64_t side = s * p.rows;
    unroll<ROWS>([&](auto r) {
      sum[r][0] = sum[r][1] = FIRST ? _mm512_set1_epi32(tile.start[side + r]) : _mm512_setzero_si512();
    });
    if constexpr (APART) unroll<ROWS>([&](auto r) { apart[r][0] = apart[r][1] = _mm512_setzero_si512(); });
    for (int64_t i = 0; i < steps; i++, codes += STEP, q += stride) {
      const Eight e = load_eight<BITS, APART>(codes);
      for (int line = 0; line < STEP; line += 64)  // not in a lambda: gcc takes one for empty and drops it
        _mm_prefetch(reinterpret_cast<const char *>(codes + kPrefetch + line), _MM_HINT_T0);
      unroll<ROWS>([&](auto r) {
        const __m512i x = broadcast_four(q + r * 8);
        sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], e.first[0], x);
        sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], e.first[1], x);
      });
      unroll<ROWS>([&](auto r) {
        const __m512i x = broadcast_four(q + r * 8 + 4);
        if constexpr (APART) {
          apart[r][0] = _mm512_dpbusd_epi32(apart[r][0], e.second[0], x);
          apart[r][1] = _mm512_dpbusd_epi32(apart[r][1], e.second[1], x);
        } else {
          sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], e.second[0], x);
          sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], e.second[1], x);
        }
      });
    }
    unroll<2>([&](auto t) {
      const Side w = load_side(g, panel, group * kPanel + t * kHalf);
      if (last)
        unroll<ROWS>([&](auto r) {
          sum[r][t] = _mm512_add_epi32(sum[r][t], _mm512_set1_epi32(tile.start[side + r]));
        });
      unroll<ROWS>([&](auto r) {
        __m512i &all = sum[r][t];
        if constexpr (APART)
          all = _mm512_add_epi32(all, BITS == 4 ? _mm512_srai_epi32(apart[r][t], 4) : apart[r][t]);
        if (code_zeros) all = _mm512_dpwssd_epi32(all, w.minus_zero, _mm512_set1_epi32(tile.sum[side + r]));
      });
      unroll<TOKENS>([&](auto m) {
        constexpr int r = SPLIT ? 2 * m : m;
        __m512i all = sum[r][t];
        if constexpr (SPLIT) all = _mm512_add_epi32(_mm512_slli_epi32(all, 7), sum[r + 1][t]);
        const __m512 scale = _mm512_mul_ps(w.scale, _mm512_set1_ps(tile.scale[side + r]));
        y[m][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), scale, y[m][t]);
        if (float_zeros) y[m][t] = _mm512_fmadd_ps(w.offset, _mm512_set1_ps(tile.moment[side + r]), y[m][t]);
      });
    });
    if (--until_next_group == 0) group++, until_next_group = p.segments_per_group;
  }
  unroll<TOKENS>([&](auto m) {
    _mm512_storeu_ps(out + m * kPanel, y[m][0]);
    _mm512_storeu_ps(out + m * kPanel + kHalf, y[m][1]);
  });
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
  constexpr auto each = std::make_index_sequence<kRows>{};
  switch (p.weight->geometry.bits) {
    case 4: return multiply_bits<4>(p, panel, tile, rows, out, each);
    case 5: return multiply_bits<5>(p, panel, tile, rows, out, each);
    case 6: return multiply_bits<6>(p, panel, tile, rows, out, each);
    default: return multiply_bits<8>(p, panel, tile, rows, out, each);
  }
}

}  // namespace

const Isa avx512_vnni_isa = {"avx512-vnni", kRows,        1, 8, 384 << 10, read_row,
                             quantize_row, multiply_each<multiply_tile>, store_row, nullptr, nullptr,
                             widen,        true};

}  // namespace transload

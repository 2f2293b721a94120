// AArch64 with the dot-product extension (Neoverse, Kunpeng 920, Apple M1): sdot adds 4 signed products per output.
//
// sdot wants signed codes: 4-bit ones are small enough as they are, 8-bit ones have 128 taken off, which the row sums
// give back. A panel is walked twice, 16 outputs at a time: four vectors of 4 outputs.
#include <arm_neon.h>

#include "row_math.h"

namespace transload {
namespace {

constexpr int kRows = 4;
constexpr int kVectors = 4;  // of 4 outputs each, in half a panel

inline float32x4_t load_floats(const uint8_t *from, int64_t at, int32_t dtype) {
  if (dtype == TL_FLOAT32) return vreinterpretq_f32_u8(vld1q_u8(from + at * 4));
  const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(from + at * 2));
  if (dtype == TL_FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
  return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}

// Scale and zero of 4 outputs in one group.
struct Side {
  float32x4_t scale, offset;  // offset is added times the moment
  int32x4_t correction;       // added times the row sum
};

template <int BITS>
inline Side load_side(const tl_geometry &g, const Panel &panel, int64_t at) {
  constexpr int32_t taken_off = BITS == 8 ? 128 : 0;
  Side s{load_floats(panel.scales, at, g.scale_dtype), vdupq_n_f32(0), vdupq_n_s32(taken_off)};
  if (g.zero == TL_ZERO_MIDPOINT) {
    s.correction = vdupq_n_s32(taken_off - g.midpoint);
  } else if (g.zero == TL_ZERO_CODES) {
    int32_t zero[4];
    for (int i = 0; i < 4; i++) zero[i] = taken_off - panel.zeros[at + i];
    s.correction = vld1q_s32(zero);
  } else if (g.zero == TL_ZERO_FLOATS) {
    s.offset = vnegq_f32(vmulq_f32(s.scale, load_floats(panel.zeros, at, g.scale_dtype)));
  } else {
    s.offset = load_floats(panel.zeros, at, g.scale_dtype);
  }
  return s;
}

template <int BITS>
inline void load_codes(const uint8_t *from, int8x16_t *low, int8x16_t *high) {
  const uint8x16_t bytes = vld1q_u8(from);
  if (BITS == 4) {
    *low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
    *high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
  } else {
    *low = vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
    *high = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from + 128), vdupq_n_u8(128)));
  }
}

// rows of a tile times the 16 outputs of half `half` of a panel.
template <int ROWS, int BITS, bool SPLIT>
void multiply_half(const Plan &p, const Panel &panel, const Tile &tile, int half, float *out) {
  constexpr int TOKENS = SPLIT ? ROWS / 2 : ROWS, STEP = BITS * kPanel;
  const tl_geometry &g = p.weight->geometry;
  const int64_t stride = int64_t(p.rows) * 8, kp = p.weight->kp;
  float32x4_t y[TOKENS][kVectors];
  for (auto &row : y)
    for (auto &vector : row) vector = vdupq_n_f32(0);
  const uint8_t *codes = panel.codes + half * 64;
  const int8_t *q = tile.q;
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t left = kp - s * p.segment, steps = (left < p.segment ? left : p.segment) / 8;
    int32x4_t sum[ROWS][kVectors];
    for (auto &row : sum)
      for (auto &vector : row) vector = vdupq_n_s32(0);
    for (int64_t i = 0; i < steps; i++, codes += STEP, q += stride) {
      int8x8_t x[ROWS];
      for (int r = 0; r < ROWS; r++) x[r] = vld1_s8(q + r * 8);
      for (int v = 0; v < kVectors; v++) {
        int8x16_t low, high;
        load_codes<BITS>(codes + v * 16, &low, &high);
        for (int r = 0; r < ROWS; r++) {
          sum[r][v] = vdotq_lane_s32(sum[r][v], low, x[r], 0);
          sum[r][v] = vdotq_lane_s32(sum[r][v], high, x[r], 1);
        }
      }
    }
    const int64_t side = s * p.rows, group = s / p.segments_per_group * kPanel + half * kHalf;
    for (int v = 0; v < kVectors; v++) {
      const Side w = load_side<BITS>(g, panel, group + v * 4);
      auto total = [&](int r) { return vmlaq_n_s32(sum[r][v], w.correction, tile.sum[side + r]); };
      for (int m = 0; m < TOKENS; m++) {
        const int r = SPLIT ? 2 * m : m;
        int32x4_t all = total(r);
        if (SPLIT) all = vaddq_s32(vshlq_n_s32(all, 7), total(r + 1));
        y[m][v] = vfmaq_f32(y[m][v], vcvtq_f32_s32(all), vmulq_n_f32(w.scale, tile.scale[side + r]));
        y[m][v] = vfmaq_n_f32(y[m][v], w.offset, tile.moment[side + r]);
      }
    }
  }
  for (int m = 0; m < TOKENS; m++)
    for (int v = 0; v < kVectors; v++) vst1q_f32(out + m * kPanel + half * kHalf + v * 4, y[m][v]);
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

const Isa dotprod_isa = {"neon-dotprod", kRows,        1, 8, 256 << 10, read_row,
                         quantize_row,   multiply_each<multiply_tile>, store_row, nullptr, nullptr, widen, false};

}  // namespace transload

// AVX512-BF16: many rows of bfloat16 activations. Weights are dequantized to bfloat16 once for a band of rows, and the
// products summed in float32 over all of K: sums are not scaled per group, which costs the integer kernels time.
//
// K is walked in passes of 256 inputs, whose 32 outputs are 16 KB of bfloat16 pairs and stay in the L1 cache.
#include <utility>

#include "side_512.h"
#include "unroll.h"

namespace transload {
namespace {

constexpr int kRows = 12;
constexpr int64_t kPassInputs = 256;
constexpr int64_t kPairBytes = kPanel * 4;  // two inputs of 32 outputs

// Scale and offset of 16 outputs: weight = scale * code + offset.
struct Line {
  __m512 scale, offset;
};

inline Line load_line(const tl_geometry &g, const Panel &panel, int64_t at) {
  const Side side = load_side(g, panel, at);
  if (g.zero >= TL_ZERO_FLOATS) return {side.scale, side.offset};
  const __m512 zero = g.zero == TL_ZERO_CODES ? _mm512_cvtepi32_ps(load_zeros(panel.zeros + at))
                                              : _mm512_set1_ps(static_cast<float>(g.midpoint));
  return {side.scale, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(side.scale, zero))};
}

// Codes at bits `shift` and `shift + 8` of every dword as a pair of bfloat16 per output.
inline __m512i dequantize_pair(__m512i codes, int shift, __m512i mask, const Line &line) {
  const auto weight = [&](int bits) {
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, static_cast<unsigned>(bits)), mask);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), line.scale, line.offset);
  };
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(weight(shift + 8), weight(shift));
  // From all first halves, then all second ones, to one of each in turn.
  const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(in_turn, halves);
}

// Inputs [from, to) of a panel: [pairs][2 halves][16 outputs][2 inputs].
void dequantize_pass(const Layout &w, const Panel &panel, int64_t from, int64_t to, uint8_t *out) {
  const tl_geometry &g = w.geometry;
  const int64_t group = g.group_size == -1 ? w.kp : g.group_size;
  const __m512i mask = _mm512_set1_epi32(g.bits == 4 ? 15 : 255);
  Line lines[2];
  for (int64_t k = from; k < to; k += 8, out += 4 * kPairBytes) {
    if (k == from || k % group == 0) {
      const int64_t at = (k / group < w.groups ? k / group : w.groups - 1) * kPanel;  // padding belongs to no group
      for (int t = 0; t < 2; t++) lines[t] = load_line(g, panel, at + t * kHalf);
    }
    for (int t = 0; t < 2; t++) {
      const uint8_t *codes = panel.codes + k / 8 * w.step_bytes + t * 64;
      const __m512i first = _mm512_loadu_si512(codes);
      const __m512i second = g.bits == 4 ? _mm512_srli_epi32(first, 4) : _mm512_loadu_si512(codes + 128);
      uint8_t *to_half = out + t * 64;
      _mm512_store_si512(to_half, dequantize_pair(first, 0, mask, lines[t]));
      _mm512_store_si512(to_half + kPairBytes, dequantize_pair(first, 16, mask, lines[t]));
      _mm512_store_si512(to_half + 2 * kPairBytes, dequantize_pair(second, 0, mask, lines[t]));
      _mm512_store_si512(to_half + 3 * kPairBytes, dequantize_pair(second, 16, mask, lines[t]));
    }
  }
}

// One token as bfloat16 pairs: tile.q holds [kp / 2][rows][2].
void place_row_bf16(const Plan &p, const float *x, int row, int8_t *bytes, const Tile &tile) {
  const int64_t kp = p.weight->kp, stride = int64_t(p.rows) * 4;
  for (int64_t k = 0; k < kp; k += 32) {
    const __m512bh halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k));
    _mm512_storeu_si512(bytes + k * 2, (__m512i)halves);
  }
  int8_t *to = tile.q + row * 4;
  for (int64_t pair = 0; pair < kp / 2; pair++) std::memcpy(to + pair * stride, bytes + pair * 4, 4);
}

// Adds `pairs` pairs of inputs to out [ROWS][32].
template <int ROWS>
void add_pass(const uint8_t *weights, const uint8_t *q, int64_t stride, int64_t pairs, float *out) {
  __m512 y[ROWS][2];
  unroll<ROWS>([&](auto r) {
    y[r][0] = _mm512_loadu_ps(out + r * kPanel);
    y[r][1] = _mm512_loadu_ps(out + r * kPanel + kHalf);
  });
  for (int64_t i = 0; i < pairs; i++, weights += kPairBytes, q += stride) {
    const auto w0 = (__m512bh)_mm512_load_si512(weights), w1 = (__m512bh)_mm512_load_si512(weights + 64);
    unroll<ROWS>([&](auto r) {
      int32_t pair;
      std::memcpy(&pair, q + r * 4, 4);
      const auto x = (__m512bh)_mm512_set1_epi32(pair);
      y[r][0] = _mm512_dpbf16_ps(y[r][0], x, w0);
      y[r][1] = _mm512_dpbf16_ps(y[r][1], x, w1);
    });
  }
  unroll<ROWS>([&](auto r) {
    _mm512_storeu_ps(out + r * kPanel, y[r][0]);
    _mm512_storeu_ps(out + r * kPanel + kHalf, y[r][1]);
  });
}

using AddPass = void (*)(const uint8_t *, const uint8_t *, int64_t, int64_t, float *);

template <int... I>
AddPass add_pass_of(int rows, std::integer_sequence<int, I...>) {
  static constexpr AddPass all[] = {add_pass<I + 1>...};
  return all[rows - 1];
}

void multiply(const Plan &p, const Panel &panel, const TileRun &tiles, float *out) {
  alignas(64) uint8_t weights[kPassInputs / 2 * kPairBytes];
  int64_t rows = 0;
  for (int i = 0; i < tiles.count; i++) rows += tiles.rows[i];
  std::memset(out, 0, static_cast<size_t>(rows) * kPanel * sizeof(float));
  const int64_t kp = p.weight->kp, stride = int64_t(p.rows) * 4;
  for (int64_t from = 0; from < kp; from += kPassInputs) {
    const int64_t to = from + kPassInputs < kp ? from + kPassInputs : kp;
    dequantize_pass(*p.weight, panel, from, to, weights);
    float *y = out;
    for (int i = 0; i < tiles.count; i++) {
      const auto *q = reinterpret_cast<const uint8_t *>(tile_after(p, tiles.first, i).q) + from / 2 * stride;
      add_pass_of(tiles.rows[i], std::make_integer_sequence<int, kRows>{})(weights, q, stride, (to - from) / 2, y);
      y += tiles.rows[i] * kPanel;
    }
  }
}

}  // namespace

const Isa avx512_bf16_isa = {"avx512-bf16", kRows, 1, 2, 768 << 10, read_row, place_row_bf16, multiply, store_row,
                             dequantize, nullptr, nullptr};

}  // namespace transload

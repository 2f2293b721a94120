// AVX512-BF16: bfloat16 activations as they are, times codes as whole numbers in bfloat16, summed in float32 and scaled
// once per segment: both factors are exact, and nothing is rounded but the sums.
//
// With small groups and many rows, scaling so often costs a tenth of the time. There the weights are scaled when they
// are unpacked, which rounds them to bfloat16, and sums run over a whole pass.
#include <utility>

#include "unpack_bf16.h"
#include "widen_512.h"

namespace transload {
namespace {

constexpr int kRows = 12;  // 12 rows * 2 vectors = 24 sums, leaving 8 of the 32 registers for operands
constexpr int64_t kSmallSegment = 64, kManyRows = 64;

// out[rows][32] += a tile times a pass. With UNPACK, 4-bit codes are unpacked on the way and left in the pass for the
// tiles that follow: the shuffles then run beside the multiplications, which matters when the rows are few.
template <int ROWS, bool UNPACK>
void add_pass(const Plan &p, const uint8_t *codes, Pass &pass, const Tile &tile, float *out) {
  const int64_t stride = int64_t(p.rows) * 16, last = pass.first + pass.inputs;
  const __m512i table = _mm512_load_si512(pass.numbers);
  const int8_t *q = tile.q + pass.first / 8 * stride;
  const Line *line = pass.lines;
  uint8_t *weights = pass.weights;
  for (int64_t k = pass.first; k < last; k += pass.segment, line++) {
    const int64_t steps = std::min(pass.segment, last - k) / 8;
    __m512 sum[ROWS][2];
    unroll<ROWS>([&](auto r) { sum[r][0] = sum[r][1] = _mm512_setzero_ps(); });
    for (int64_t i = 0; i < steps; i++, weights += kEightBytes, q += stride) {
      __m512i rows[2];
      if constexpr (UNPACK) {
        rows[0] = _mm512_loadu_si512(codes), rows[1] = _mm512_loadu_si512(codes + 64);
        fetch(codes + kAhead);
        fetch(codes + kAhead + 64);
        codes += 4 * kPanel;
      }
      unroll<4>([&](auto pair) __attribute__((always_inline)) {
        uint8_t *at = weights + pair * 128;
        if constexpr (UNPACK) {
          _mm512_store_si512(at, numbers_of_4<pair>(rows[0], table));
          _mm512_store_si512(at + 64, numbers_of_4<pair>(rows[1], table));
        }
        const auto w0 = (__m512bh)_mm512_load_si512(at), w1 = (__m512bh)_mm512_load_si512(at + 64);
        unroll<ROWS>([&](auto r) {
          int32_t two;
          std::memcpy(&two, q + r * 16 + pair * 4, 4);
          const auto x = (__m512bh)_mm512_set1_epi32(two);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, w0);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, w1);
        });
      });
    }
    __asm__ volatile("" ::: "memory");  // otherwise gcc holds all of `out` on the stack, and moves it there and back
    const float *moment = tile.moment + k / p.segment * p.rows;
    unroll<ROWS>([&](auto r) {
      unroll<2>([&](auto t) {
        float *to = out + r * kPanel + t * kHalf;
        __m512 y = _mm512_fmadd_ps(sum[r][t], line->scale[t], _mm512_loadu_ps(to));
        if (pass.offsets) y = _mm512_fmadd_ps(line->offset[t], _mm512_set1_ps(moment[r]), y);
        _mm512_storeu_ps(to, y);
      });
    });
  }
}

using AddPass = void (*)(const Plan &, const uint8_t *, Pass &, const Tile &, float *);

template <bool UNPACK, int... I>
AddPass add_pass_of(int rows, std::integer_sequence<int, I...>) {
  static constexpr AddPass all[] = {add_pass<I + 1, UNPACK>...};
  return all[rows - 1];
}

// Inputs that segments cover; padding behind them is nobody's.
int64_t inputs_of(const Plan &p) { return std::min(p.weight->kp, p.segments * p.segment); }

// Lines of the pass, and its weights unless the first tile is to unpack them. Returns where that tile reads the codes.
const uint8_t *load_pass(const Plan &p, const Panel &panel, int64_t first, bool scaled, Pass &pass) {
  const Layout &w = *p.weight;
  const tl_geometry &g = w.geometry;
  const int64_t segments = kPassInputs / p.segment, at = first / p.segment;
  pass.first = first;
  pass.inputs = std::min(segments * p.segment, inputs_of(p) - first);
  pass.segment = p.segment;
  pass.offsets = g.zero != TL_ZERO_MIDPOINT && !scaled;
  for (int64_t s = at; s < std::min(p.segments, at + segments); s++)
    pass.lines[s - at] = load_line(g, panel, s / p.segments_per_group * kPanel);
  const uint8_t *codes = panel.codes + first / 8 * w.step_bytes;
  if (scaled) {
    (g.bits == 4 ? unpack<4, true> : unpack<8, true>)(codes, base_of(g), pass);
    pass.segment = pass.inputs;
    const __m512 one = _mm512_set1_ps(1);
    pass.lines[0] = {{one, one}, {}};
  } else if (g.bits == 8) {
    unpack<8, false>(codes, base_of(g), pass);
  }
  return codes;
}

void multiply(const Plan &p, const Panel &panel, const TileRun &tiles, float *out) {
  Pass pass;
  fill_numbers(base_of(p.weight->geometry), pass);
  int64_t rows = 0;
  for (int i = 0; i < tiles.count; i++) rows += tiles.rows[i];
  std::memset(out, 0, static_cast<size_t>(rows) * kPanel * sizeof(float));
  const bool scaled = p.segment <= kSmallSegment && rows >= kManyRows;
  const bool by_tile = p.weight->geometry.bits == 4 && !scaled;
  for (int64_t first = 0; first < inputs_of(p); first += pass.inputs) {
    const uint8_t *codes = load_pass(p, panel, first, scaled, pass);
    float *y = out;
    for (int i = 0; i < tiles.count; i++) {
      constexpr auto counts = std::make_integer_sequence<int, kRows>{};
      const int r = tiles.rows[i];
      const auto add = by_tile && i == 0 ? add_pass_of<true>(r, counts) : add_pass_of<false>(r, counts);
      add(p, codes, pass, tile_after(p, tiles.first, i), y);
      y += r * kPanel;
    }
  }
}

// One token stays bfloat16; the driver's float32 memory holds it in its first half.
void read_halves(const void *x, int32_t, int64_t k, int64_t kp, const int32_t *order, float *out) {
  const auto *from = static_cast<const uint8_t *>(x);
  auto *to = reinterpret_cast<uint8_t *>(out);
  if (order == nullptr) {
    std::memcpy(to, from, static_cast<size_t>(k) * 2);
  } else {
    for (int64_t i = 0; i < k; i++) std::memcpy(to + i * 2, from + int64_t(order[i]) * 2, 2);
  }
  std::memset(to + k * 2, 0, static_cast<size_t>(kp - k) * 2);
}

// One token into its tile, [kp / 8][rows][8], every eight in the order of the pairs; sums of segments as moments.
void place_halves(const Plan &p, const float *x, int row, int8_t *, const Tile &tile) {
  const int64_t kp = p.weight->kp, stride = int64_t(p.rows) * 16;
  const auto *from = reinterpret_cast<const uint8_t *>(x);
  int8_t *to = tile.q + row * 16;
  for (int64_t i = 0; i < kp / 8; i++) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i * 16));
    const __m128i paired = _mm_shufflehi_epi16(_mm_shufflelo_epi16(eight, 0xd8), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i * stride), paired);
  }
  if (p.weight->geometry.zero == TL_ZERO_MIDPOINT) return;
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t first = s * p.segment, last = std::min(kp, first + p.segment);
    float sum = 0;
    for (int64_t i = first; i < last; i++) sum += read_float(x, i, TL_BFLOAT16);
    tile.moment[s * p.rows + row] = sum;
  }
}

void store_halves(const float *out, const float *bias, int n, void *y, int64_t at, int32_t dtype) {
  if (n < kPanel) return store_row(out, bias, n, y, at, dtype);
  __m512 low = _mm512_loadu_ps(out), high = _mm512_loadu_ps(out + kHalf);
  if (bias) low = _mm512_add_ps(low, _mm512_loadu_ps(bias)), high = _mm512_add_ps(high, _mm512_loadu_ps(bias + kHalf));
  _mm512_storeu_si512(static_cast<uint16_t *>(y) + at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace

const Isa avx512_bf16_isa = {"avx512-bf16", kRows,    1,            8,       2 << 20, read_halves,
                             place_halves,  multiply, store_halves, nullptr, nullptr, widen, false};

}  // namespace transload

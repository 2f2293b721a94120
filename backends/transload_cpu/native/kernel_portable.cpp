// The kernel in plain C++: correct on every CPU, and what the others are read against.
#include "row_math.h"

namespace transload {
namespace {

constexpr int kRows = 4;

// Sums of one segment for every row: [kRows][32].
struct Sums {
  int32_t of[kRows][kPanel];
};

void add_eight(const uint8_t *codes, int bits, const int8_t *q, int rows, Sums &sums) {
  for (int j = 0; j < kPanel; j++) {
    const uint8_t *low = codes + (j / kHalf) * 64 + (j % kHalf) * 4;
    for (int r = 0; r < rows; r++) {
      const int8_t *a = q + r * 8;
      int32_t sum = 0;
      for (int i = 0; i < 4; i++)
        sum += bits == 4 ? (low[i] & 15) * a[i] + (low[i] >> 4) * a[4 + i] : low[i] * a[i] + low[128 + i] * a[4 + i];
      sums.of[r][j] += sum;
    }
  }
}

// Scales the sums of one segment and adds them to the result.
void scale_segment(const Plan &p, const Panel &panel, const Tile &tile, int64_t segment, int rows, const Sums &sums,
                   float *out) {
  const tl_geometry &g = p.weight->geometry;
  const int64_t group = segment / p.segments_per_group * kPanel, side = segment * p.rows;
  const int step = p.split ? 2 : 1;
  for (int j = 0; j < kPanel; j++) {
    const float scale = read_float(panel.scales, group + j, g.scale_dtype);
    const int32_t zero = g.zero == TL_ZERO_CODES ? panel.zeros[group + j] : 0;
    float offset = 0;
    if (g.zero == TL_ZERO_FLOATS) offset = -scale * read_float(panel.zeros, group + j, g.scale_dtype);
    if (g.zero == TL_ZERO_MINS) offset = read_float(panel.zeros, group + j, g.scale_dtype);
    for (int r = 0; r < rows; r += step) {
      int32_t sum = sums.of[r][j] + tile.start[side + r] - zero * tile.sum[side + r];
      if (p.split) sum = sum * 128 + sums.of[r + 1][j] + tile.start[side + r + 1] - zero * tile.sum[side + r + 1];
      float &y = out[r / step * kPanel + j];
      y += static_cast<float>(sum) * scale * tile.scale[side + r];
      y += offset * tile.moment[side + r];
    }
  }
}

void multiply_tile(const Plan &p, const Panel &panel, const Tile &tile, int rows, float *out) {
  const Layout &w = *p.weight;
  std::memset(out, 0, sizeof(float) * kPanel * static_cast<size_t>(p.split ? rows / 2 : rows));
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t from = s * p.segment, to = from + p.segment < w.kp ? from + p.segment : w.kp;
    Sums sums{};
    for (int64_t k = from; k < to; k += 8)
      add_eight(panel.codes + k / 8 * w.step_bytes, w.geometry.bits, tile.q + k * p.rows, rows, sums);
    scale_segment(p, panel, tile, s, rows, sums, out);
  }
}

}  // namespace

const Isa portable_isa = {"portable",   kRows,        1, 8, 384 << 10, read_row,
                          quantize_row, multiply_each<multiply_tile>, store_row, nullptr, nullptr, widen, false};

}  // namespace transload

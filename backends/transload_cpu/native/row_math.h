// Reading, quantizing and storing rows: plain loops that every compiler vectorizes, compiled once per instruction set.
// Everything is in an unnamed namespace for the reason given in floats.h.
#pragma once

#include <cmath>

#include "floats.h"
#include "isa.h"
#if defined(__AVX512BW__)
#include "segment_512.h"
#include "widen_512.h"
#else
#include "segment_plain.h"
#include "widen_plain.h"
#endif

namespace transload {
namespace {

void read_row(const void *x, int32_t dtype, int64_t k, int64_t kp, const int32_t *order, float *out) {
  const auto *floats = static_cast<const float *>(x);
  const auto *halves = static_cast<const uint16_t *>(x);
  if (order != nullptr) {
    for (int64_t i = 0; i < k; i++) out[i] = read_float(x, order[i], dtype);
  } else if (dtype == TL_FLOAT32) {
    std::memcpy(out, floats, static_cast<size_t>(k) * 4);
  } else if (dtype == TL_BFLOAT16) {
    for (int64_t i = 0; i < k; i++) out[i] = from_bfloat16(halves[i]);
  } else {
    for (int64_t i = 0; i < k; i++) out[i] = from_float16(halves[i]);
  }
  for (int64_t i = k; i < kp; i++) out[i] = 0;
}

// Spreads the bytes of one row over a tile: [kp / chunk][rows][chunk].
inline void place_row(const Plan &p, const int8_t *bytes, int row, int8_t *q) {
  const int64_t chunks = p.weight->kp / p.chunk, stride = int64_t(p.rows) * p.chunk;
  int8_t *to = q + int64_t(row) * p.chunk;
  if (p.chunk == 8) {
    for (int64_t i = 0; i < chunks; i++) std::memcpy(to + i * stride, bytes + i * 8, 8);
  } else {
    for (int64_t i = 0; i < chunks; i++) std::memcpy(to + i * stride, bytes + i * 64, 64);
  }
}

void quantize_row(const Plan &p, const float *x, int row, int8_t *bytes, const Tile &tile) {
  const int64_t kp = p.weight->kp, per_group = p.act_group / p.segment;
  const tl_geometry &g = p.weight->geometry;
  const int32_t midpoint = g.zero == TL_ZERO_MIDPOINT ? g.midpoint : 0;
  const float limit = p.split ? 16256.f : 127.f;
  int8_t *lower = bytes + kp;
  std::memset(bytes, 0, static_cast<size_t>(p.split ? 2 * kp : kp));
  float step = 0;
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t from = s * p.segment, length = from + p.segment <= kp ? p.segment : kp - from;
    if (p.act_group >= kp ? s == 0 : s % per_group == 0) {
      const int64_t group = p.act_group < kp - from ? p.act_group : kp - from;
      step = largest(x + from, group) / limit;
      if (!(step <= 3.4e38f)) step = NAN;
    }
    const bool usable = step > 0;
    const int64_t at = s * p.rows + row;
    int32_t sums[2] = {0, 0};
    if (p.split) {
      if (usable) quantize_to_15(x + from, length, step, bytes + from, lower + from, sums);
      tile.scale[at + 1] = step;
      tile.sum[at + 1] = sums[1];
      tile.start[at + 1] = -midpoint * sums[1];
      tile.moment[at + 1] = 0;
    } else if (usable) {
      sums[0] = quantize_to_8(x + from, length, step, bytes + from);
    }
    tile.scale[at] = step;
    tile.sum[at] = sums[0];
    tile.start[at] = -midpoint * sums[0];
    tile.moment[at] = step * static_cast<float>(p.split ? 128 * sums[0] + sums[1] : sums[0]);
  }
  place_row(p, bytes, row, tile.q);
  if (p.split) place_row(p, lower, row + 1, tile.q);
}

inline __attribute__((always_inline)) void store_floats(const float *sums, int n, void *y, int64_t at, int32_t dtype) {
  if (dtype == TL_FLOAT32) {
    std::memcpy(static_cast<float *>(y) + at, sums, static_cast<size_t>(n) * 4);
    return;
  }
  auto *halves = static_cast<uint16_t *>(y) + at;
  for (int i = 0; i < n; i++) halves[i] = dtype == TL_BFLOAT16 ? to_bfloat16(sums[i]) : to_float16(sums[i]);
}

void store_row(const float *out, const float *bias, int n, void *y, int64_t at, int32_t dtype) {
  float sums[kPanel];
  if (bias != nullptr) {
    for (int i = 0; i < n; i++) sums[i] = out[i] + bias[i];
    out = sums;
  }
  if (n == kPanel)
    store_floats(out, kPanel, y, at, dtype);  // a constant length: a few vectors
  else
    store_floats(out, n, y, at, dtype);
}

// Tile after tile, for the instruction sets that need nothing in common between tiles.
template <void (*MULTIPLY_TILE)(const Plan &, const Panel &, const Tile &, int, float *)>
void multiply_each(const Plan &p, const Panel &panel, const TileRun &tiles, float *out) {
  for (int i = 0; i < tiles.count; i++) {
    MULTIPLY_TILE(p, panel, tile_after(p, tiles.first, i), tiles.rows[i], out);
    out += kPanel * (p.split ? tiles.rows[i] / 2 : tiles.rows[i]);
  }
}

}  // namespace
}  // namespace transload

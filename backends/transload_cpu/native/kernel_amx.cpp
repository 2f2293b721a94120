// AMX-INT8: a tile instruction multiplies 16 rows x 64 inputs with 64 inputs x 16 outputs.
//
// K is walked in passes of up to 512 inputs. A pass unpacks its 32 outputs into int8 tiles (16 KB, which stay in the L1
// cache), and every tile of the band then streams its activations past them. A block of sums is 32 rows x 32 outputs in
// tiles 0..3; tiles 4 and 5 hold activations, 6 and 7 weights. Scaling the sums of one segment is vector work that is
// spread between the tile instructions of the next.
#include "amx_tiles.h"
#include "side_512.h"

namespace transload {
namespace {

constexpr int kTileRows = 32;           // rows of activations in a block
constexpr int kFewestRows = 8;          // below, AVX512 is faster: most of a tile would be empty
constexpr int64_t kPassInputs = 512;
constexpr int kBlock = 16 * 16;         // sums of one tile

int step_inputs(const Plan &p) { return p.segment % 64 == 0 ? 64 : 32; }

// Codes minus zeros that fit int8 need no correction afterwards; the others are multiplied as unsigned codes.
bool zero_removed(const tl_geometry &g) { return whole_zeros(g) && (g.bits == 4 || g.zero == TL_ZERO_MIDPOINT); }

void enter(const Plan &p) {
  TileConfig c;
  const int inputs = step_inputs(p);
  for (int t = 0; t < 8; t++) c.rows[t] = 16, c.row_bytes[t] = 64;
  for (int t = 4; t < 6; t++) c.row_bytes[t] = static_cast<uint16_t>(inputs);
  for (int t = 6; t < 8; t++) c.rows[t] = static_cast<uint8_t>(inputs / 4);
  tile_configure(c);
}

// Zero points of 16 outputs, each repeated over the 4 bytes of its dword.
__m512i zero_bytes(const tl_geometry &g, const Panel &panel, int64_t at) {
  if (!zero_removed(g)) return _mm512_setzero_si512();
  if (g.zero == TL_ZERO_MIDPOINT) return _mm512_set1_epi8(static_cast<char>(g.midpoint));
  return _mm512_mullo_epi32(load_zeros(panel.zeros + at), _mm512_set1_epi32(0x01010101));
}

// One segment of a panel as tiles: [inputs / step][2 halves][step / 4 rows][64 bytes].
void unpack_segment(const Plan &p, const Panel &panel, int64_t segment, int8_t *to) {
  const Layout &w = *p.weight;
  const __m512i nibble = _mm512_set1_epi8(15);
  const int64_t group = segment / p.segments_per_group * kPanel, from = segment * p.segment;
  const int64_t step = step_inputs(p), half_bytes = step * 16;
  for (int h = 0; h < 2; h++) {
    const __m512i zero = zero_bytes(w.geometry, panel, group + h * kHalf);
    for (int64_t i = 0; i < p.segment; i += 8) {
      int8_t *rows = to + i / step * 2 * half_bytes + h * half_bytes + i % step * 16;
      __m512i a = _mm512_setzero_si512(), b = a;
      if (from + i < w.kp) {
        const uint8_t *codes = panel.codes + (from + i) / 8 * w.step_bytes + h * 64;
        a = _mm512_loadu_si512(codes);
        b = w.geometry.bits == 8 ? _mm512_loadu_si512(codes + 128) : _mm512_and_si512(_mm512_srli_epi16(a, 4), nibble);
        if (w.geometry.bits == 4) a = _mm512_and_si512(a, nibble);
      }
      _mm512_store_si512(rows, _mm512_sub_epi8(a, zero));
      _mm512_store_si512(rows + 64, _mm512_sub_epi8(b, zero));
    }
  }
}

// Sums of one segment, waiting to be scaled.
struct Sums {
  alignas(64) int32_t of[4][kBlock];
  Side side[2];
  const float *scale, *moment;
  const int32_t *row_sum;
};

// Scales tokens [first, last) of a block and adds them to out [tokens][32].
void scale_tokens(const Plan &p, const Sums &s, int first, int last, float *out) {
  const tl_geometry &g = p.weight->geometry;
  const bool correct = whole_zeros(g) && !zero_removed(g);
  for (int m = first; m < last; m++) {
    const int r = p.split ? 2 * m : m;
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const Side &w = s.side[h];
      auto total = [&](int row) {
        const __m512i sum = _mm512_load_si512(s.of[row / 16 * 2 + h] + row % 16 * 16);
        return correct ? _mm512_dpwssd_epi32(sum, w.minus_zero, _mm512_set1_epi32(s.row_sum[row])) : sum;
      };
      __m512i sum = total(r);
      if (p.split) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 7), total(r + 1));
      __m512 y = _mm512_loadu_ps(out + m * kPanel + h * kHalf);
      y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(w.scale, _mm512_set1_ps(s.scale[r])), y);
      if (!whole_zeros(g)) y = _mm512_fmadd_ps(w.offset, _mm512_set1_ps(s.moment[r]), y);
      _mm512_storeu_ps(out + m * kPanel + h * kHalf, y);
    }
  }
}

template <bool SIGNED>
inline void dot_block(const int8_t *q, const int8_t *codes, int64_t half_bytes, bool tall) {
  TILE_LOAD(4, q, 64);
  TILE_LOAD(6, codes, 64);
  TILE_LOAD(7, codes + half_bytes, 64);
  if (SIGNED) {
    TILE_DOT_SS(0, 4, 6);
    TILE_DOT_SS(1, 4, 7);
  } else {
    TILE_DOT_SU(0, 4, 6);
    TILE_DOT_SU(1, 4, 7);
  }
  if (!tall) return;
  TILE_LOAD(5, q + 16 * 64, 64);
  if (SIGNED) {
    TILE_DOT_SS(2, 5, 6);
    TILE_DOT_SS(3, 5, 7);
  } else {
    TILE_DOT_SU(2, 5, 6);
    TILE_DOT_SU(3, 5, 7);
  }
}

void store_block(Sums &sums, bool tall) {
  TILE_STORE(0, sums.of[0], 64);
  TILE_STORE(1, sums.of[1], 64);
  if (tall) {
    TILE_STORE(2, sums.of[2], 64);
    TILE_STORE(3, sums.of[3], 64);
  }
  TILE_FENCE();
}

// One tile of activations times segments [first, last) of a panel, whose codes lie unpacked in `codes`.
template <bool SIGNED>
void multiply_tile(const Plan &p, const Panel &panel, const Tile &tile, int rows, int64_t first, int64_t last,
                   const int8_t *codes, float *out) {
  static thread_local Sums sums[2];
  const bool tall = rows > 16;
  const int tokens = p.split ? rows / 2 : rows;
  const int64_t step = step_inputs(p), steps = p.segment / step, half_bytes = step * 16;
  for (int64_t s = first; s <= last; s++) {
    const Sums &previous = sums[(s + 1) & 1];
    if (s == last) {
      scale_tokens(p, previous, 0, tokens, out);
      break;
    }
    Sums &now = sums[s & 1];
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t i = 0; i < steps; i++) {
      const int64_t k = s * p.segment + i * step;
      if (k < p.weight->kp)
        dot_block<SIGNED>(tile.q + k / 64 * 64 * p.rows + k % 64, codes + ((s - first) * steps + i) * 2 * half_bytes,
                          half_bytes, tall);
      const auto part = [&](int64_t at) { return static_cast<int>(tokens * at / steps); };
      if (s > first) scale_tokens(p, previous, part(i), part(i + 1), out);
    }
    store_block(now, tall);
    const int64_t side = s * p.rows, group = s / p.segments_per_group * kPanel;
    now.side[0] = load_side(p.weight->geometry, panel, group);
    now.side[1] = load_side(p.weight->geometry, panel, group + kHalf);
    now.scale = tile.scale + side, now.moment = tile.moment + side, now.row_sum = tile.sum + side;
  }
}

void multiply(const Plan &p, const Panel &panel, const TileRun &tiles, float *out) {
  alignas(64) int8_t codes[kPassInputs * kPanel];
  const bool removed = zero_removed(p.weight->geometry);
  int64_t tokens = 0;
  for (int i = 0; i < tiles.count; i++) tokens += p.split ? tiles.rows[i] / 2 : tiles.rows[i];
  std::memset(out, 0, static_cast<size_t>(tokens) * kPanel * sizeof(float));
  const int64_t per_pass = kPassInputs / p.segment;
  for (int64_t first = 0; first < p.segments; first += per_pass) {
    const int64_t last = first + per_pass < p.segments ? first + per_pass : p.segments;
    for (int64_t s = first; s < last; s++) unpack_segment(p, panel, s, codes + (s - first) * p.segment * kPanel);
    TILE_FENCE();
    float *to = out;
    for (int i = 0; i < tiles.count; i++) {
      const Tile tile = tile_after(p, tiles.first, i);
      const auto multiply_one = removed ? multiply_tile<true> : multiply_tile<false>;
      multiply_one(p, panel, tile, tiles.rows[i], first, last, codes, to);
      to += kPanel * (p.split ? tiles.rows[i] / 2 : tiles.rows[i]);
    }
  }
}

}  // namespace

bool amx_suits(const Plan &p, int64_t rows) {
  return rows >= kFewestRows && (p.segment % 64 == 0 || p.segment == 32);
}

const Isa amx_isa = {"amx-int8",   kTileRows, 16,        64,    1 << 20,     read_row,
                     quantize_row, multiply,  store_row, enter, tile_release, widen, false};

}  // namespace transload

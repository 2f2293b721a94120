// Packed weights as floats: the entry point, and the loop for every processor.
#include "dequantize.h"

#include <algorithm>
#include <new>
#include <vector>

#include "floats.h"
#include "isa.h"
#include "narrow.h"
#include "parallel.h"

namespace transload {
namespace {

// Scale and zero point, or offset, of one output in one group.
struct Side {
  float scale, zero, offset;

  float weight(uint32_t code) const { return (static_cast<float>(code) - zero) * scale + offset; }
};

// The offset is -0 where there is none: adding it changes no float, not even the sign of a zero.
Side read_side(const tl_geometry &g, const Panel &panel, int64_t at) {
  Side s{read_float(panel.scales, at, g.scale_dtype), 0, -0.f};
  if (g.zero == TL_ZERO_MIDPOINT) s.zero = static_cast<float>(g.midpoint);
  if (g.zero == TL_ZERO_CODES) s.zero = panel.zeros[at];
  if (g.zero == TL_ZERO_FLOATS) s.zero = read_float(panel.zeros, at, g.scale_dtype);
  if (g.zero == TL_ZERO_MINS) s.offset = read_float(panel.zeros, at, g.scale_dtype);
  return s;
}

template <class T>
T rounded(float value, int32_t dtype) {
  if constexpr (sizeof(T) == 4) return as_bits(value);
  else return dtype == TL_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

// Inputs first .. last - 1 of output j, all of one group. Four-bit codes have 16 values: each is computed once.
template <class T>
void fill_group(const Layout &l, const Panel &panel, int j, const Side &side, int64_t first, int64_t last,
                int32_t dtype, T *row) {
  const uint8_t *codes = panel.codes + j / kHalf * 64 + j % kHalf * 4;
  if (l.geometry.bits == 8) {
    for (int64_t k = first; k < last; k++)
      row[k] = rounded<T>(side.weight(codes[k / 8 * l.step_bytes + k % 8 / 4 * 128 + k % 4]), dtype);
    return;
  }
  T table[16];
  for (uint32_t code = 0; code < 16; code++) table[code] = rounded<T>(side.weight(code), dtype);
  for (int64_t k = first; k < last; k++)
    row[k] = table[codes[k / 8 * l.step_bytes + k % 4] >> (k % 8 / 4 * 4) & 15];
}

template <class T>
void fill_rows(const Layout &l, const Panel &panel, int first, int count, int32_t dtype, uint8_t *out,
               int64_t row_bytes) {
  const int64_t k = l.geometry.k, group = l.groups == 1 ? k : l.geometry.group_size;
  for (int j = first; j < first + count; j++, out += row_bytes)
    for (int64_t i = 0; i < l.groups; i++) {
      const Side side = read_side(l.geometry, panel, i * kPanel + j);
      fill_group(l, panel, j, side, i * group, std::min(k, (i + 1) * group), dtype, reinterpret_cast<T *>(out));
    }
}

// What this processor does fastest.
struct Best {
  DequantizePanel dequantize = dequantize_plain;
  const Isa *isa = &portable_isa;

  Best() {
#if defined(__x86_64__)
    if (tl_supported() >> TL_AVX512_VNNI & 1) dequantize = dequantize_avx512, isa = &avx512_vnni_isa;
#endif
  }
};

// One row with its inputs back in their original order.
template <class T>
void scatter(const uint8_t *row, const uint8_t *order, int64_t k, uint8_t *out) {
  for (int64_t i = 0; i < k; i++) {
    int32_t input;
    std::memcpy(&input, order + i * 4, 4);
    std::memcpy(out + input * int64_t(sizeof(T)), row + i * int64_t(sizeof(T)), sizeof(T));
  }
}

struct Slab {
  const Layout *layout, *shape;  // of the packed weight; the same with codes that dequantize reads
  const uint8_t *packed;
  int64_t first, last;  // of the outputs of all experts
  int32_t dtype;
  uint8_t *out;
  Best best;

  // Bytes that one worker needs: a widened panel, and the row in hand where inputs are to be put in order.
  int64_t room() const { return wide_bytes() + (shape->geometry.act_order ? shape->geometry.k * 4 : 0); }
  int64_t wide_bytes() const { return is_narrow(layout->geometry) ? shape->panel_codes : 0; }

  // The part of a panel that the slab asks for.
  void fill(int64_t index, uint8_t *memory) const {
    const Layout &l = *shape;
    const int64_t start = index / l.panels * l.geometry.n + index % l.panels * kPanel;
    const int64_t from = std::max(first, start), bytes = l.geometry.k * dtype_bytes(dtype);
    const int64_t to = std::min(last, std::min(start + kPanel, (index / l.panels + 1) * l.geometry.n));
    Panel panel = panel_at(*layout, packed, index / l.panels, index % l.panels);
    if (is_narrow(layout->geometry)) {
      best.isa->widen(layout->geometry.bits, panel.codes, l.kp / 8, memory);
      panel.codes = memory;
    }
    uint8_t *at = out + (from - first) * bytes;
    const auto lead = static_cast<int>(from - start), count = static_cast<int>(to - from);
    if (!l.geometry.act_order) return best.dequantize(l, panel, lead, count, dtype, at, bytes);
    uint8_t *row = memory + wide_bytes();
    for (int j = 0; j < count; j++, at += bytes) {
      best.dequantize(l, panel, lead + j, 1, dtype, row, bytes);
      (dtype == TL_FLOAT32 ? scatter<uint32_t> : scatter<uint16_t>)(row, packed + l.order_at, l.geometry.k, at);
    }
  }
};

}  // namespace

void dequantize_plain(const Layout &l, const Panel &panel, int first, int count, int32_t dtype, uint8_t *out,
                      int64_t row_bytes) {
  (dtype == TL_FLOAT32 ? fill_rows<uint32_t> : fill_rows<uint16_t>)(l, panel, first, count, dtype, out, row_bytes);
}

}  // namespace transload

using namespace transload;

extern "C" int32_t tl_dequantize(const void *packed, int64_t packed_bytes, int64_t first, int64_t count, int32_t dtype,
                                 void *out, int32_t threads) {
  Layout l;
  const tl_status status = read_header(packed, packed_bytes, &l);
  if (status != TL_OK) return status;
  const int64_t n = l.geometry.n, outputs = l.geometry.experts * n, last = first + count;
  if (threads < 1 || dtype < TL_FLOAT32 || dtype > TL_FLOAT16 || first < 0 || count < 0 || first > outputs - count)
    return TL_BAD_ARGUMENT;
  if (count == 0) return TL_OK;
  if (!out) return TL_BAD_ARGUMENT;
  const auto panel_of = [&](int64_t output) { return output / n * l.panels + output % n / kPanel; };
  const Layout shape = is_narrow(l.geometry) ? widened(l) : l;
  const Slab slab{&l, &shape, static_cast<const uint8_t *>(packed), first, last, dtype, static_cast<uint8_t *>(out), {}};
  const int64_t from = panel_of(first), panels = panel_of(last - 1) + 1 - from, room = slab.room();
  try {
    std::vector<uint8_t> rooms(static_cast<size_t>(room * threads));
    parallel(threads, panels, [&](int64_t i, int worker) { slab.fill(from + i, rooms.data() + worker * room); });
  } catch (const std::bad_alloc &) {
    return TL_OUT_OF_MEMORY;
  }
  return TL_OK;
}

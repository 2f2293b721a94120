#include "layout.h"

#include <cstring>

namespace transload {
namespace {

constexpr char kMagic[8] = {'T', 'L', 'P', 'A', 'C', 'K', 'E', 'D'};
constexpr int64_t kHeaderBytes = 128;

struct Header {
  char magic[8];
  int32_t version;
  int32_t reserved;
  tl_geometry geometry;
  int64_t total;
};
static_assert(sizeof(Header) <= kHeaderBytes, "the header has a fixed size");

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// a * b, or -1 when that does not fit or one of them is already -1.
int64_t times(int64_t a, int64_t b) {
  int64_t out;
  return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &out) ? -1 : out;
}

bool valid(const tl_geometry &g) {
  constexpr int64_t kLargest = int64_t(1) << 40;
  const bool sizes = g.n > 0 && g.k > 0 && g.experts > 0 && g.n < kLargest && g.k < kLargest;
  const bool group = g.group_size == -1 || (g.group_size > 0 && g.group_size % 8 == 0 && g.group_size < kLargest) ||
                     g.group_size >= g.k;
  const bool zero = g.zero >= TL_ZERO_MIDPOINT && g.zero <= TL_ZERO_MINS && g.midpoint >= 0 && g.midpoint <= 255;
  const bool scales = g.scale_dtype >= TL_FLOAT32 && g.scale_dtype <= TL_FLOAT16;
  const bool bits = g.bits == 4 || g.bits == 5 || g.bits == 6 || g.bits == 8;
  return sizes && group && zero && scales && bits && (g.act_order == 0 || g.act_order == 1);
}

}  // namespace

bool layout_of(const tl_geometry &g, Layout *out) {
  if (!valid(g)) return false;
  Layout l{};
  l.geometry = g;
  l.kp = round_up(g.k, kPadInputs);
  l.groups = g.group_size == -1 ? 1 : (g.k - 1) / g.group_size + 1;
  l.panels = (g.n + kPanel - 1) / kPanel;
  l.step_bytes = int64_t(kPanel) * g.bits;
  l.panel_codes = l.kp / 8 * l.step_bytes;
  l.scale_bytes = dtype_bytes(g.scale_dtype);
  l.zero_bytes = g.zero == TL_ZERO_MIDPOINT ? 0 : g.zero == TL_ZERO_CODES ? 1 : l.scale_bytes;
  const int64_t all_panels = times(g.experts, l.panels);
  const int64_t entries = times(times(all_panels, l.groups), kPanel);
  const int64_t codes = times(all_panels, l.panel_codes);
  if (codes < 0 || times(entries, 8) < 0 || codes > (int64_t(1) << 60) || entries > (int64_t(1) << 57)) return false;
  l.codes_at = kHeaderBytes;
  l.scales_at = l.codes_at + codes;
  l.zeros_at = l.scales_at + round_up(entries * l.scale_bytes, 64);
  l.order_at = l.zeros_at + round_up(entries * l.zero_bytes, 64);
  l.total = l.order_at + (g.act_order ? round_up(g.k * 4, 64) : 0);
  *out = l;
  return true;
}

Layout widened(const Layout &layout) {
  Layout wide = layout;
  wide.geometry.bits = 8;
  wide.step_bytes = int64_t(kPanel) * 8;
  wide.panel_codes = wide.kp / 8 * wide.step_bytes;
  return wide;
}

void write_header(const Layout &l, void *packed) {
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kLayoutVersion;
  h.geometry = l.geometry;
  h.total = l.total;
  std::memset(packed, 0, kHeaderBytes);
  std::memcpy(packed, &h, sizeof h);
}

tl_status read_header(const void *packed, int64_t bytes, Layout *out) {
  if (bytes < kHeaderBytes) return TL_BAD_PACKED;
  if (packed == nullptr) return TL_BAD_ARGUMENT;
  Header h;
  std::memcpy(&h, packed, sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0 || h.version != kLayoutVersion) return TL_BAD_PACKED;
  if (!layout_of(h.geometry, out) || out->total != h.total || bytes < h.total) return TL_BAD_PACKED;
  return TL_OK;
}

Panel panel_at(const Layout &l, const void *packed, int64_t expert, int64_t panel) {
  const auto *base = static_cast<const uint8_t *>(packed);
  const int64_t index = expert * l.panels + panel;
  const int64_t entry = index * l.groups * kPanel;
  return {base + l.codes_at + index * l.panel_codes, base + l.scales_at + entry * l.scale_bytes,
          l.zero_bytes ? base + l.zeros_at + entry * l.zero_bytes : nullptr};
}

}  // namespace transload

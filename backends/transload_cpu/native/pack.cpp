// Packing and its exact inverse. The layout is drawn in layout.h.
#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "isa.h"
#include "narrow.h"
#include "parallel.h"

namespace transload {
namespace {

// A packed weight with mutable sections.
struct Sections {
  uint8_t *codes, *scales, *zeros;
};

Sections sections_at(const Layout &l, void *packed, int64_t expert, int64_t panel) {
  const Panel p = panel_at(l, packed, expert, panel);
  return {const_cast<uint8_t *>(p.codes), const_cast<uint8_t *>(p.scales), const_cast<uint8_t *>(p.zeros)};
}

// Eight codes of one output, as the dwords of the packed rows.
struct Eight {
  uint32_t low, high;  // bits = 8: inputs 0..3 and 4..7; otherwise low holds four bits of all eight
  Upper upper;         // bits = 5 and 6
};

constexpr uint32_t kNibbles = 0x0f0f0f0fu;

Eight read_eight(const uint8_t *codes, int64_t left, int bits) {
  uint32_t pair[2] = {0, 0};
  std::memcpy(pair, codes, static_cast<size_t>(std::min<int64_t>(left, 8)));
  if (bits == 8) return {pair[0], pair[1], {}};
  const uint32_t low = (pair[0] & kNibbles) | (pair[1] & kNibbles) << 4;
  return {low, 0, {pair[0] >> 4 & kNibbles, pair[1] >> 4 & kNibbles}};
}

void write_eight(Eight e, uint8_t *codes, int64_t left, int bits) {
  uint32_t pair[2] = {e.low, e.high};
  if (bits != 8) {
    pair[0] = (e.low & kNibbles) | e.upper.first << 4;
    pair[1] = (e.low >> 4 & kNibbles) | e.upper.second << 4;
  }
  std::memcpy(codes, pair, static_cast<size_t>(std::min<int64_t>(left, 8)));
}

// Where the dwords of output j of a panel lie inside the bytes for 8 inputs.
int64_t low_at(int j) { return (j / kHalf) * 64 + (j % kHalf) * 4; }
int64_t high_at(int j) { return 128 + low_at(j); }

void pack_codes(const Layout &l, const uint8_t *rows, int outputs, uint8_t *to) {
  const int64_t k = l.geometry.k;
  const bool narrow = is_narrow(l.geometry);
  if (outputs < kPanel || k < l.kp || narrow) std::memset(to, 0, static_cast<size_t>(l.panel_codes));
  for (int64_t at = 0; at < k; at += 8, to += l.step_bytes)
    for (int j = 0; j < outputs; j++) {
      const Eight e = read_eight(rows + j * k + at, k - at, l.geometry.bits);
      std::memcpy(to + low_at(j), &e.low, 4);
      if (l.geometry.bits == 8) std::memcpy(to + high_at(j), &e.high, 4);
      if (narrow) write_upper(e.upper, l.geometry.bits, to, j);
    }
}

// Outputs first .. first + count - 1 of a panel.
void unpack_codes(const Layout &l, const uint8_t *from, int first, int count, uint8_t *rows) {
  const int64_t k = l.geometry.k;
  for (int64_t at = 0; at < k; at += 8, from += l.step_bytes)
    for (int i = 0; i < count; i++) {
      Eight e{};
      std::memcpy(&e.low, from + low_at(first + i), 4);
      if (l.geometry.bits == 8) std::memcpy(&e.high, from + high_at(first + i), 4);
      if (l.geometry.bits == 5) e.upper = read_upper<5>(from, first + i);
      if (l.geometry.bits == 6) e.upper = read_upper<6>(from, first + i);
      write_eight(e, rows + i * k + at, k - at, l.geometry.bits);
    }
}

// Scales or zeros, items of `size` bytes: [outputs][groups] -> [groups][32], missing outputs zero.
void side_in(const uint8_t *rows, int64_t groups, int outputs, int64_t size, uint8_t *to) {
  std::memset(to, 0, static_cast<size_t>(groups * kPanel * size));
  for (int64_t g = 0; g < groups; g++)
    for (int j = 0; j < outputs; j++)
      std::memcpy(to + (g * kPanel + j) * size, rows + (j * groups + g) * size, static_cast<size_t>(size));
}

// The way back, for outputs first .. first + count - 1 of a panel.
void side_out(const uint8_t *from, int64_t groups, int first, int count, int64_t size, uint8_t *rows) {
  for (int64_t g = 0; g < groups; g++)
    for (int i = 0; i < count; i++)
      std::memcpy(rows + (i * groups + g) * size, from + (g * kPanel + first + i) * size, static_cast<size_t>(size));
}

int outputs_of(const Layout &l, int64_t panel) {
  return static_cast<int>(std::min<int64_t>(kPanel, l.geometry.n - panel * kPanel));
}

// Asks for 2 MB pages before the first touch: reading a weight end to end then misses the TLB 512 times less often.
void prefer_huge_pages(void *memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2u << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t to = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (from < to) madvise(reinterpret_cast<void *>(from), to - from, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

const int32_t *order_of(const Layout &l, const void *packed) {
  return l.geometry.act_order ? reinterpret_cast<const int32_t *>(static_cast<const uint8_t *>(packed) + l.order_at)
                              : nullptr;
}

}  // namespace
}  // namespace transload

using namespace transload;

extern "C" int32_t tl_packed_bytes(const tl_geometry *geometry, int64_t *bytes) {
  Layout l;
  if (geometry == nullptr || bytes == nullptr) return TL_BAD_ARGUMENT;
  if (!layout_of(*geometry, &l)) return TL_BAD_GEOMETRY;
  *bytes = l.total;
  return TL_OK;
}

extern "C" int32_t tl_pack(const tl_geometry *geometry, const uint8_t *codes, const void *scales, const void *zeros,
                           const int32_t *order, void *packed, int64_t packed_bytes, int32_t threads) {
  Layout l;
  if (!geometry || !codes || !scales || !packed) return TL_BAD_ARGUMENT;
  if (!layout_of(*geometry, &l)) return TL_BAD_GEOMETRY;
  if (packed_bytes < l.total || threads < 1) return TL_BAD_ARGUMENT;
  if ((l.zero_bytes != 0) != (zeros != nullptr) || (l.geometry.act_order != 0) != (order != nullptr))
    return TL_BAD_ARGUMENT;
  const int64_t n = l.geometry.n, k = l.geometry.k, all = l.geometry.experts * l.panels;
  prefer_huge_pages(packed, packed_bytes);
  parallel(threads, all, [&](int64_t index, int) {
    const int64_t expert = index / l.panels, panel = index % l.panels, row = expert * n + panel * kPanel;
    const int outputs = outputs_of(l, panel);
    const Sections to = sections_at(l, packed, expert, panel);
    pack_codes(l, codes + row * k, outputs, to.codes);
    side_in(static_cast<const uint8_t *>(scales) + row * l.groups * l.scale_bytes, l.groups, outputs, l.scale_bytes,
            to.scales);
    if (zeros)
      side_in(static_cast<const uint8_t *>(zeros) + row * l.groups * l.zero_bytes, l.groups, outputs, l.zero_bytes,
              to.zeros);
  });
  if (order) std::memcpy(static_cast<uint8_t *>(packed) + l.order_at, order, static_cast<size_t>(k) * 4);
  write_header(l, packed);
  return TL_OK;
}

extern "C" int32_t tl_describe(const void *packed, int64_t packed_bytes, tl_geometry *geometry) {
  Layout l;
  if (geometry == nullptr) return TL_BAD_ARGUMENT;
  const tl_status status = read_header(packed, packed_bytes, &l);
  if (status == TL_OK) *geometry = l.geometry;
  return status;
}

extern "C" int32_t tl_unpack(const void *packed, int64_t packed_bytes, uint8_t *codes, void *scales, void *zeros,
                             int32_t *order, int32_t threads) {
  Layout l;
  const tl_status status = read_header(packed, packed_bytes, &l);
  if (status != TL_OK) return status;
  if (!codes || !scales || threads < 1 || (l.zero_bytes && !zeros) || (l.geometry.act_order && !order))
    return TL_BAD_ARGUMENT;
  const int64_t n = l.geometry.n, k = l.geometry.k, all = l.geometry.experts * l.panels;
  parallel(threads, all, [&](int64_t index, int) {
    const int64_t expert = index / l.panels, panel = index % l.panels, row = expert * n + panel * kPanel;
    const int outputs = outputs_of(l, panel);
    const Panel from = panel_at(l, packed, expert, panel);
    unpack_codes(l, from.codes, 0, outputs, codes + row * k);
    side_out(from.scales, l.groups, 0, outputs, l.scale_bytes,
             static_cast<uint8_t *>(scales) + row * l.groups * l.scale_bytes);
    if (from.zeros)
      side_out(from.zeros, l.groups, 0, outputs, l.zero_bytes,
               static_cast<uint8_t *>(zeros) + row * l.groups * l.zero_bytes);
  });
  if (l.geometry.act_order) std::memcpy(order, order_of(l, packed), static_cast<size_t>(k) * 4);
  return TL_OK;
}

extern "C" int32_t tl_rows(const void *packed, int64_t packed_bytes, const int64_t *index, int64_t count,
                           uint8_t *codes, void *scales, void *zeros, int32_t *order) {
  Layout l;
  const tl_status status = read_header(packed, packed_bytes, &l);
  if (status != TL_OK) return status;
  if (count < 0 || (count && (!index || !codes || !scales || (l.zero_bytes && !zeros))) || l.geometry.experts != 1 ||
      (l.geometry.act_order && !order))
    return TL_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; i++)
    if (index[i] < 0 || index[i] >= l.geometry.n) return TL_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; i++) {
    const int j = static_cast<int>(index[i] % kPanel);
    const Panel from = panel_at(l, packed, 0, index[i] / kPanel);
    unpack_codes(l, from.codes, j, 1, codes + i * l.geometry.k);
    side_out(from.scales, l.groups, j, 1, l.scale_bytes, static_cast<uint8_t *>(scales) + i * l.groups * l.scale_bytes);
    if (from.zeros)
      side_out(from.zeros, l.groups, j, 1, l.zero_bytes, static_cast<uint8_t *>(zeros) + i * l.groups * l.zero_bytes);
  }
  if (order) std::memcpy(order, order_of(l, packed), static_cast<size_t>(l.geometry.k) * 4);
  return TL_OK;
}

extern "C" int32_t tl_layout_version(void) { return kLayoutVersion; }

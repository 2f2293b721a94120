// Where everything lies inside a packed weight.
//
// A packed weight is a 128-byte header followed by sections, each starting at a multiple of 64 bytes:
//
//   codes   [experts][panels][kp / 8][128 or 256 bytes]
//   scales  [experts][panels][groups][32]   float32, bfloat16 or float16, as given
//   zeros   [experts][panels][groups][32]   uint8 or the scales' type; absent for midpoint
//   order   [k] int32                       absent without act-order
//
// A panel is 32 outputs. kp is k rounded up to 64. For every 8 inputs a panel holds, for bits = 4, two 64-byte rows,
// one per 16 outputs; dword j of a row belongs to output j and holds inputs 0..3 in the low nibbles of its bytes and
// inputs 4..7 in the high nibbles:
//
//   byte 4*j + i  =  code[j][i] | code[j][4 + i] << 4          i = 0..3, j = 0..15
//
// so that one AND or shift yields an operand of the dot-product instructions (16 outputs x 4 inputs). For bits = 8
// there are four rows: inputs 0..3 of outputs 0..15 and 16..31, then inputs 4..7 of both.
//
// For bits = 5 and 6 the two rows hold the lower four bits, and a plane of 32 or 64 bytes follows them. With 5 bits it is
// four masks of 64 bits, one per row of the layout for 8 bits, bit 4*j + i for byte 4*j + i of that row. With 6 bits
// byte 4*j + i holds two bits for each of the four rows, those of the first row lowest.
// Padding outputs and inputs have code, scale and zero 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "transload_native.h"

namespace transload {

constexpr int kPanel = 32;      // outputs of a panel
constexpr int kHalf = 16;       // outputs of one 64-byte row
constexpr int kPadInputs = 64;  // inputs are padded to a multiple of this
constexpr int32_t kLayoutVersion = 2;

struct Layout {
  tl_geometry geometry;
  int64_t kp, groups, panels;
  int64_t step_bytes;                     // bytes of one panel for 8 inputs
  int64_t panel_codes;                    // bytes of one panel's codes
  int64_t scale_bytes, zero_bytes;        // bytes of one scale, of one zero (0 without)
  int64_t codes_at, scales_at, zeros_at, order_at, total;  // offsets from the start
};

// False when the geometry is one that the library does not hold or whose size does not fit 64 bits.
bool layout_of(const tl_geometry &geometry, Layout *layout);

// The layout of the same weight with its codes widened to 8 bits.
Layout widened(const Layout &layout);

// Writes the header of a packed weight; the sections are the caller's.
void write_header(const Layout &layout, void *packed);

// Reads and checks a header; TL_OK, TL_BAD_PACKED or TL_BAD_ARGUMENT.
tl_status read_header(const void *packed, int64_t bytes, Layout *layout);

// One panel of one expert: what a kernel multiplies with.
struct Panel {
  const uint8_t *codes;  // [kp / 8][step_bytes]
  const uint8_t *scales; // [groups][32] of scale_dtype
  const uint8_t *zeros;  // [groups][32] or null
};

Panel panel_at(const Layout &layout, const void *packed, int64_t expert, int64_t panel);

inline int64_t dtype_bytes(int32_t dtype) { return dtype == TL_FLOAT32 ? 4 : 2; }

}  // namespace transload

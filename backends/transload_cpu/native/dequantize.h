// Packed weights as floats: what one instruction set contributes. Results are the neutral formula's bit for bit,
// computed in float32 step by step and rounded once to the type asked for:
//
//   w = (code - zero) * scale    or    w = code * scale + min
#pragma once

#include "layout.h"

namespace transload {

// Outputs first .. first + count - 1 of a panel, each a row of `row_bytes` bytes in `out`, inputs as they are packed.
using DequantizePanel = void (*)(const Layout &layout, const Panel &panel, int first, int count, int32_t dtype,
                                 uint8_t *out, int64_t row_bytes);

void dequantize_plain(const Layout &, const Panel &, int first, int count, int32_t dtype, uint8_t *out,
                      int64_t row_bytes);
#if defined(__x86_64__)
void dequantize_avx512(const Layout &, const Panel &, int first, int count, int32_t dtype, uint8_t *out,
                       int64_t row_bytes);
#endif

}  // namespace transload

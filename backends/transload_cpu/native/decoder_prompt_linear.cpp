// Linear layers for many rows: packed weights through the driver (product.h), weights left as floats a few outputs at a
// time, which stay in the cache while all rows pass.
#include <algorithm>

#include "decoder_prompt.h"
#include "product.h"

namespace transload {
namespace {

constexpr int64_t kFloatOutputs = 16;  // in one item

// Rows [first, first + count) with one matrix of floats.
void multiply_floats(const Stretch &p, const tl_linear &l, int64_t expert, const Rows &r, int64_t first, int64_t count,
                     float *y) {
  const auto *w = static_cast<const uint8_t *>(l.weight) + expert * l.n * l.k * dtype_bytes(l.float_dtype);
  const float *bias = l.bias == nullptr ? nullptr : l.bias + expert * l.n;
  parallel(p.call->threads, (l.n + kFloatOutputs - 1) / kFloatOutputs, [&](int64_t item, int) {
    const int64_t from = item * kFloatOutputs, to = std::min(l.n, from + kFloatOutputs);
    for (int64_t row = first; row < first + count; row++) {
      float *out = y + row * r.y_stride;
      p.decoder->math->float_rows(w, l.float_dtype, l.k, from, to, r.x + row * r.x_stride, out);
      for (int64_t i = from; bias != nullptr && i < to; i++) out[i] += bias[i];
    }
  });
}

}  // namespace

tl_status multiply(const Stretch &p, const Linear &linear, const Rows &r) {
  float *y = r.y;
  for (const auto &part : linear.parts) {
    const tl_linear &l = part->linear;
    if (part->isa != nullptr) {
      const tl_product product{l.weight, l.weight_bytes, r.x, r.x_stride, r.count, r.experts, l.bias, nullptr,
                               l.act_group, l.act_bits, TL_FLOAT32, p.decoder->shape.isa, p.call->threads};
      const tl_status status = multiply_rows(product, {y, r.y_stride, TL_FLOAT32});
      if (status != TL_OK) return status;
    } else if (r.experts == nullptr) {
      multiply_floats(p, l, 0, r, 0, r.count, y);
    } else {
      for (int64_t e = 0, first = 0; e < l.experts; first += r.experts[e++])
        multiply_floats(p, l, e, r, first, r.experts[e], y);
    }
    y += l.n;
  }
  return TL_OK;
}

}  // namespace transload

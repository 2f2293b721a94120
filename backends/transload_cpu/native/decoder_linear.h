// Linear layers for one token, several of them in one go.
#pragma once

#include <memory>
#include <vector>

#include "decoder_math.h"
#include "isa.h"

namespace transload {

// One weight of a linear layer whose outputs follow those of the part before it.
struct Part {
  tl_linear linear;
  Layout layout;
  Plan plan;       // points to layout
  const Isa *isa;  // null for float weights
};

// A linear layer of one or more parts, cut into items that threads share.
struct Linear {
  std::vector<std::unique_ptr<Part>> parts;
  int64_t n, k, items, item_panels, bytes;  // bytes: of one expert
};

// y [n] = W x + bias, x [k], of one expert where there are several.
struct Product {
  const Linear *linear;
  int64_t expert;
  const float *x;
  float *y;
};

// Prepares one linear layer of `count` parts with k inputs and n outputs in all, for as many experts. TL_OK or what is
// wrong.
tl_status prepare(const tl_linear *parts, int count, int64_t n, int64_t k, int64_t experts, int32_t isa, Linear *out);

// Scratch bytes that `multiply` needs for a product with this layer.
int64_t scratch_bytes(const Linear &linear);

// All products. Those of the same x quantize it once where they can. scratch: the bytes of all, aligned to 64.
void multiply(const DecoderMath &math, const Product *products, int count, uint8_t *scratch, int threads);

}  // namespace transload

// A decoder as it is prepared once: every weight with its layout and plan for one token.
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
  Plan plan;        // points to layout
  const Isa *isa;   // null for float weights
  bool same_codes;  // its activations are quantized as those of the part before
};

// A linear layer of one or more parts, cut into items that threads share.
struct Linear {
  std::vector<std::unique_ptr<Part>> parts;
  int64_t n, k, items, item_panels, bytes;
};

struct DecoderLayer {
  tl_decoder_layer given;
  Linear qkv, out, gate_up, down;
};

struct Decoder {
  tl_decoder_shape shape;
  const DecoderMath *math;
  std::vector<DecoderLayer> layers;
  int64_t quantized_bytes;  // scratch for the activations of any linear layer
};

constexpr int64_t kTokensPerPart = 256;  // of attention: what one item reads; results do not depend on threads

// Prepares one linear layer of `count` parts with k inputs and n outputs in all. TL_OK or what is wrong.
tl_status prepare(const tl_linear *parts, int count, int64_t n, int64_t k, int32_t isa, Linear *out);

// Scratch bytes that `multiply` needs for this layer.
int64_t scratch_bytes(const Linear &linear);

// y [n] = W x + bias. x [k]; scratch: scratch_bytes, aligned to 64.
void multiply(const DecoderMath &math, const Linear &linear, const float *x, uint8_t *scratch, int threads, float *y);

}  // namespace transload

// A decoder as it is prepared once: every weight with its layout and plan for one token.
#pragma once

#include <memory>
#include <vector>

#include "decoder_linear.h"

namespace transload {

// down(silu(gate(x)) * up(x)).
struct Gated {
  Linear gate_up, down;
  int64_t width;  // outputs of the gate
};

struct DecoderLayer {
  tl_decoder_layer given;
  Linear qkv, out;
  Gated mlp;
};

struct Decoder {
  tl_decoder_shape shape;
  const DecoderMath *math;
  std::vector<DecoderLayer> layers;
  int64_t width;          // of the widest MLP
  int64_t scratch_bytes;  // for the activations of any products that are computed together
};

}  // namespace transload

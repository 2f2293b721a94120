// A decoder as it is prepared once: every weight with its layout and plan for one token.
#pragma once

#include <memory>
#include <vector>

#include "decoder_linear.h"

namespace transload {

// down(silu(gate(x)) * up(x)).
struct Gated {
  Linear gate_up, down;
  int64_t width = 0;  // outputs of the gate
};

// Experts and what chooses among them; width is 0 without.
struct Experts {
  tl_experts given;
  Linear router, shared_gate;
  Gated each;
};

struct DecoderLayer {
  tl_decoder_layer given;
  Linear qkv, out;
  Gated mlp;  // width 0 where experts are all
  Experts experts;
};

struct Decoder {
  tl_decoder_shape shape;
  const DecoderMath *math;
  std::vector<DecoderLayer> layers;
  // The most that one layer takes: gated MLPs of a token, the sum of their widths, experts to choose from.
  int64_t branches, width, experts;
  int64_t scratch_bytes;  // for the activations of any products that are computed together
};

}  // namespace transload

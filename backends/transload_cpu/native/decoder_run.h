// One token on its way through a decoder.
#pragma once

#include "decoder.h"

namespace transload {

// An expert, and how often its result counts; or a group of experts and how good it is.
struct Choice {
  float weight;
  int64_t expert;
};

// The memory of one token.
struct Run {
  const Decoder *decoder;
  const tl_decoder_token *token;
  float *x, *normed, *qkv, *attended, *scores, *largest, *sum, *partial;
  float *gate_up, *gated, *results, *logits;  // of the layer's MLP and the experts that were chosen; of the router
  Choice *choices;                            // [experts + groups]
  Product *products;                          // [MLPs of a layer], at least 2
  uint8_t *scratch;
};

// The first top_k of `choices` [experts + groups] become the experts that these logits choose; the logits become
// scores. A score that is not a number counts as the largest.
void choose(const tl_experts &experts, float *logits, Choice *choices);

// normed = what the layer's MLP and its experts make of normed.
void run_mlp(const Run &r, const DecoderLayer &layer);

}  // namespace transload

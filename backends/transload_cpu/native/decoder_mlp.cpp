// The second half of a layer for one token: its MLP, the experts that its router chooses, or both. All of them read the
// same x, so their first products are one call, and so are their second ones.
#include <algorithm>
#include <cmath>

#include "decoder_run.h"

namespace transload {
namespace {

float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

// How often the MLP beside the experts counts; chooses the experts.
float route(const Run &r, const Experts &e) {
  const bool gated = e.given.shared_gate != 0;
  float gate = 0;
  r.products[0] = {&e.router, 0, r.normed, r.logits};
  r.products[1] = {&e.shared_gate, 0, r.normed, &gate};
  multiply(*r.decoder->math, r.products, gated ? 2 : 1, r.scratch, r.token->threads);
  choose(e.given, r.logits, r.choices);
  return gated ? sigmoid(gate) : 1.f;
}

}  // namespace

void run_mlp(const Run &r, const DecoderLayer &l) {
  const DecoderMath &math = *r.decoder->math;
  const int64_t hidden = r.decoder->shape.hidden;
  const bool mlp = l.mlp.width > 0;
  const float mlp_weight = l.experts.each.width > 0 ? route(r, l.experts) : 1.f;
  const int count = mlp + static_cast<int>(l.experts.each.width > 0 ? l.experts.given.top_k : 0);
  // Branch 0 is the MLP where there is one; then the experts.
  const auto of = [&](int i) -> const Gated & { return mlp && i == 0 ? l.mlp : l.experts.each; };
  const auto expert = [&](int i) { return mlp && i == 0 ? 0 : r.choices[i - mlp].expert; };

  float *wide = r.gate_up;
  for (int i = 0; i < count; wide += 2 * of(i).width, i++) r.products[i] = {&of(i).gate_up, expert(i), r.normed, wide};
  multiply(math, r.products, count, r.scratch, r.token->threads);

  float *gated = r.gated;
  wide = r.gate_up;
  for (int i = 0; i < count; i++) {
    const int64_t width = of(i).width;
    math.gate(wide, wide + width, width, gated);
    r.products[i] = {&of(i).down, expert(i), gated, r.results + i * hidden};
    wide += 2 * width;
    gated += width;
  }
  multiply(math, r.products, count, r.scratch, r.token->threads);

  std::fill_n(r.normed, hidden, 0.f);
  for (int i = 0; i < count; i++)
    math.add(r.results + i * hidden, mlp && i == 0 ? mlp_weight : r.choices[i - mlp].weight, hidden, r.normed);
}

}  // namespace transload

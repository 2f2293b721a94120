// The second half of a layer for many tokens. Rows of experts are sorted by expert, so that all experts are one
// product; each token then collects its own.
#include <algorithm>
#include <cmath>

#include "decoder_prompt.h"

namespace transload {
namespace {

// y [rows][hidden] = what one MLP, or the expert that each row belongs to, makes of x [rows][hidden]. y may be x.
tl_status run_gated(const Stretch &p, const Gated &gated, const float *x, int64_t rows, const int64_t *experts,
                    float *y) {
  const int64_t hidden = p.decoder->shape.hidden, width = gated.width;
  const tl_status status = multiply(p, gated.gate_up, {x, hidden, rows, p.gate_up, 2 * width, experts});
  if (status != TL_OK) return status;
  each_row(p.call->threads, rows, [&](int64_t row) {
    float *gate = p.gate_up + row * 2 * width;
    p.decoder->math->gate(gate, gate + width, width, gate);
  });
  return multiply(p, gated.down, {p.gate_up, 2 * width, rows, y, hidden, experts});
}

// Chooses every token's experts, and copies its row to theirs.
tl_status send_rows(const Stretch &p, const Experts &e, float *sorted) {
  const int64_t hidden = p.decoder->shape.hidden, experts = e.given.experts, top_k = e.given.top_k;
  tl_status status = multiply(p, e.router, {p.normed, hidden, p.count, p.logits, experts, nullptr});
  if (status == TL_OK && e.given.shared_gate != 0)
    status = multiply(p, e.shared_gate, {p.normed, hidden, p.count, p.gates, 1, nullptr});
  if (status != TL_OK) return status;
  each_row(p.call->threads, p.count, [&](int64_t t) {
    choose(e.given, p.logits + t * experts, p.choices + t * 2 * experts);
  });
  const auto expert_of = [&](int64_t t, int64_t i) { return p.choices[t * 2 * experts + i].expert; };
  std::fill_n(p.experts, 2 * experts, 0);
  int64_t *next = p.experts + experts;  // the next free row of each expert
  for (int64_t t = 0; t < p.count; t++)
    for (int64_t i = 0; i < top_k; i++) p.experts[expert_of(t, i)]++;
  for (int64_t i = 1; i < experts; i++) next[i] = next[i - 1] + p.experts[i - 1];
  for (int64_t t = 0; t < p.count; t++)
    for (int64_t i = 0; i < top_k; i++) p.rows[t * top_k + i] = next[expert_of(t, i)]++;
  each_row(p.call->threads, p.count, [&](int64_t t) {
    for (int64_t i = 0; i < top_k; i++)
      std::copy_n(p.normed + t * hidden, hidden, sorted + p.rows[t * top_k + i] * hidden);
  });
  return TL_OK;
}

}  // namespace

tl_status run_mlp(const Stretch &p, const DecoderLayer &l) {
  const Experts &e = l.experts;
  const DecoderMath &math = *p.decoder->math;
  const int64_t hidden = p.decoder->shape.hidden, top_k = e.given.top_k;
  const bool mlp = l.mlp.width > 0;
  if (e.each.width == 0) return run_gated(p, l.mlp, p.normed, p.count, nullptr, p.normed);

  float *sorted = p.results + (mlp ? p.count * hidden : 0);
  tl_status status = send_rows(p, e, sorted);
  if (status == TL_OK) status = run_gated(p, e.each, sorted, p.count * top_k, p.experts, sorted);
  if (status == TL_OK && mlp) status = run_gated(p, l.mlp, p.normed, p.count, nullptr, p.results);
  if (status != TL_OK) return status;
  each_row(p.call->threads, p.count, [&](int64_t t) {
    float *y = p.normed + t * hidden;
    std::fill_n(y, hidden, 0.f);
    const float often = e.given.shared_gate != 0 ? 1.f / (1.f + std::exp(-p.gates[t])) : 1.f;
    if (mlp) math.add(p.results + t * hidden, often, hidden, y);
    for (int64_t i = 0; i < top_k; i++)
      math.add(sorted + p.rows[t * top_k + i] * hidden, p.choices[t * 2 * e.given.experts + i].weight, hidden, y);
  });
  return TL_OK;
}

}  // namespace transload

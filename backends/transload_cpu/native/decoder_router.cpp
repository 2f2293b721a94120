// Which experts a token takes. A few hundred numbers: plain C++ on one thread.
#include <algorithm>
#include <cmath>
#include <limits>

#include "decoder_run.h"

namespace transload {
namespace {

bool above(const Choice &a, const Choice &b) {
  return (std::isnan(a.weight) && !std::isnan(b.weight)) || a.weight > b.weight;
}

// Brings the k largest to the front. The same calls of the standard library as in torch.topk, so that with the same
// library the same ones of several equal scores come out.
void select(Choice *all, int64_t n, int64_t k) {
  if (k * 64 <= n)
    std::partial_sort(all, all + k, all + n, above);
  else
    std::nth_element(all, all + k - 1, all + n, above);
}

// Logits [n] become scores.
void score(const tl_experts &e, float *logits) {
  const int64_t n = e.experts;
  if (e.sigmoid != 0) {
    for (int64_t i = 0; i < n; i++) logits[i] = 1.f / (1.f + std::exp(-logits[i]));
    return;
  }
  float top = logits[0], sum = 0;
  for (int64_t i = 1; i < n; i++) top = logits[i] > top || std::isnan(logits[i]) ? logits[i] : top;
  for (int64_t i = 0; i < n; i++) sum += logits[i] = std::exp(logits[i] - top);
  for (int64_t i = 0; i < n; i++) logits[i] /= sum;
}

// The sum of a group's two largest.
float two_largest(const Choice *group, int64_t n) {
  const Choice *first = group, *second = group + 1;
  if (above(*second, *first)) std::swap(first, second);
  for (const Choice *at = group + 2; at < group + n; at++) {
    if (above(*at, *first))
      second = first, first = at;
    else if (above(*at, *second))
      second = at;
  }
  return first->weight + second->weight;
}

// Experts of groups that are not among the best come last: minus infinity. groups: scratch [groups].
void drop_groups(const tl_experts &e, Choice *choices, Choice *groups) {
  const int64_t size = e.experts / e.groups;
  for (int64_t g = 0; g < e.groups; g++) groups[g] = {two_largest(choices + g * size, size), g};
  select(groups, e.groups, e.top_groups);
  for (const Choice *g = groups + e.top_groups; g < groups + e.groups; g++)
    for (int64_t i = 0; i < size; i++) choices[g->expert * size + i].weight = -std::numeric_limits<float>::infinity();
}

}  // namespace

void choose(const tl_experts &e, float *logits, Choice *choices) {
  score(e, logits);
  for (int64_t i = 0; i < e.experts; i++) choices[i] = {logits[i] + (e.bias ? e.bias[i] : 0.f), i};
  if (e.top_groups < e.groups) drop_groups(e, choices, choices + e.experts);
  select(choices, e.experts, e.top_k);
  float sum = 1e-20f;  // nothing, unless all scores are
  for (Choice *c = choices; c < choices + e.top_k; c++) sum += c->weight = logits[c->expert];
  if (!e.normalized) sum = 1.f;
  for (Choice *c = choices; c < choices + e.top_k; c++) c->weight = c->weight / sum * e.scaling;
}

}  // namespace transload

// Many tokens of one sequence through all layers of a decoder, a stretch of the prompt after another.
//
// Products are decoder_prompt_linear.cpp, MLPs and experts decoder_prompt_mlp.cpp; everything between them is shared
// among threads by tokens, attention by key heads and runs of tokens.
#include "decoder_prompt.h"

#include <algorithm>
#include <exception>

#include "scratch.h"

namespace transload {
namespace {

constexpr int64_t kMostTokens = 256;      // of a stretch: its activations stay in the cache
constexpr int64_t kAttentionRows = 768;   // of one item: tokens times the query heads of a key head

struct Widths {
  int64_t queries, qkv;
};

Widths widths_of(const tl_decoder_shape &s) { return {s.heads * s.head_dim, (s.heads + 2 * s.kv_heads) * s.head_dim}; }

// Floats for `count` tokens, each piece starting at a multiple of 64 bytes. memory may be null, only to add up.
int64_t cut(Stretch *p, float *memory) {
  const Decoder &d = *p->decoder;
  const tl_decoder_shape &s = d.shape;
  const Widths w = widths_of(s);
  int64_t used = 0;
  const auto piece = [&](int64_t floats) {
    float *at = memory == nullptr ? nullptr : memory + used;
    used += (floats + 15) / 16 * 16;
    return at;
  };
  const int64_t queries = s.heads / s.kv_heads;
  p->tokens_per_item = std::clamp<int64_t>(kAttentionRows / queries, 1, p->count);
  p->room = (d.math->prompt_floats(p->tokens_per_item * queries, s.head_dim) + 15) / 16 * 16;
  p->x = piece(p->count * s.hidden);
  p->normed = piece(p->count * s.hidden);
  p->qkv = piece(p->count * w.qkv);
  p->attended = piece(p->count * w.queries);
  p->gate_up = piece(p->count * 2 * d.width);
  p->rooms = piece(p->room * p->call->threads);
  if (d.experts == 0) return used;
  const auto count_of = [](int64_t count, size_t bytes) { return count * static_cast<int64_t>(bytes / sizeof(float)); };
  p->results = piece(p->count * d.branches * s.hidden);
  p->logits = piece(p->count * d.experts);
  p->gates = piece(p->count);
  p->choices = reinterpret_cast<Choice *>(piece(count_of(p->count * 2 * d.experts, sizeof(Choice))));
  p->rows = reinterpret_cast<int64_t *>(piece(count_of(p->count * d.branches, sizeof(int64_t))));
  p->experts = reinterpret_cast<int64_t *>(piece(count_of(2 * d.experts, sizeof(int64_t))));
  return used;
}

void *head_at(const Stretch &p, void *base, int64_t head, int64_t token) {
  const int64_t at = (head * p.call->capacity + token) * p.decoder->shape.head_dim;
  return static_cast<uint8_t *>(base) + at * dtype_bytes(p.call->cache_dtype);
}

// Queries and keys are normed and turned, queries scaled, in place; keys and values go to the cache.
void place_token(const Stretch &p, size_t layer, int64_t token) {
  const tl_decoder_shape &s = p.decoder->shape;
  const tl_decoder_layer &given = p.decoder->layers[layer].given;
  const DecoderMath &math = *p.decoder->math;
  const int64_t angles = (p.first + token) * (s.rotary / 2), place = p.call->length + p.first + token;
  float *all = p.qkv + token * widths_of(s).qkv;
  for (int64_t h = 0; h < s.heads + s.kv_heads; h++) {
    const bool query = h < s.heads;
    float *head = all + h * s.head_dim;
    if (const float *norm = query ? given.q_norm : given.k_norm) math.rms_norm(head, norm, s.head_dim, s.eps, head);
    if (s.rotary > 0) math.rotate(head, p.call->cos + angles, p.call->sin + angles, s.rotary, s.interleaved != 0);
    for (int64_t i = 0; query && i < s.head_dim; i++) head[i] *= s.scaling;
  }
  const float *key = all + s.heads * s.head_dim, *value = key + s.kv_heads * s.head_dim;
  for (int64_t h = 0; h < s.kv_heads; h++) {
    math.store(key + h * s.head_dim, s.head_dim, p.call->cache_dtype, head_at(p, p.call->keys[layer], h, place));
    math.store(value + h * s.head_dim, s.head_dim, p.call->cache_dtype, head_at(p, p.call->values[layer], h, place));
  }
}

void attend(const Stretch &p, size_t layer) {
  const tl_decoder_shape &s = p.decoder->shape;
  const Widths w = widths_of(s);
  const int64_t queries = s.heads / s.kv_heads, runs = (p.count + p.tokens_per_item - 1) / p.tokens_per_item;
  parallel(p.call->threads, s.kv_heads * runs, [&](int64_t item, int worker) {
    // The last tokens see most: they come first, so that no thread is left alone with them.
    const int64_t head = item % s.kv_heads, from = (runs - 1 - item / s.kv_heads) * p.tokens_per_item;
    const int64_t at = head * queries * s.head_dim;
    const PromptAttention a{p.qkv + from * w.qkv + at, p.attended + from * w.queries + at, w.qkv, w.queries,
                            head_at(p, p.call->keys[layer], head, 0), head_at(p, p.call->values[layer], head, 0),
                            s.head_dim, queries, std::min(p.tokens_per_item, p.count - from),
                            p.call->length + p.first + from, p.decoder->layers[layer].given.window,
                            p.call->cache_dtype};
    p.decoder->math->attend_many(a, p.rooms + worker * p.room);
  });
}

// x += after(normed), then normed = norm(x): what stands between two products. after may be null.
void add_and_norm(const Stretch &p, const float *after, const float *norm) {
  const tl_decoder_shape &s = p.decoder->shape;
  const DecoderMath &math = *p.decoder->math;
  each_row(p.call->threads, p.count, [&](int64_t t) {
    float *x = p.x + t * s.hidden, *y = p.normed + t * s.hidden;
    if (after != nullptr) math.rms_norm(y, after, s.hidden, s.eps, y);
    math.add(y, 1.f, s.hidden, x);
    math.rms_norm(x, norm, s.hidden, s.eps, y);
  });
}

tl_status run_layer(const Stretch &p, size_t layer) {
  const Decoder &d = *p.decoder;
  const DecoderLayer &l = d.layers[layer];
  const tl_decoder_shape &s = d.shape;
  const Widths w = widths_of(s);
  const float *next = layer + 1 < d.layers.size() ? d.layers[layer + 1].given.attention_norm : s.norm;
  tl_status status = multiply(p, l.qkv, {p.normed, s.hidden, p.count, p.qkv, w.qkv, nullptr});
  if (status != TL_OK) return status;
  each_row(p.call->threads, p.count, [&](int64_t t) { place_token(p, layer, t); });
  attend(p, layer);
  status = multiply(p, l.out, {p.attended, w.queries, p.count, p.normed, s.hidden, nullptr});
  if (status != TL_OK) return status;
  add_and_norm(p, l.given.after_attention, l.given.mlp_norm);
  status = run_mlp(p, l);
  if (status != TL_OK) return status;
  add_and_norm(p, l.given.after_mlp, next);
  return TL_OK;
}

tl_status run_stretch(const Stretch &p) {
  const tl_decoder_shape &s = p.decoder->shape;
  std::copy_n(p.call->x + p.first * s.hidden, p.count * s.hidden, p.x);
  const float *norm = p.decoder->layers[0].given.attention_norm;
  each_row(p.call->threads, p.count, [&](int64_t t) {
    p.decoder->math->rms_norm(p.x + t * s.hidden, norm, s.hidden, s.eps, p.normed + t * s.hidden);
  });
  for (size_t i = 0; i < p.decoder->layers.size(); i++) {
    const tl_status status = run_layer(p, i);
    if (status != TL_OK) return status;
  }
  std::copy_n(p.normed, p.count * s.hidden, p.call->y + p.first * s.hidden);
  return TL_OK;
}

bool valid(const Decoder &d, const tl_decoder_prompt &c) {
  if (!c.x || !c.y || !c.keys || !c.values || (d.shape.rotary > 0 && (!c.cos || !c.sin)) || c.threads < 1) return false;
  if (c.count < 1 || c.length < 0 || c.length > c.capacity || c.count > c.capacity - c.length) return false;
  return c.cache_dtype == TL_FLOAT32 || c.cache_dtype == TL_BFLOAT16;
}

tl_status run(const Decoder &d, const tl_decoder_prompt &call) {
  if (!valid(d, call)) return TL_BAD_ARGUMENT;
  static thread_local Scratch scratch;
  // Stretches of about the same length.
  const int64_t stretches = (call.count + kMostTokens - 1) / kMostTokens;
  tl_status status = TL_OK;
  for (int64_t i = 0; i < stretches && status == TL_OK; i++) {
    const int64_t first = call.count * i / stretches;
    Stretch stretch{};
    stretch.decoder = &d;
    stretch.call = &call;
    stretch.first = first;
    stretch.count = call.count * (i + 1) / stretches - first;
    const auto floats = static_cast<size_t>(cut(&stretch, nullptr));
    cut(&stretch, reinterpret_cast<float *>(scratch.reserve(floats * sizeof(float))));
    status = run_stretch(stretch);
  }
  scratch.release_large();
  return status;
}

}  // namespace
}  // namespace transload

extern "C" int32_t tl_decoder_prompt_run(const void *decoder, const tl_decoder_prompt *prompt) {
  if (!decoder || !prompt) return TL_BAD_ARGUMENT;
  try {
    return transload::run(*static_cast<const transload::Decoder *>(decoder), *prompt);
  } catch (const std::exception &) {  // as in tl_matmul
    return TL_OUT_OF_MEMORY;
  }
}

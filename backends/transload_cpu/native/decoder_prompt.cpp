// Many tokens of one sequence through all layers of a decoder, a stretch of the prompt after another.
//
// Products go through the driver for many rows (product.h); everything between them is shared among threads by tokens,
// attention by key heads and runs of tokens.
#include <algorithm>
#include <exception>

#include "decoder.h"
#include "parallel.h"
#include "product.h"
#include "scratch.h"

namespace transload {
namespace {

constexpr int64_t kMostTokens = 256;      // of a stretch: its activations stay in the cache
constexpr int64_t kRowsPerItem = 8;       // of everything that is done token by token
constexpr int64_t kAttentionRows = 768;   // of one item: tokens times the query heads of a key head
constexpr int64_t kFloatOutputs = 16;     // of weights that were left as floats, in one item

// Some tokens on their way through the layers, and the memory that they use.
struct Stretch {
  const Decoder *decoder;
  const tl_decoder_prompt *call;
  int64_t first, count;     // of the call's tokens
  float *x, *normed;        // [count][hidden]
  float *qkv, *attended;    // [count][all heads * dim], [count][query heads * dim]
  float *gate_up;           // [count][2 * width]
  float *rooms;             // of attention, for every thread
  int64_t room, tokens_per_item;
};

struct Widths {
  int64_t queries, qkv;
};

Widths widths_of(const tl_decoder_shape &s) { return {s.heads * s.head_dim, (s.heads + 2 * s.kv_heads) * s.head_dim}; }

// Floats for `count` tokens, each piece starting at a multiple of 64 bytes. memory may be null, only to add up.
int64_t cut(Stretch *p, float *memory) {
  const tl_decoder_shape &s = p->decoder->shape;
  const Widths w = widths_of(s);
  int64_t used = 0;
  const auto piece = [&](int64_t floats) {
    float *at = memory == nullptr ? nullptr : memory + used;
    used += (floats + 15) / 16 * 16;
    return at;
  };
  const int64_t queries = s.heads / s.kv_heads;
  p->tokens_per_item = std::clamp<int64_t>(kAttentionRows / queries, 1, p->count);
  p->room = (p->decoder->math->prompt_floats(p->tokens_per_item * queries, s.head_dim) + 15) / 16 * 16;
  p->x = piece(p->count * s.hidden);
  p->normed = piece(p->count * s.hidden);
  p->qkv = piece(p->count * w.qkv);
  p->attended = piece(p->count * w.queries);
  p->gate_up = piece(p->count * 2 * p->decoder->width);
  p->rooms = piece(p->room * p->call->threads);
  return used;
}

// body(token) for every token.
template <class Body>
void each_token(const Stretch &p, const Body &body) {
  parallel(p.call->threads, (p.count + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item, int) {
    const int64_t last = std::min(p.count, (item + 1) * kRowsPerItem);
    for (int64_t t = item * kRowsPerItem; t < last; t++) body(t);
  });
}

// y [count][y_stride] = W x + bias; x [count][x_stride]. The outputs of the layer's parts follow each other.
tl_status multiply(const Stretch &p, const Linear &linear, const float *x, int64_t x_stride, float *y, int64_t y_stride) {
  for (const auto &part : linear.parts) {
    const tl_linear &l = part->linear;
    if (part->isa != nullptr) {
      const tl_product product{l.weight, l.weight_bytes, x, x_stride, p.count, nullptr, l.bias, nullptr,
                               l.act_group, l.act_bits, TL_FLOAT32, p.decoder->shape.isa, p.call->threads};
      const tl_status status = multiply_rows(product, {y, y_stride, TL_FLOAT32});
      if (status != TL_OK) return status;
    } else {
      parallel(p.call->threads, (l.n + kFloatOutputs - 1) / kFloatOutputs, [&](int64_t item, int) {
        const int64_t from = item * kFloatOutputs, to = std::min(l.n, from + kFloatOutputs);
        for (int64_t t = 0; t < p.count; t++) {
          float *out = y + t * y_stride;
          p.decoder->math->float_rows(l.weight, l.float_dtype, l.k, from, to, x + t * x_stride, out);
          for (int64_t i = from; l.bias != nullptr && i < to; i++) out[i] += l.bias[i];
        }
      });
    }
    y += l.n;
  }
  return TL_OK;
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
  each_token(p, [&](int64_t t) {
    float *x = p.x + t * s.hidden, *y = p.normed + t * s.hidden;
    if (after != nullptr) math.rms_norm(y, after, s.hidden, s.eps, y);
    math.add(y, s.hidden, x);
    math.rms_norm(x, norm, s.hidden, s.eps, y);
  });
}

tl_status run_layer(const Stretch &p, size_t layer) {
  const Decoder &d = *p.decoder;
  const DecoderLayer &l = d.layers[layer];
  const tl_decoder_shape &s = d.shape;
  const Widths w = widths_of(s);
  const float *next = layer + 1 < d.layers.size() ? d.layers[layer + 1].given.attention_norm : s.norm;
  tl_status status = multiply(p, l.qkv, p.normed, s.hidden, p.qkv, w.qkv);
  if (status != TL_OK) return status;
  each_token(p, [&](int64_t t) { place_token(p, layer, t); });
  attend(p, layer);
  status = multiply(p, l.out, p.attended, w.queries, p.normed, s.hidden);
  if (status != TL_OK) return status;
  add_and_norm(p, l.given.after_attention, l.given.mlp_norm);
  const int64_t width = l.mlp.width;
  status = multiply(p, l.mlp.gate_up, p.normed, s.hidden, p.gate_up, 2 * width);
  if (status != TL_OK) return status;
  each_token(p, [&](int64_t t) {
    float *gate = p.gate_up + t * 2 * width;
    d.math->gate(gate, gate + width, width, gate);
  });
  status = multiply(p, l.mlp.down, p.gate_up, 2 * width, p.normed, s.hidden);
  if (status != TL_OK) return status;
  add_and_norm(p, l.given.after_mlp, next);
  return TL_OK;
}

tl_status run_stretch(const Stretch &p) {
  const tl_decoder_shape &s = p.decoder->shape;
  std::copy_n(p.call->x + p.first * s.hidden, p.count * s.hidden, p.x);
  const float *norm = p.decoder->layers[0].given.attention_norm;
  each_token(p, [&](int64_t t) {
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
    cut(&stretch, reinterpret_cast<float *>(scratch.reserve(static_cast<size_t>(cut(&stretch, nullptr)) * sizeof(float))));
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

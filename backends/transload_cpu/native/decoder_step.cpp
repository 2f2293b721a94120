// One token through all layers of a decoder. Everything between products is a few microseconds of one thread's time,
// except attention, which threads share by key heads and runs of tokens.
#include <algorithm>
#include <new>

#include "decoder_run.h"
#include "parallel.h"
#include "scratch.h"

namespace transload {
namespace {

// Memory of one call, cut into pieces that start at multiples of 64 bytes.
class Pieces {
 public:
  explicit Pieces(uint8_t *memory) : memory_(memory) {}  // null: only to add up

  uint8_t *bytes(int64_t count) {
    uint8_t *piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count + 63) / 64 * 64;
    return piece;
  }

  float *floats(int64_t count) { return reinterpret_cast<float *>(bytes(count * 4)); }
  int64_t used() const { return used_; }

 private:
  uint8_t *memory_;
  int64_t used_ = 0;
};

constexpr int64_t kTokensPerPart = 256;  // of attention: what one item reads; results do not depend on threads

// Runs of tokens that attention is cut into.
int64_t parts_of(int64_t tokens) { return (tokens + kTokensPerPart - 1) / kTokensPerPart; }

int64_t cut(const Decoder &d, const tl_decoder_token &t, uint8_t *memory, Run *run) {
  const tl_decoder_shape &s = d.shape;
  Pieces pieces(memory);
  const int64_t parts = parts_of(t.length + 1), queries = s.heads * s.head_dim;
  const auto size = [](size_t bytes) { return static_cast<int64_t>(bytes); };
  *run = {&d, &t, pieces.floats(s.hidden), pieces.floats(s.hidden),
          pieces.floats(queries + 2 * s.kv_heads * s.head_dim), pieces.floats(queries),
          pieces.floats(parts * s.heads * kTokensPerPart), pieces.floats(parts * s.heads),
          pieces.floats(parts * s.heads), pieces.floats(parts * queries), pieces.floats(2 * d.width),
          pieces.floats(d.width), pieces.floats(d.branches * s.hidden), pieces.floats(d.experts),
          reinterpret_cast<Choice *>(pieces.bytes(2 * d.experts * size(sizeof(Choice)))),
          reinterpret_cast<Product *>(pieces.bytes((d.branches + 1) * size(sizeof(Product)))),
          pieces.bytes(d.scratch_bytes)};
  return pieces.used();
}

void *head_at(const Run &r, void *base, int64_t head, int64_t token) {
  const int64_t at = (head * r.token->capacity + token) * r.decoder->shape.head_dim;
  return static_cast<uint8_t *>(base) + at * dtype_bytes(r.token->cache_dtype);
}

// Queries are normed, turned and scaled in place; the new key and value go to the cache.
void place_token(const Run &r, const DecoderLayer &l, size_t layer) {
  const tl_decoder_shape &s = r.decoder->shape;
  const DecoderMath &math = *r.decoder->math;
  const tl_decoder_token &t = *r.token;
  for (int64_t h = 0; h < s.heads + s.kv_heads; h++) {
    const bool query = h < s.heads;
    float *head = r.qkv + h * s.head_dim;
    if (const float *norm = query ? l.given.q_norm : l.given.k_norm) math.rms_norm(head, norm, s.head_dim, s.eps, head);
    math.rotate(head, t.cos, t.sin, s.rotary, s.interleaved != 0);
    for (int64_t i = 0; query && i < s.head_dim; i++) head[i] *= s.scaling;
  }
  const float *key = r.qkv + s.heads * s.head_dim, *value = key + s.kv_heads * s.head_dim;
  for (int64_t h = 0; h < s.kv_heads; h++) {
    math.store(key + h * s.head_dim, s.head_dim, t.cache_dtype, head_at(r, t.keys[layer], h, t.length));
    math.store(value + h * s.head_dim, s.head_dim, t.cache_dtype, head_at(r, t.values[layer], h, t.length));
  }
}

void attend(const Run &r, size_t layer) {
  const tl_decoder_shape &s = r.decoder->shape;
  const tl_decoder_token &t = *r.token;
  const DecoderMath &math = *r.decoder->math;
  const int64_t queries = s.heads / s.kv_heads, tokens = t.length + 1, window = r.decoder->layers[layer].given.window;
  const int64_t start = window > 0 ? std::max<int64_t>(0, tokens - window) : 0, parts = parts_of(tokens - start);
  const int64_t bytes = 2 * (tokens - start) * s.kv_heads * s.head_dim * dtype_bytes(t.cache_dtype);
  parallel(bytes < (96 << 10) ? 1 : t.threads, s.kv_heads * parts, [&](int64_t item, int) {
    const int64_t head = item % s.kv_heads, part = item / s.kv_heads, first = part * s.heads + head * queries;
    const Attention a{r.qkv + head * queries * s.head_dim, head_at(r, t.keys[layer], head, 0),
                      head_at(r, t.values[layer], head, 0), s.head_dim, queries,
                      start + part * kTokensPerPart, std::min(start + (part + 1) * kTokensPerPart, tokens),
                      t.cache_dtype};
    math.attend(a, r.scores + first * kTokensPerPart, r.largest + first, r.sum + first, r.partial + first * s.head_dim);
  });
  for (int64_t h = 0; h < s.heads; h++)
    math.join(parts, s.heads, r.largest + h, r.sum + h, r.partial + h * s.head_dim, s.head_dim,
              r.attended + h * s.head_dim);
}

// x += after(y), y overwritten.
void add_to_x(const Run &r, const float *after, float *y) {
  const tl_decoder_shape &s = r.decoder->shape;
  if (after != nullptr) r.decoder->math->rms_norm(y, after, s.hidden, s.eps, y);
  r.decoder->math->add(y, 1.f, s.hidden, r.x);
}

// One linear layer.
void apply(const Run &r, const Linear &linear, const float *x, float *y) {
  const Product product{&linear, 0, x, y};
  multiply(*r.decoder->math, &product, 1, r.scratch, r.token->threads);
}

void run_layer(const Run &r, size_t layer) {
  const DecoderLayer &l = r.decoder->layers[layer];
  const tl_decoder_shape &s = r.decoder->shape;
  const DecoderMath &math = *r.decoder->math;
  math.rms_norm(r.x, l.given.attention_norm, s.hidden, s.eps, r.normed);
  apply(r, l.qkv, r.normed, r.qkv);
  place_token(r, l, layer);
  attend(r, layer);
  apply(r, l.out, r.attended, r.normed);
  add_to_x(r, l.given.after_attention, r.normed);
  math.rms_norm(r.x, l.given.mlp_norm, s.hidden, s.eps, r.normed);
  run_mlp(r, l);
  add_to_x(r, l.given.after_mlp, r.normed);
}

bool valid(const Decoder &d, const tl_decoder_token &t) {
  if (!t.x || !t.y || !t.keys || !t.values || (d.shape.rotary > 0 && (!t.cos || !t.sin)) || t.threads < 1) return false;
  if (t.length < 0 || t.length >= t.capacity) return false;
  return t.cache_dtype == TL_FLOAT32 || t.cache_dtype == TL_BFLOAT16;
}

tl_status step(const Decoder &d, const tl_decoder_token &token) {
  if (!valid(d, token)) return TL_BAD_ARGUMENT;
  static thread_local Scratch scratch;
  Run run;
  const int64_t bytes = cut(d, token, nullptr, &run);
  cut(d, token, scratch.reserve(static_cast<size_t>(bytes + bytes / 2)), &run);  // room for a text that grows
  std::copy_n(token.x, d.shape.hidden, run.x);
  for (size_t i = 0; i < d.layers.size(); i++) run_layer(run, i);
  d.math->rms_norm(run.x, d.shape.norm, d.shape.hidden, d.shape.eps, token.y);
  return TL_OK;
}

}  // namespace
}  // namespace transload

extern "C" int32_t tl_decoder_step(const void *decoder, const tl_decoder_token *token) {
  if (!decoder || !token) return TL_BAD_ARGUMENT;
  try {
    return transload::step(*static_cast<const transload::Decoder *>(decoder), *token);
  } catch (const std::bad_alloc &) {
    return TL_OUT_OF_MEMORY;
  }
}

// A decoder is checked and prepared once; decoder_step.cpp runs it.
#include "decoder.h"

#include <algorithm>
#include <new>

namespace transload {
namespace {

constexpr int64_t kLargest = int64_t(1) << 24;  // of any size

bool valid(const tl_decoder_shape &s) {
  for (const int64_t size : {s.layers, s.hidden, s.heads, s.kv_heads, s.head_dim})
    if (size < 1 || size > kLargest) return false;
  return s.heads % s.kv_heads == 0 && s.rotary >= 0 && s.rotary <= s.head_dim && s.rotary % 2 == 0 && s.norm != nullptr;
}

// The linears of a decoder, taken one after the other.
struct Linears {
  const tl_linear *at;
  int64_t left;
  int32_t isa;

  tl_status take(int32_t parts, int64_t n, int64_t k, int64_t experts, Linear *out) {
    if (parts < 1 || parts > left) return TL_BAD_ARGUMENT;
    const tl_status status = prepare(at, parts, n, k, experts, isa, out);
    at += parts;
    left -= parts;
    return status;
  }

  // The width is what the down projection reads.
  tl_status take(int32_t gate_up, int32_t down, int64_t hidden, int64_t experts, Gated *out) {
    if (gate_up < 1 || gate_up >= left) return TL_BAD_ARGUMENT;
    out->width = at[gate_up].k;
    if (out->width < 1 || out->width > kLargest) return TL_BAD_ARGUMENT;
    const tl_status status = take(gate_up, 2 * out->width, hidden, experts, &out->gate_up);
    return status == TL_OK ? take(down, hidden, out->width, experts, &out->down) : status;
  }
};

bool valid(const tl_experts &e) {
  if (e.experts < 1 || e.experts > kLargest || e.groups < 1 || e.experts % e.groups != 0) return false;
  if (e.groups > 1 && e.experts / e.groups < 2) return false;  // a group is judged by its two largest scores
  if (e.top_groups < 1 || e.top_groups > e.groups) return false;
  return e.top_k >= 1 && e.top_k <= e.experts / e.groups * e.top_groups;
}

tl_status take_experts(Linears &linears, const tl_experts &given, int64_t hidden, Experts *out) {
  if (!valid(given)) return TL_BAD_GEOMETRY;
  out->given = given;
  tl_status status = linears.take(given.router, given.experts, hidden, 1, &out->router);
  if (status == TL_OK && given.shared_gate != 0)
    status = linears.take(given.shared_gate, 1, hidden, 1, &out->shared_gate);
  return status == TL_OK ? linears.take(given.gate_up, given.down, hidden, given.experts, &out->each) : status;
}

// Room for a layer whose tokens pass the MLP, where there is one, and top_k experts.
void make_room(Decoder &d, const DecoderLayer &l) {
  const Experts &e = l.experts;
  const bool mlp = l.mlp.width > 0;
  const int64_t top_k = e.each.width > 0 ? e.given.top_k : 0;
  d.branches = std::max(d.branches, mlp + top_k);
  d.width = std::max(d.width, l.mlp.width + top_k * e.each.width);
  d.experts = std::max(d.experts, top_k > 0 ? e.given.experts : 0);
  for (const int64_t bytes : {scratch_bytes(l.qkv), scratch_bytes(l.out),
                              scratch_bytes(e.router) + scratch_bytes(e.shared_gate),
                              scratch_bytes(l.mlp.gate_up) + top_k * scratch_bytes(e.each.gate_up),
                              scratch_bytes(l.mlp.down) + top_k * scratch_bytes(e.each.down)})
    d.scratch_bytes = std::max(d.scratch_bytes, bytes);
}

tl_status prepare_layer(const Decoder &d, const tl_decoder_layer &layer, Linears &linears, DecoderLayer *out) {
  const tl_decoder_shape &s = d.shape;
  if (!layer.attention_norm || !layer.mlp_norm || layer.window < 0) return TL_BAD_ARGUMENT;
  out->given = layer;
  const int64_t queries = s.heads * s.head_dim;
  tl_status status = linears.take(layer.qkv, queries + 2 * s.kv_heads * s.head_dim, s.hidden, 1, &out->qkv);
  if (status == TL_OK) status = linears.take(layer.out, s.hidden, queries, 1, &out->out);
  const bool dense = layer.experts == nullptr || layer.gate_up != 0 || layer.down != 0;
  if (status == TL_OK && dense) status = linears.take(layer.gate_up, layer.down, s.hidden, 1, &out->mlp);
  if (status == TL_OK && layer.experts) status = take_experts(linears, *layer.experts, s.hidden, &out->experts);
  return status;
}

tl_status make(const tl_decoder_shape &shape, const tl_decoder_layer *layers, const tl_linear *linears, int64_t count,
               void **out) {
  if (!valid(shape)) return TL_BAD_GEOMETRY;
  auto d = std::make_unique<Decoder>();
  d->shape = shape;
  d->math = &math_of(shape.isa);
  d->layers.resize(static_cast<size_t>(shape.layers));
  Linears left{linears, count, shape.isa};
  for (int64_t i = 0; i < shape.layers; i++) {
    DecoderLayer &l = d->layers[static_cast<size_t>(i)];
    const tl_status status = prepare_layer(*d, layers[i], left, &l);
    if (status != TL_OK) return status;
    make_room(*d, l);
  }
  if (left.left != 0) return TL_BAD_ARGUMENT;
  *out = d.release();
  return TL_OK;
}

}  // namespace

const DecoderMath &math_of(int32_t isa) {
#if defined(__x86_64__)
  if (isa == TL_AVX512_VNNI || isa == TL_AMX_INT8) return avx512_math;
  if (isa == TL_AVX2 || isa == TL_AVX_VNNI) return avx2_math;
#endif
  (void)isa;
  return portable_math;
}

}  // namespace transload

extern "C" int32_t tl_interface_version(void) { return 4; }

extern "C" int32_t tl_decoder_new(const tl_decoder_shape *shape, const tl_decoder_layer *layers,
                                  const tl_linear *linears, int64_t linear_count, void **decoder) {
  if (!shape || !layers || !linears || !decoder) return TL_BAD_ARGUMENT;
  try {
    return transload::make(*shape, layers, linears, linear_count, decoder);
  } catch (const std::bad_alloc &) {
    return TL_OUT_OF_MEMORY;
  }
}

extern "C" void tl_decoder_free(void *decoder) { delete static_cast<transload::Decoder *>(decoder); }

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

  tl_status take(int32_t parts, int64_t n, int64_t k, Linear *out) {
    if (parts < 1 || parts > left) return TL_BAD_ARGUMENT;
    const tl_status status = prepare(at, parts, n, k, isa, out);
    at += parts;
    left -= parts;
    return status;
  }
};

// The width is what the down projection reads.
tl_status take_gated(Linears &linears, int32_t gate_up, int32_t down, int64_t hidden, Gated *out) {
  if (gate_up < 1 || gate_up >= linears.left) return TL_BAD_ARGUMENT;
  out->width = linears.at[gate_up].k;
  if (out->width < 1 || out->width > kLargest) return TL_BAD_ARGUMENT;
  const tl_status status = linears.take(gate_up, 2 * out->width, hidden, &out->gate_up);
  return status == TL_OK ? linears.take(down, hidden, out->width, &out->down) : status;
}

tl_status prepare_layer(Decoder &d, const tl_decoder_layer &layer, Linears &linears, DecoderLayer *out) {
  const tl_decoder_shape &s = d.shape;
  if (!layer.attention_norm || !layer.mlp_norm || layer.window < 0) return TL_BAD_ARGUMENT;
  out->given = layer;
  const int64_t queries = s.heads * s.head_dim;
  tl_status status = linears.take(layer.qkv, queries + 2 * s.kv_heads * s.head_dim, s.hidden, &out->qkv);
  if (status == TL_OK) status = linears.take(layer.out, s.hidden, queries, &out->out);
  if (status == TL_OK) status = take_gated(linears, layer.gate_up, layer.down, s.hidden, &out->mlp);
  if (status != TL_OK) return status;
  d.width = std::max(d.width, out->mlp.width);
  for (const Linear *linear : {&out->qkv, &out->out, &out->mlp.gate_up, &out->mlp.down})
    d.scratch_bytes = std::max(d.scratch_bytes, scratch_bytes(*linear));
  return TL_OK;
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
    const tl_status status = prepare_layer(*d, layers[i], left, &d->layers[static_cast<size_t>(i)]);
    if (status != TL_OK) return status;
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

extern "C" int32_t tl_interface_version(void) { return 2; }

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

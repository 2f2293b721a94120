// C interface of Transload's CPU library: matrix products with 4 to 8 bit integer weights.
//
//   y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
//   w[n, k] = scale[n, g] * (code[n, k] - zero[n, g])    or    scale[n, g] * code[n, k] + min[n, g]
//
// A packed weight is one block of bytes without pointers: it may be copied, saved and memory-mapped.
// Every function returns a tl_status and may be called from several threads at once.
#ifndef TRANSLOAD_NATIVE_H
#define TRANSLOAD_NATIVE_H

#include <stdint.h>

#if defined(_WIN32)
#define TL_API __declspec(dllexport)
#else
#define TL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  TL_OK = 0,
  TL_BAD_GEOMETRY = 1,    // sizes, bits or kinds that the library does not hold
  TL_BAD_PACKED = 2,      // not a packed weight, truncated, or of another version
  TL_BAD_ARGUMENT = 3,    // a null pointer, an unknown type, counts that do not add up
  TL_UNSUPPORTED_CPU = 4, // the instruction set asked for is not there
  TL_OUT_OF_MEMORY = 5
} tl_status;

typedef enum { TL_FLOAT32 = 0, TL_BFLOAT16 = 1, TL_FLOAT16 = 2 } tl_dtype;

typedef enum {
  TL_ZERO_MIDPOINT = 0, // tl_geometry.midpoint for every group
  TL_ZERO_CODES = 1,    // uint8 per group
  TL_ZERO_FLOATS = 2,   // a zero point of the scales' type per group
  TL_ZERO_MINS = 3      // an offset of the scales' type per group
} tl_zero;

// Instruction sets, also the bits of tl_supported(): bit (1 << TL_AVX2) and so on.
typedef enum {
  TL_PORTABLE = 0,
  TL_AVX2 = 1,
  TL_AVX_VNNI = 2,
  TL_AVX512_VNNI = 3,
  TL_AMX_INT8 = 4,
  TL_NEON_DOTPROD = 5
} tl_isa;

typedef struct {
  int64_t n, k;       // out and in features
  int64_t group_size; // a multiple of 8, or -1 for one group per output
  int64_t experts;    // 1 for a plain linear
  int32_t bits;        // 4, 5, 6 or 8: the room of a code; other codes are held in the next wider room
  int32_t zero;        // tl_zero
  int32_t midpoint;    // 0..255, with TL_ZERO_MIDPOINT only
  int32_t scale_dtype; // tl_dtype, of scales, float zeros and mins
  int32_t act_order;   // 1 when a permutation of the inputs is stored
  int32_t reserved;    // 0
} tl_geometry;

// The instruction sets that this machine can run, as a bit mask. Asks the kernel for AMX tiles once.
TL_API uint32_t tl_supported(void);

// Version of the structures and functions of this header; callers compiled for another one must not call.
TL_API int32_t tl_interface_version(void);

// Version of the packed layout; another number means that cached files must be packed again.
TL_API int32_t tl_layout_version(void);

// Bytes of a packed weight of this geometry.
TL_API int32_t tl_packed_bytes(const tl_geometry *geometry, int64_t *bytes);

// codes: uint8 [experts, n, k]; scales [experts, n, groups]; zeros: uint8 or the scales' type, or null for midpoint;
// order: int32 [k] (order[i] is the input that stands at place i), or null. packed: tl_packed_bytes bytes.
TL_API int32_t tl_pack(const tl_geometry *geometry, const uint8_t *codes, const void *scales, const void *zeros,
                       const int32_t *order, void *packed, int64_t packed_bytes, int32_t threads);

// The geometry of a packed weight, after checking that its bytes are complete.
TL_API int32_t tl_describe(const void *packed, int64_t packed_bytes, tl_geometry *geometry);

// The exact inverse of tl_pack; zeros and order may be null where the weight has none.
TL_API int32_t tl_unpack(const void *packed, int64_t packed_bytes, uint8_t *codes, void *scales, void *zeros,
                         int32_t *order, int32_t threads);

// Outputs index[0] .. index[count - 1] of a plain linear, in the order asked for: the lookup of a tied embedding.
// codes [count, k], scales and zeros [count, groups]; order as in tl_unpack.
TL_API int32_t tl_rows(const void *packed, int64_t packed_bytes, const int64_t *index, int64_t count, uint8_t *codes,
                       void *scales, void *zeros, int32_t *order);

// Outputs first .. first + count - 1, of all experts' one after the other, as floats [count, k] of `dtype`, inputs in
// their original order: (code - zero) * scale or code * scale + min in float32, then rounded to nearest even once.
TL_API int32_t tl_dequantize(const void *packed, int64_t packed_bytes, int64_t first, int64_t count, int32_t dtype,
                             void *out, int32_t threads);

// y [m, n] = x w^T for few rows: float weights [n, k] of `dtype` as they are, x [m, k] and y in float32.
TL_API int32_t tl_float_product(const void *w, int32_t dtype, int64_t n, int64_t k, const float *x, int64_t m, float *y,
                                int32_t isa, int32_t threads);

typedef struct {
  const void *packed;
  int64_t packed_bytes;
  const void *x;         // [m, k] of x_dtype, rows x_stride elements apart
  int64_t x_stride, m;
  const int64_t *counts; // rows of each expert, sum m; null for a plain linear
  const float *bias;     // [experts, n] or null
  void *y;               // [m, n] of x_dtype, contiguous
  int64_t act_group;     // int8 activations: inputs that share a scale, -1 for the whole row
  int32_t act_bits;      // 8, or 16 for two int8 halves of a 15-bit value
  int32_t x_dtype, isa, threads;
} tl_product;

TL_API int32_t tl_matmul(const tl_product *product);

// One linear layer of a decoder, or a part of one: outputs of several parts follow each other.
typedef struct {
  const void *weight;    // a packed weight, or floats [experts, n, k] where they were left as they are
  int64_t weight_bytes;  // of a packed weight
  int64_t n, k, experts; // experts: 1 for a plain linear
  const float *bias;     // [experts, n] or null
  int64_t act_group;     // as in tl_product
  int32_t act_bits;      // as in tl_product; 0 for floats
  int32_t float_dtype;   // of floats: tl_dtype
} tl_linear;

// Experts beside or instead of a layer's MLP, with the MLP's form: a token takes top_k of them, each times a weight.
// Logits are the router's outputs for norm(x); scores are their softmax, or 1 / (1 + exp(-logit)) each. Chosen are the
// largest scores + bias among the top_groups groups whose two largest add up to most; a choice's weight is its score,
// over the sum of the chosen scores when normalized, times scaling. With a shared gate (one output) the MLP beside the
// experts counts 1 / (1 + exp(-shared_gate(norm(x)))) times.
typedef struct {
  int64_t experts, top_k, groups, top_groups;
  const float *bias;                           // [experts] or null
  float scaling;
  int32_t sigmoid, normalized;
  int32_t router, shared_gate, gate_up, down;  // parts, in this order behind the layer's; shared_gate may have none
} tl_experts;

// One layer: x += after(out(attention(qkv(norm(x))))); x += after(mlp(norm(x))), mlp(x) = down(silu(gate(x)) * up(x)).
// Norms are root-mean-square norms with weights [hidden] ([head_dim] for q and k), null where there is none.
typedef struct {
  const float *attention_norm, *q_norm, *k_norm, *after_attention, *mlp_norm, *after_mlp;
  int64_t window;                  // tokens that a token sees, itself among them; 0 for all
  int32_t qkv, out, gate_up, down; // parts of each linear layer, in this order in the decoder's linears; the latter
                                   // two have none where experts are all
  const tl_experts *experts;       // null for a dense layer
} tl_decoder_layer;

typedef struct {
  int64_t layers, hidden, heads, kv_heads, head_dim, rotary;
  float eps, scaling;       // of all norms; of scores
  int32_t interleaved, isa; // rotary pairs are neighbours; tl_isa
  const float *norm;        // after the last layer [hidden]
} tl_decoder_shape;

// Prepares decoding. Weights, biases and norms stay the caller's and must outlive the decoder.
TL_API int32_t tl_decoder_new(const tl_decoder_shape *shape, const tl_decoder_layer *layers, const tl_linear *linears,
                              int64_t linear_count, void **decoder);
TL_API void tl_decoder_free(void *decoder);

typedef struct {
  const float *x;                // [hidden], the token's embedding
  const float *cos, *sin;        // [rotary / 2], of the token's position
  void *const *keys, *const *values; // per layer [kv_heads][capacity][head_dim] of cache_dtype; the token is added
  int64_t capacity, length;      // tokens that fit, tokens that are there, below capacity
  float *y;                      // [hidden], normed
  int32_t cache_dtype, threads;  // TL_FLOAT32 or TL_BFLOAT16
} tl_decoder_token;

// One token through all layers.
TL_API int32_t tl_decoder_step(const void *decoder, const tl_decoder_token *token);

typedef struct {
  const float *x;                // [count][hidden], embeddings of tokens that follow each other
  const float *cos, *sin;        // [count][rotary / 2]
  void *const *keys, *const *values; // as in tl_decoder_token; the tokens are added
  int64_t capacity, length, count; // length + count is at most capacity
  float *y;                      // [count][hidden], normed
  int32_t cache_dtype, threads;
} tl_decoder_prompt;

// Several tokens through all layers, each seeing those up to itself. After an error the cache holds as before.
TL_API int32_t tl_decoder_prompt_run(const void *decoder, const tl_decoder_prompt *prompt);

#ifdef __cplusplus
}
#endif
#endif

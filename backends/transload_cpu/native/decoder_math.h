// What a decoder computes besides products, on float32: norms, rotary positions, attention, gating, and rows of weights
// that were left as floats. decoder_vectors.h holds the code; every instruction set compiles it once and fills a table.
#pragma once

#include <cstdint>

namespace transload {

// Query heads that share keys and values, over the tokens [from, to) of one sequence.
struct Attention {
  const float *q;             // [queries][dim], scaled already
  const void *keys, *values;  // [tokens][dim] of cache_dtype
  int64_t dim, queries, from, to;
  int32_t cache_dtype;        // TL_FLOAT32 or TL_BFLOAT16
};

// The same for many tokens that follow each other in one sequence, each of which sees those up to itself.
struct PromptAttention {
  const float *q;             // token t's heads at q + t * q_stride: [queries][dim], scaled already
  float *out;                 // the same, out_stride apart
  int64_t q_stride, out_stride;
  const void *keys, *values;  // [tokens][dim] of cache_dtype, from the start of the sequence
  int64_t dim, queries, tokens;
  int64_t first;              // place of the first of the tokens in the sequence
  int64_t window;             // tokens that a token sees, itself among them; 0 for all
  int32_t cache_dtype;        // TL_FLOAT32 or TL_BFLOAT16
};

struct DecoderMath {
  // out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]; out may be x.
  void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *out);

  // Turns the first `rotary` values of a head by the angles of cos and sin [rotary / 2]: pairs are (i, i + rotary / 2),
  // or neighbours when interleaved.
  void (*rotate)(float *head, const float *cos, const float *sin, int64_t rotary, bool interleaved);

  // out[i] = silu(gate[i]) * up[i].
  void (*gate)(const float *gate, const float *up, int64_t n, float *out);

  // scores: scratch [queries][to - from]. Writes for every query the largest score, the sum of exp(score - largest),
  // and the values summed with those weights: out [queries][dim], not divided.
  void (*attend)(const Attention &a, float *scores, float *largest, float *sum, float *out);

  // Joins `parts` results of attend for one query; entries of part p lie `stride` apart. out [dim], divided.
  void (*join)(int64_t parts, int64_t stride, const float *largest, const float *sum, const float *values, int64_t dim,
               float *out);

  // Memory: prompt_floats(tokens * queries, dim) floats, aligned to 64.
  void (*attend_many)(const PromptAttention &a, float *memory);
  int64_t (*prompt_floats)(int64_t rows, int64_t dim);

  // y[i] += scale * x[i].
  void (*add)(const float *x, float scale, int64_t n, float *y);

  // n floats to `dtype`.
  void (*store)(const float *x, int64_t n, int32_t dtype, void *out);

  // out[i] = weight row i times x, for rows [from, to) of float weights [n][k] of dtype.
  void (*float_rows)(const void *weight, int32_t dtype, int64_t k, int64_t from, int64_t to, const float *x,
                     float *out);
};

extern const DecoderMath portable_math;
#if defined(__x86_64__)
extern const DecoderMath avx2_math, avx512_math;
#endif

// The table that goes with a tl_isa.
const DecoderMath &math_of(int32_t isa);

}  // namespace transload

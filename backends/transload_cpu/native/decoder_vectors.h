// The code behind decoder_math.h in vectors of whatever width the including file is compiled for. Unnamed namespace:
// see floats.h.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "decoder_math.h"
#include "floats.h"
#include "unroll.h"

namespace transload {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kBlock = 4;  // vectors of values that are summed in registers together

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef float LooseVector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

#define TL_INLINE inline __attribute__((always_inline))

TL_INLINE Vector load(const float *from) { return *reinterpret_cast<const LooseVector *>(from); }
TL_INLINE Vector load(const uint16_t *from) {
  const LooseHalves halves = *reinterpret_cast<const LooseHalves *>(from);
  return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}
struct Half {
  uint16_t bits;
};

TL_INLINE Vector load(const Half *from) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#else
  Vector out;
  for (int i = 0; i < kLanes; i++) out[i] = from_float16(from[i].bits);
  return out;
#endif
}

TL_INLINE void save(Vector v, float *to) { *reinterpret_cast<LooseVector *>(to) = v; }
TL_INLINE float one(const float *from) { return *from; }
TL_INLINE float one(const uint16_t *from) { return from_bfloat16(*from); }
TL_INLINE float one(const Half *from) { return from_float16(from->bits); }
TL_INLINE Vector all(float value) { return Vector{} + value; }

TL_INLINE float total(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// e^x within 2 units in the last place. x is cut to where the result is a normal float; NaN stays NaN.
// x = n * ln 2 + r with |r| <= ln 2 / 2; ln 2 is subtracted in two parts, and e^r is its Taylor series to r^7.
TL_INLINE Vector exponential(Vector x) {
  x = x > 88.f ? all(88.f) : x;
  x = x < -87.f ? all(-87.f) : x;
  const Vector shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to an integer
  const Vector n = shifted - 12582912.f;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = r * (1.f / 5040) + (1.f / 720);
  p = p * r + (1.f / 120);
  p = p * r + (1.f / 24);
  p = p * r + (1.f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const Integers power = ((Integers)shifted - 0x4b400000 + 127) << 23;
  return p * (Vector)power;
}

TL_INLINE float exponential(float x) { return exponential(all(x))[0]; }

template <class T>
TL_INLINE float dot(const float *x, const T *y, int64_t n) {
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    unroll<4>([&](auto j) { sums[j] += load(x + i + j * kLanes) * load(y + i + j * kLanes); });
  for (; i + kLanes <= n; i += kLanes) sums[0] += load(x + i) * load(y + i);
  float out = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; i++) out += x[i] * one(y + i);
  return out;
}

void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
  const float scale = 1.f / __builtin_sqrtf(dot(x, x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

void rotate(float *head, const float *cos, const float *sin, int64_t rotary, bool interleaved) {
  const int64_t half = rotary / 2;
  if (interleaved) {
    for (int64_t i = 0; i < half; i++) {
      const float a = head[2 * i], b = head[2 * i + 1];
      head[2 * i] = a * cos[i] - b * sin[i];
      head[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

void gate(const float *gate, const float *up, int64_t n, float *out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vector x = load(gate + i);
    save(x / (exponential(-x) + 1.f) * load(up + i), out + i);
  }
  for (; i < n; i++) out[i] = gate[i] / (exponential(-gate[i]) + 1.f) * up[i];
}

// Values of tokens summed with weights: columns [column, column + count * kLanes).
template <int count, class T>
TL_INLINE void sum_values(const T *values, const float *weights, int64_t tokens, int64_t dim, float *out) {
  Vector sums[count] = {};
  for (int64_t t = 0; t < tokens; t++, values += dim)
    unroll<count>([&](auto j) { sums[j] += load(values + j * kLanes) * weights[t]; });
  unroll<count>([&](auto j) { save(sums[j], out + j * kLanes); });
}

template <class T>
void attend_to(const Attention &a, float *scores, float *largest, float *sum, float *out) {
  const int64_t tokens = a.to - a.from, dim = a.dim;
  const T *keys = static_cast<const T *>(a.keys) + a.from * dim;
  const T *values = static_cast<const T *>(a.values) + a.from * dim;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t q = 0; q < a.queries; q++) scores[q * tokens + t] = dot(a.q + q * dim, keys + t * dim, dim);
  for (int64_t q = 0; q < a.queries; q++, scores += tokens, out += dim) {
    float top = scores[0], all_weights = 0;
    for (int64_t t = 1; t < tokens; t++) top = scores[t] > top || __builtin_isnan(scores[t]) ? scores[t] : top;
    int64_t t = 0;
    Vector weights{};
    for (; t + kLanes <= tokens; t += kLanes) {
      const Vector weight = exponential(load(scores + t) - top);
      save(weight, scores + t);
      weights += weight;
    }
    for (; t < tokens; t++) all_weights += scores[t] = exponential(scores[t] - top);
    largest[q] = top;
    sum[q] = all_weights + total(weights);
    int64_t d = 0;
    constexpr int64_t block = kBlock * kLanes;
    for (; d + block <= dim; d += block) sum_values<kBlock>(values + d, scores, tokens, dim, out + d);
    for (; d + kLanes <= dim; d += kLanes) sum_values<1>(values + d, scores, tokens, dim, out + d);
    for (; d < dim; d++) {
      out[d] = 0;
      for (t = 0; t < tokens; t++) out[d] += scores[t] * one(values + t * dim + d);
    }
  }
}

void attend(const Attention &a, float *scores, float *largest, float *sum, float *out) {
  if (a.cache_dtype == TL_BFLOAT16)
    attend_to<uint16_t>(a, scores, largest, sum, out);
  else
    attend_to<float>(a, scores, largest, sum, out);
}

void join(int64_t parts, int64_t stride, const float *largest, const float *sum, const float *values, int64_t dim,
          float *out) {
  float top = largest[0], whole = 0;
  for (int64_t p = 1; p < parts; p++) top = largest[p * stride] > top ? largest[p * stride] : top;
  for (int64_t d = 0; d < dim; d++) out[d] = 0;
  for (int64_t p = 0; p < parts; p++) {
    const float share = parts == 1 ? 1.f : exponential(largest[p * stride] - top);
    whole += sum[p * stride] * share;
    const float *part = values + p * stride * dim;
    for (int64_t d = 0; d < dim; d++) out[d] += part[d] * share;
  }
  for (int64_t d = 0; d < dim; d++) out[d] /= whole;
}

void add(const float *x, float scale, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i++) y[i] += scale * x[i];
}

void store(const float *x, int64_t n, int32_t dtype, void *out) {
  for (int64_t i = 0; i < n; i++) write_float(out, i, dtype, x[i]);
}

template <class T>
void rows_of(const void *weight, int64_t k, int64_t from, int64_t to, const float *x, float *out) {
  for (int64_t i = from; i < to; i++) out[i] = dot(x, static_cast<const T *>(weight) + i * k, k);
}

void float_rows(const void *weight, int32_t dtype, int64_t k, int64_t from, int64_t to, const float *x, float *out) {
  if (dtype == TL_FLOAT32)
    rows_of<float>(weight, k, from, to, x, out);
  else if (dtype == TL_BFLOAT16)
    rows_of<uint16_t>(weight, k, from, to, x, out);
  else
    rows_of<Half>(weight, k, from, to, x, out);
}

#undef TL_INLINE

#define TRANSLOAD_DECODER_MATH {rms_norm, rotate, gate, attend, join, attend_many, prompt_floats, add, store, float_rows}

}  // namespace
}  // namespace transload

// Quantizing one segment in plain loops. Unnamed namespace: see floats.h.
#pragma once

#include <cmath>

#include "floats.h"

namespace transload {
namespace {

// The largest magnitude. Magnitudes compare like their bits, so NaN and infinity come out as the largest of all.
inline float largest(const float *x, int64_t count) {
  uint32_t top = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = as_bits(x[i]) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  return as_float(top);
}

// Activations to int8 with one step: returns the sum. The quotient is a true division and rounds half to even, so the
// codes equal the reference's. A zero or unusable step gives zeros.
inline int32_t quantize_to_8(const float *x, int64_t count, float step, int8_t *q) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i++) {
    float v = std::nearbyint(x[i] / step);
    v = v > 127.f ? 127.f : v < -127.f ? -127.f : v;
    const auto code = static_cast<int32_t>(v);
    sum += code;
    q[i] = static_cast<int8_t>(code);
  }
  return sum;
}

// Activations to 15 bits as 128 * upper + lower, lower in -64 .. 63. Sums of both.
inline void quantize_to_15(const float *x, int64_t count, float step, int8_t *upper, int8_t *lower, int32_t *sums) {
  int32_t upper_sum = 0, lower_sum = 0;
  for (int64_t i = 0; i < count; i++) {
    float v = std::nearbyint(x[i] / step);
    v = v > 16256.f ? 16256.f : v < -16256.f ? -16256.f : v;
    const auto code = static_cast<int32_t>(v);
    const int32_t high = (code + 64) >> 7, low = code - high * 128;
    upper_sum += high;
    lower_sum += low;
    upper[i] = static_cast<int8_t>(high);
    lower[i] = static_cast<int8_t>(low);
  }
  sums[0] = upper_sum;
  sums[1] = lower_sum;
}

}  // namespace
}  // namespace transload

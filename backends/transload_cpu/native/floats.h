// The three float types as float32. Everything is in an unnamed namespace: the header is compiled into files with
// different instruction sets, and a shared copy of a function could end up with instructions that a CPU lacks.
#pragma once

#include <cstdint>
#include <cstring>

#include "transload_native.h"

namespace transload {
namespace {

inline float as_float(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint32_t as_bits(float value) {
  uint32_t out;
  std::memcpy(&out, &value, 4);
  return out;
}

inline float from_bfloat16(uint16_t h) { return as_float(uint32_t(h) << 16); }

// IEEE half to float: shift exponent and mantissa into place, then multiply by 2^112 to move the bias from 15 to 127;
// that also normalizes subnormals. Exponent 31 (infinity, NaN) is set by hand.
inline float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = uint32_t(h & 0x7fffu) << 13;
  const uint32_t scaled = as_bits(as_float(rest) * 0x1p112f);
  return as_float(sign | ((h & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : scaled));
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value), rounded = bits + 0x7fffu + (bits >> 16 & 1);
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded >> 16);
}

// Round to nearest even. Adding 0.5 to a value below 2^-14 lets the float adder round a subnormal half.
inline uint16_t to_float16(float value) {
  const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}

inline float read_float(const void *from, int64_t at, int32_t dtype) {
  const auto *bytes = static_cast<const uint8_t *>(from);
  if (dtype == TL_FLOAT32) {
    float out;
    std::memcpy(&out, bytes + at * 4, 4);
    return out;
  }
  uint16_t half;
  std::memcpy(&half, bytes + at * 2, 2);
  return dtype == TL_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

inline void write_float(void *to, int64_t at, int32_t dtype, float value) {
  auto *bytes = static_cast<uint8_t *>(to);
  if (dtype == TL_FLOAT32) {
    std::memcpy(bytes + at * 4, &value, 4);
    return;
  }
  const uint16_t half = dtype == TL_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
  std::memcpy(bytes + at * 2, &half, 2);
}

}  // namespace
}  // namespace transload

// Loops over constants. Unnamed namespace: see floats.h.
#pragma once

#include <utility>

namespace transload {
namespace {

template <int... I, class F>
inline __attribute__((always_inline)) void unroll(std::integer_sequence<int, I...>, const F &f) {
  (f(std::integral_constant<int, I>{}), ...);
}

// Calls f with the constants 0 .. N - 1. The compiler then sees constant indices from the start and keeps small arrays
// in registers, which it does not do for loops that it unrolls later.
template <int N, class F>
inline __attribute__((always_inline)) void unroll(const F &f) {
  unroll(std::make_integer_sequence<int, N>{}, f);
}

}  // namespace
}  // namespace transload

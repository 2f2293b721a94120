// The product behind tl_matmul, for callers inside the library that place its results among others.
#pragma once

#include "transload_native.h"

namespace transload {

// Where results go: [m] rows of [n] values of dtype, `stride` values apart.
struct Output {
  void *y;
  int64_t stride;
  int32_t dtype;
};

// call.y is not looked at. Throws what tl_matmul turns into TL_OUT_OF_MEMORY.
tl_status multiply_rows(const tl_product &call, const Output &output);

}  // namespace transload

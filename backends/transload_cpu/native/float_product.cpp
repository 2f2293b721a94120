// Float weights times few rows: heads that are not quantized. One row takes as long as reading the weights; others find
// a piece of them in the cache.
#include <algorithm>

#include "decoder_math.h"
#include "layout.h"
#include "parallel.h"

namespace transload {
namespace {

constexpr int64_t kItemBytes = 256 << 10;

tl_status float_product(const void *w, int32_t dtype, int64_t n, int64_t k, const float *x, int64_t m, float *y,
                        int32_t isa, int32_t threads) {
  if (w == nullptr || x == nullptr || y == nullptr || n < 1 || k < 1 || m < 1 || threads < 1) return TL_BAD_ARGUMENT;
  if (dtype < TL_FLOAT32 || dtype > TL_FLOAT16) return TL_BAD_ARGUMENT;
  if (isa < TL_PORTABLE || isa > TL_NEON_DOTPROD || !(tl_supported() >> isa & 1)) return TL_UNSUPPORTED_CPU;
  const DecoderMath &math = math_of(isa);
  const int64_t rows = std::max<int64_t>(1, kItemBytes / (k * dtype_bytes(dtype)));
  parallel(threads, (n + rows - 1) / rows, [&](int64_t item, int) {
    const int64_t from = item * rows, to = std::min(n, from + rows);
    for (int64_t i = 0; i < m; i++) math.float_rows(w, dtype, k, from, to, x + i * k, y + i * n);
  });
  return TL_OK;
}

}  // namespace
}  // namespace transload

extern "C" int32_t tl_float_product(const void *w, int32_t dtype, int64_t n, int64_t k, const float *x, int64_t m,
                                    float *y, int32_t isa, int32_t threads) {
  return transload::float_product(w, dtype, n, k, x, m, y, isa, threads);
}

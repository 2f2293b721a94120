// AVX2 with FMA and F16C: x86 since 2013 (Intel) and 2015 (AMD).
#include "kernel_256.h"

namespace transload {

const Isa avx2_isa = {"avx2",       kRows,        1, 8, 192 << 10, read_row,
                      quantize_row, multiply_each<multiply_tile>, store_row, nullptr, nullptr, widen, false};

}  // namespace transload

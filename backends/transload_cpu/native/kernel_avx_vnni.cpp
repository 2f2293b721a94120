// AVX-VNNI: the dot-product instruction on 256 bits, for cores without AVX512.
#include "kernel_256.h"

namespace transload {

const Isa avx_vnni_isa = {"avx-vnni",   kRows,        1, 8, 192 << 10, read_row,
                          quantize_row, multiply_each<multiply_tile>, store_row, nullptr, nullptr, widen, false};

}  // namespace transload

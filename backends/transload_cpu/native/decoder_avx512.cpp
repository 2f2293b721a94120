// AVX512.
#include "prompt_vectors.h"

namespace transload {

const DecoderMath avx512_math = TRANSLOAD_DECODER_MATH;

}  // namespace transload

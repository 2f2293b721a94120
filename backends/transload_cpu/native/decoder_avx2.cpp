// AVX2 with FMA.
#include "prompt_vectors.h"

namespace transload {

const DecoderMath avx2_math = TRANSLOAD_DECODER_MATH;

}  // namespace transload

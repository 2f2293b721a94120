// Plain C++, four floats at a time.
#include "prompt_vectors.h"

namespace transload {

const DecoderMath portable_math = TRANSLOAD_DECODER_MATH;

}  // namespace transload

// Plain C++, four floats at a time.
#include "decoder_vectors.h"

namespace transload {

const DecoderMath portable_math = TRANSLOAD_DECODER_MATH;

}  // namespace transload

// What one instruction set contributes: a table of functions. The driver in matmul.cpp chooses a table once per call.
#pragma once

#include "plan.h"

namespace transload {

// Tiles of one band: `count` tiles that follow each other, with rows[i] of plan.rows rows in use.
struct TileRun {
  Tile first;
  const int *rows;
  int count;
};

struct Isa {
  const char *name;
  int most_rows;       // rows of a full tile, even
  int row_step;        // a tile is laid out in a multiple of this
  int chunk;           // how activations of one row lie together in a tile (see Tile)
  int64_t band_bytes;  // quantized activations that a core keeps in its L2 cache while it walks over panels

  // x [k] of a float type, in the order of `order` when there is one, to float32 [kp] with zeros behind.
  void (*read_row)(const void *x, int32_t dtype, int64_t k, int64_t kp, const int32_t *order, float *out);

  // One token into its row of a tile, or into rows `row` and `row + 1` with split. bytes: scratch of 2 * kp.
  void (*quantize_row)(const Plan &plan, const float *x, int row, int8_t *bytes, const Tile &tile);

  // Tiles times one panel: out float32 [tokens of all tiles][32]; a tile has rows / 2 tokens with split.
  void (*multiply)(const Plan &plan, const Panel &panel, const TileRun &tiles, float *out);

  // out[i] + bias[i] for i < n as x's type. bias may be null.
  void (*store_row)(const float *out, const float *bias, int n, void *y, int64_t at, int32_t dtype);

  // Around every parallel region, on every thread; null when there is nothing to do.
  void (*enter)(const Plan &plan);
  void (*leave)();

  // Codes of 5 or 6 bits [steps][step_bytes] as codes of 8 bits [steps][256]. With `narrow`, multiply reads them itself.
  void (*widen)(int bits, const uint8_t *codes, int64_t steps, uint8_t *wide);
  bool narrow;
};

// isa.multiply for codes of any room. Where the table cannot read codes of 5 or 6 bits, and where several tiles would
// each unpack them again, the panel is widened first. Throws std::bad_alloc.
void multiply_panel(const Isa &isa, const Plan &plan, const Panel &panel, const TileRun &tiles, float *out);


extern const Isa portable_isa;
#if defined(__x86_64__)
extern const Isa avx2_isa, avx_vnni_isa, avx512_vnni_isa, avx512_bf16_isa, amx_isa;
#elif defined(__aarch64__)
extern const Isa dotprod_isa;
#endif

// The table to use on an instruction set, null when it was not compiled in or this CPU lacks it. With few rows, or
// segments that do not fill a tile, AMX hands over to AVX512.
const Isa *find_isa(int32_t isa, const Plan &plan, int64_t rows);

// The table for bfloat16 activations in place of `isa`, null where 15-bit integers are faster or nothing better is
// there: with few rows, unpacking to bfloat16 costs more than it saves. rows counts both rows of a token.
const Isa *find_bf16(const Isa &isa, const Plan &plan, int64_t rows, int32_t x_dtype);

#if defined(__x86_64__)
bool amx_suits(const Plan &plan, int64_t rows);
#endif

}  // namespace transload

// How one product is cut: segments of K, tiles of rows, and the memory of quantized activations.
//
// A segment is a run of inputs inside which weight scale and activation scale are constant. Its integer sums are exact
// and only then scaled. A segment has at most 256 inputs, so that a sum of int8 activations fits 16 bits (127 * 256)
// and a sum of 15-bit activations times 8-bit codes fits 32 (16256 * 255 * 256).
#pragma once

#include "layout.h"

namespace transload {

constexpr int64_t kLongestSegment = 256;

struct Plan {
  const Layout *weight;
  int64_t segment;             // inputs per segment, a multiple of 8; the last one may reach into the padding
  int64_t segments;            // ceil(k / segment)
  int64_t segments_per_group;  // of the weight
  int64_t act_group;           // inputs per activation scale
  bool split;                  // 15-bit activations: a token is two rows, value = 128 * upper + lower
  int rows;                    // rows of a tile, as laid out
  int chunk;                   // neighbouring inputs of one row that lie together
  int value_bytes;             // 1 for int8 activations, 2 for bfloat16
};

// False when weight groups and activation groups do not nest.
bool plan_of(const Layout &weight, int32_t act_bits, int64_t act_group, Plan *plan);

// Activations of up to plan.rows rows; with bfloat16 only q is used, as [kp / 2][rows][2] bfloat16:
//   q      int8  [kp / chunk][rows][chunk]
//   scale  float [segments][rows]   one step of the activation; with split the same for both rows of a token
//   sum    int32 [segments][rows]   sum of q over the segment
//   start  int32 [segments][rows]   -midpoint times that sum, where sums of products start; 0 for other kinds of zero
//   moment float [segments][rows]   scale times the sum of the whole activation; with split in the upper row only
struct Tile {
  int8_t *q;
  float *scale;
  int32_t *sum, *start;
  float *moment;
};

inline int64_t tile_bytes(const Plan &p) { return p.weight->kp * p.rows * p.value_bytes; }
inline int64_t tile_sides(const Plan &p) { return p.segments * p.rows; }

// The tile `index` places behind `first`.
inline Tile tile_after(const Plan &p, const Tile &first, int64_t index) {
  const int64_t side = index * tile_sides(p);
  return {first.q + index * tile_bytes(p), first.scale + side, first.sum + side, first.start + side,
          first.moment + side};
}

}  // namespace transload

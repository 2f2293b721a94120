#include "plan.h"

namespace transload {
namespace {

// The largest divisor of `length` that is a multiple of 8 and at most `limit`; `length` is a multiple of 8.
int64_t largest_part(int64_t length, int64_t limit) {
  for (int64_t parts = (length + limit - 1) / limit; parts < length / 8; parts++)
    if (length % parts == 0 && length / parts % 8 == 0) return length / parts;
  return 8;
}

}  // namespace

bool plan_of(const Layout &w, int32_t act_bits, int64_t act_group, Plan *out) {
  // A group that spans all of K can be cut anywhere: kp is a multiple of 64, and the padding is zero.
  const int64_t weight_group = w.geometry.group_size == -1 || w.geometry.group_size >= w.geometry.k
                                   ? w.kp : w.geometry.group_size;
  const bool whole_weight = weight_group == w.kp;
  Plan p{};
  p.weight = &w;
  p.split = act_bits == 16;
  if (p.split) act_group = whole_weight ? 128 : largest_part(weight_group, 128);
  const bool whole_row = act_group == -1 || act_group >= w.geometry.k;
  if (whole_row) act_group = w.kp;
  if (act_group < 1 || act_group % 8 != 0) return false;
  const int64_t small = act_group < weight_group ? act_group : weight_group;
  const int64_t large = act_group < weight_group ? weight_group : act_group;
  if (large % small != 0 && large < w.kp) return false;
  p.segment = whole_weight && whole_row ? (w.kp < kLongestSegment ? w.kp : kLongestSegment)
                                        : largest_part(small, kLongestSegment);
  p.segments = (w.geometry.k - 1) / p.segment + 1;
  p.segments_per_group = whole_weight ? p.segments : weight_group / p.segment;
  p.act_group = act_group;
  *out = p;
  return true;
}

}  // namespace transload

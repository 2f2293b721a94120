// Panels of 5-bit and 6-bit codes as panels of 8-bit codes, for kernels that have no loop for them.
#include "isa.h"
#include "narrow.h"
#include "scratch.h"

namespace transload {

void multiply_panel(const Isa &isa, const Plan &plan, const Panel &panel, const TileRun &tiles, float *out) {
  if (!is_narrow(plan.weight->geometry) || (isa.narrow && tiles.count == 1))
    return isa.multiply(plan, panel, tiles, out);
  static thread_local Scratch scratch;
  const Layout layout = widened(*plan.weight);
  Plan wide = plan;
  wide.weight = &layout;
  uint8_t *codes = scratch.reserve(static_cast<size_t>(layout.panel_codes));
  isa.widen(plan.weight->geometry.bits, panel.codes, layout.kp / 8, codes);
  isa.multiply(wide, {codes, panel.scales, panel.zeros}, tiles, out);
  scratch.release_large();
}

}  // namespace transload

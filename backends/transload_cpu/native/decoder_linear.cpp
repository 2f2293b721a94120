// Linear layers for one token: the activations are quantized once for all weights that take them alike, and the panels
// of all weights of a call are shared among threads together.
#include "decoder_linear.h"

#include <algorithm>

#include "parallel.h"

namespace transload {
namespace {

constexpr int64_t kItemBytes = 16 << 10;    // less is not worth handing out
constexpr int64_t kMostItems = 64;          // of one layer
constexpr int64_t kSerialBytes = 48 << 10;  // weights below this are not worth waking a second thread

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t panels_of(const Part &p) { return (p.linear.n + kPanel - 1) / kPanel; }

// A token's codes lie in one tile, its sides behind them: scale, sum, moment, and for every part where sums start.
int64_t tile_room(const Part &p) {
  return p.isa == nullptr ? 0 : aligned(tile_bytes(p.plan)) + 4 * aligned(tile_sides(p.plan) * 4);
}

bool quantized_alike(const Part &a, const Part &b) {
  if (a.isa == nullptr || b.isa != a.isa || a.layout.geometry.act_order || b.layout.geometry.act_order) return false;
  const Plan &p = a.plan, &q = b.plan;
  return a.layout.kp == b.layout.kp && p.segment == q.segment && p.segments == q.segments &&
         p.act_group == q.act_group && p.split == q.split && p.rows == q.rows && p.chunk == q.chunk &&
         a.layout.geometry.midpoint == b.layout.geometry.midpoint &&
         (a.layout.geometry.zero == TL_ZERO_MIDPOINT) == (b.layout.geometry.zero == TL_ZERO_MIDPOINT);
}

tl_status prepare_part(const tl_linear &linear, int32_t isa, Part *p) {
  p->linear = linear;
  if (linear.weight == nullptr || linear.n < 1 || linear.k < 1) return TL_BAD_ARGUMENT;
  if (linear.act_bits == 0) {
    p->isa = nullptr;
    return linear.float_dtype >= TL_FLOAT32 && linear.float_dtype <= TL_FLOAT16 ? TL_OK : TL_BAD_ARGUMENT;
  }
  const tl_status status = read_header(linear.weight, linear.weight_bytes, &p->layout);
  if (status != TL_OK) return status;
  const tl_geometry &g = p->layout.geometry;
  if (g.n != linear.n || g.k != linear.k || g.experts != linear.experts) return TL_BAD_ARGUMENT;
  if (linear.act_bits != 8 && linear.act_bits != 16) return TL_BAD_ARGUMENT;
  if (!plan_of(p->layout, linear.act_bits, linear.act_group, &p->plan)) return TL_BAD_ARGUMENT;
  const int rows = p->plan.split ? 2 : 1;
  p->isa = find_isa(isa, p->plan, rows);
  if (p->isa == nullptr) return TL_UNSUPPORTED_CPU;
  const int step = std::max(p->isa->row_step, rows);
  p->plan.rows = (rows + step - 1) / step * step;
  p->plan.chunk = p->isa->chunk;
  p->plan.value_bytes = 1;
  return TL_OK;
}

struct Call {
  const DecoderMath *math;
  const Product *products;
  Tile *tiles;  // of every part of every product
};

// Reads and quantizes x for a part into memory of tile_room; behind it lies scratch for one row.
Tile quantized(const Part &p, const float *x, uint8_t *memory) {
  const int64_t codes = aligned(tile_bytes(p.plan)), sides = aligned(tile_sides(p.plan) * 4), kp = p.layout.kp;
  const auto side = [&](int at) { return memory + codes + at * sides; };
  const Tile tile{reinterpret_cast<int8_t *>(memory), reinterpret_cast<float *>(side(0)),
                  reinterpret_cast<int32_t *>(side(1)), reinterpret_cast<int32_t *>(side(2)),
                  reinterpret_cast<float *>(side(3))};
  auto *floats = reinterpret_cast<float *>(memory + tile_room(p));
  auto *bytes = reinterpret_cast<int8_t *>(floats + kp);
  const auto *base = static_cast<const uint8_t *>(p.linear.weight);
  const auto *order = reinterpret_cast<const int32_t *>(base + p.layout.order_at);
  p.isa->read_row(x, TL_FLOAT32, p.linear.k, kp, p.layout.geometry.act_order ? order : nullptr, floats);
  p.isa->quantize_row(p.plan, floats, 0, bytes, tile);
  return tile;
}

// Fills c.tiles. A part shares the tile of the quantized part before it when both read the same x alike.
void quantize(const Call &c, int count, uint8_t *memory) {
  const Part *before = nullptr;
  const float *x = nullptr;
  Tile tile{}, *out = c.tiles;
  for (const Product *product = c.products; product < c.products + count; product++) {
    for (const auto &part : product->linear->parts) {
      const Part &p = *part;
      if (p.isa != nullptr && !(before != nullptr && x == product->x && quantized_alike(*before, p))) {
        tile = quantized(p, product->x, memory);
        memory += tile_room(p);
      }
      if (p.isa != nullptr) before = &p, x = product->x;
      *out++ = tile;
    }
  }
}

void multiply_panels(const DecoderMath &math, const Part &p, const Tile &tile, const Product &product, int64_t first,
                     int64_t last, float *y) {
  const int64_t n = p.linear.n, k = p.linear.k, expert = product.expert, end = std::min(last * kPanel, n);
  if (p.isa == nullptr) {
    const auto *weight = static_cast<const uint8_t *>(p.linear.weight);
    const int64_t skipped = expert * n * k * dtype_bytes(p.linear.float_dtype);
    math.float_rows(weight + skipped, p.linear.float_dtype, k, first * kPanel, end, product.x, y);
  } else {
    const int rows = p.plan.split ? 2 : 1;
    const TileRun run{tile, &rows, 1};
    alignas(64) float out[kPanel];
    for (int64_t panel = first; panel < last; panel++) {
      multiply_panel(*p.isa, p.plan, panel_at(p.layout, p.linear.weight, expert, panel), run, out);
      std::copy_n(out, std::min<int64_t>(kPanel, n - panel * kPanel), y + panel * kPanel);
    }
  }
  if (p.linear.bias == nullptr) return;
  const float *bias = p.linear.bias + expert * n;
  for (int64_t i = first * kPanel; i < end; i++) y[i] += bias[i];
}

// Items are counted through all products, panels of a layer through all its parts; an item is a run of them.
void multiply_item(const Call &c, int64_t item) {
  const Product *product = c.products;
  const Tile *tile = c.tiles;
  for (; item >= product->linear->items; product++) {
    item -= product->linear->items;
    tile += product->linear->parts.size();
  }
  const Linear &l = *product->linear;
  int64_t first = item * l.item_panels, last = first + l.item_panels;
  float *y = product->y;
  for (size_t i = 0; i < l.parts.size() && last > 0; i++, tile++) {
    const Part &p = *l.parts[i];
    const int64_t panels = panels_of(p);
    if (first < panels)
      multiply_panels(*c.math, p, *tile, *product, std::max<int64_t>(first, 0), std::min(last, panels), y);
    first -= panels;
    last -= panels;
    y += p.linear.n;
  }
}

}  // namespace

tl_status prepare(const tl_linear *parts, int count, int64_t n, int64_t k, int64_t experts, int32_t isa, Linear *out) {
  int64_t outputs = 0, panels = 0;
  out->bytes = 0;
  for (int i = 0; i < count; i++) {
    auto p = std::make_unique<Part>();
    const tl_status status = prepare_part(parts[i], isa, p.get());
    if (status != TL_OK) return status;
    if (parts[i].k != k || parts[i].experts != experts || parts[i].n > n - outputs) return TL_BAD_ARGUMENT;
    p->plan.weight = &p->layout;
    outputs += parts[i].n;
    panels += panels_of(*p);
    out->bytes += p->isa == nullptr ? parts[i].n * k * dtype_bytes(parts[i].float_dtype) : p->layout.total / experts;
    out->parts.push_back(std::move(p));
  }
  if (outputs != n || count < 1) return TL_BAD_ARGUMENT;
  out->n = n;
  out->k = k;
  const int64_t items = std::clamp<int64_t>(out->bytes / kItemBytes, 1, kMostItems);
  out->item_panels = (panels + items - 1) / items;
  out->items = (panels + out->item_panels - 1) / out->item_panels;
  return TL_OK;
}

int64_t scratch_bytes(const Linear &linear) {
  int64_t bytes = aligned(static_cast<int64_t>(linear.parts.size() * sizeof(Tile)));
  int64_t row = 0;
  for (const auto &p : linear.parts) {
    if (p->isa == nullptr) continue;
    bytes += tile_room(*p);
    row = std::max(row, aligned(p->layout.kp * 6));
  }
  return bytes + row;
}

void multiply(const DecoderMath &math, const Product *products, int count, uint8_t *scratch, int threads) {
  const Call call{&math, products, reinterpret_cast<Tile *>(scratch)};
  int64_t items = 0, bytes = 0, tiles = 0;
  for (int i = 0; i < count; i++) {
    items += products[i].linear->items;
    bytes += products[i].linear->bytes;
    tiles += static_cast<int64_t>(products[i].linear->parts.size());
  }
  quantize(call, count, scratch + aligned(tiles * static_cast<int64_t>(sizeof(Tile))));
  if (bytes < kSerialBytes) threads = 1;
  parallel(threads, items, [&](int64_t item, int) { multiply_item(call, item); });
}

}  // namespace transload

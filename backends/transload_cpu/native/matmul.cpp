// The driver of every product: checks the call, quantizes the activations, and shares panels and rows among threads.
//
// Rows are cut into tiles, tiles of one expert are gathered into bands that fit the L2 cache, and panels into chunks.
// A work item is one band times one chunk; threads take items as they finish (a busy core takes fewer). The threads that
// come to a band first quantize its activations together.
#include <algorithm>
#include <exception>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "product.h"
#include "scratch.h"

namespace transload {
namespace {

constexpr int64_t kItemsPerThread = 8;          // enough to even out a core that is slowed down
constexpr int64_t kSerialBytes = 96 << 10;      // weights below this are not worth waking a second thread

// Some rows of one expert: a tile of quantized activations, or a run of tiles.
struct Rows {
  int64_t expert, first, tokens;
};

struct Band {
  int64_t first_tile, tiles;
};

struct Work {
  const tl_product *call;
  Output output;
  const Isa *isa;
  Plan plan;
  std::vector<Rows> tiles;
  std::vector<int> tile_rows;  // of every tile, rows in use
  std::vector<Band> bands;
  mutable std::vector<Stage> quantized;  // of every band
  int64_t chunk, chunks;  // panels per chunk, chunks per band
  int threads;
  int8_t *q;              // all tiles, one after the other
  float *scale, *moment;
  int32_t *sum, *start;
  uint8_t *row_memory;    // per thread: float [kp], int8 [2 * kp]
  float *out;             // per thread: [rows of the largest band][32]
  int64_t out_floats;

  Tile tile(int64_t index) const { return tile_after(plan, {q, scale, sum, start, moment}, index); }
  int64_t tokens_per_tile() const { return plan.split ? plan.rows / 2 : plan.rows; }
};

void cut_rows(Work &w) {
  const int64_t experts = w.plan.weight->geometry.experts, most = w.tokens_per_tile();
  const int64_t per_band = std::max<int64_t>(1, w.isa->band_bytes / tile_bytes(w.plan));
  const auto tiles = static_cast<size_t>(w.call->m / most + std::min(experts, w.call->m));
  w.tiles.reserve(tiles), w.tile_rows.reserve(tiles);  // more than there is fails here, before memory fills
  int64_t row = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t end = row + (w.call->counts ? w.call->counts[e] : w.call->m);
    const auto first = static_cast<int64_t>(w.tiles.size());
    for (; row < end; row += most) {
      const int64_t tokens = std::min(most, end - row);
      w.tiles.push_back({e, row, tokens});
      w.tile_rows.push_back(static_cast<int>(w.plan.split ? 2 * tokens : tokens));
    }
    row = end;
    const auto last = static_cast<int64_t>(w.tiles.size());
    const int64_t bands = (last - first + per_band - 1) / per_band;  // all of about the same size
    for (int64_t b = 0; b < bands; b++) {
      const int64_t from = first + (last - first) * b / bands, to = first + (last - first) * (b + 1) / bands;
      w.bands.push_back({from, to - from});
    }
  }
}

void cut_panels(Work &w) {
  const Layout &weight = *w.plan.weight;
  const auto bands = static_cast<int64_t>(w.bands.size());
  if (weight.panel_codes * weight.panels * bands < kSerialBytes) w.threads = 1;
  const int64_t visits = weight.panels * bands;
  w.chunk = std::clamp<int64_t>(visits / (w.threads * kItemsPerThread), 1, weight.panels);
  w.chunks = (weight.panels + w.chunk - 1) / w.chunk;
}

void reserve_memory(Work &w, Scratch &scratch) {
  const auto tiles = static_cast<size_t>(w.tiles.size());
  const auto up = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const size_t values = up(tiles * static_cast<size_t>(tile_bytes(w.plan)));
  const size_t sides = up(tiles * static_cast<size_t>(tile_sides(w.plan)) * 4);
  const size_t rows = static_cast<size_t>(w.plan.weight->kp) * 6 * static_cast<size_t>(w.threads);
  int64_t most_tiles = 0;
  for (const Band &band : w.bands) most_tiles = std::max(most_tiles, band.tiles);
  w.out_floats = most_tiles * w.plan.rows * kPanel;
  const size_t out = static_cast<size_t>(w.out_floats) * 4 * static_cast<size_t>(w.threads);
  uint8_t *at = scratch.reserve(values + 4 * sides + out + up(rows));
  w.q = reinterpret_cast<int8_t *>(at);
  w.scale = reinterpret_cast<float *>(at + values);
  w.moment = reinterpret_cast<float *>(at + values + sides);
  w.sum = reinterpret_cast<int32_t *>(at + values + 2 * sides);
  w.start = reinterpret_cast<int32_t *>(at + values + 3 * sides);
  w.out = reinterpret_cast<float *>(at + values + 4 * sides);
  w.row_memory = at + values + 4 * sides + out;
}

const int32_t *order_of(const Work &w) {
  const Layout &weight = *w.plan.weight;
  const auto *base = static_cast<const uint8_t *>(w.call->packed);
  return weight.geometry.act_order ? reinterpret_cast<const int32_t *>(base + weight.order_at) : nullptr;
}

// Quantizes one token. Slots count places in tiles; a tile that is not full leaves its last slots empty.
void quantize_slot(const Work &w, int64_t slot, int worker) {
  const Layout &weight = *w.plan.weight;
  const int64_t index = slot / w.tokens_per_tile(), i = slot % w.tokens_per_tile();
  const Rows rows = w.tiles[static_cast<size_t>(index)];
  if (i >= rows.tokens) return;
  uint8_t *memory = w.row_memory + worker * weight.kp * 6;
  auto *floats = reinterpret_cast<float *>(memory);
  auto *bytes = reinterpret_cast<int8_t *>(memory + weight.kp * 4);
  const int64_t row_bytes = w.call->x_stride * dtype_bytes(w.call->x_dtype);
  const auto *x = static_cast<const uint8_t *>(w.call->x) + (rows.first + i) * row_bytes;
  const int row = static_cast<int>(w.plan.split ? 2 * i : i);
  const bool as_it_is = w.call->x_dtype == TL_FLOAT32 && !weight.geometry.act_order && weight.geometry.k == weight.kp &&
                        reinterpret_cast<uintptr_t>(x) % alignof(float) == 0;
  if (!as_it_is) w.isa->read_row(x, w.call->x_dtype, weight.geometry.k, weight.kp, order_of(w), floats);
  w.isa->quantize_row(w.plan, as_it_is ? reinterpret_cast<const float *>(x) : floats, row, bytes, w.tile(index));
}

void multiply_item(const Work &w, int64_t item, int worker) {
  const Layout &weight = *w.plan.weight;
  const Band band = w.bands[static_cast<size_t>(item / w.chunks)];
  const Rows &head = w.tiles[static_cast<size_t>(band.first_tile)];
  const Rows &tail = w.tiles[static_cast<size_t>(band.first_tile + band.tiles - 1)];
  const int64_t tokens = tail.first + tail.tokens - head.first, n = weight.geometry.n;
  const TileRun run{w.tile(band.first_tile), w.tile_rows.data() + band.first_tile, static_cast<int>(band.tiles)};
  float *out = w.out + worker * w.out_floats;
  const int64_t first = item % w.chunks * w.chunk, last = std::min(first + w.chunk, weight.panels);
  for (int64_t panel = first; panel < last; panel++) {
    const int64_t column = panel * kPanel;
    const int outputs = static_cast<int>(std::min<int64_t>(kPanel, n - column));
    const float *bias = w.call->bias ? w.call->bias + head.expert * n + column : nullptr;
    multiply_panel(*w.isa, w.plan, panel_at(weight, w.call->packed, head.expert, panel), run, out);
    const Output &to = w.output;
    for (int64_t i = 0; i < tokens; i++)
      w.isa->store_row(out + i * kPanel, bias, outputs, to.y, (head.first + i) * to.stride + column, to.dtype);
  }
}

void run(Work &w) {
  const int64_t per_tile = w.tokens_per_tile();
  w.quantized = std::vector<Stage>(w.bands.size());
  for (size_t b = 0; b < w.bands.size(); b++)
    w.quantized[b].reset(static_cast<uint32_t>(w.bands[b].tiles * per_tile));
  share(w.threads, static_cast<int64_t>(w.bands.size()) * w.chunks, [&](Share &mine) {
    if (w.isa->enter) w.isa->enter(w.plan);
    for (int64_t item; mine.next(&item);) {
      const auto band = static_cast<size_t>(item / w.chunks);
      const int64_t first = w.bands[band].first_tile * per_tile;
      w.quantized[band].complete([&](int64_t i) { quantize_slot(w, first + i, mine.worker); });
      multiply_item(w, item, mine.worker);
    }
    if (w.isa->leave) w.isa->leave();
  });
}

// Whether m rows of `row` elements lie inside an address space.
bool addressable(int64_t m, int64_t row) {
  int64_t elements;
  return row >= 0 && !__builtin_mul_overflow(m, row, &elements) && elements < int64_t(1) << 56;
}

// Rows can be addressed, and counts add up to m.
bool valid(const tl_product &c, const Output &output, const Layout &w) {
  if (c.m < 0 || (c.m > 0 && (!c.x || !output.y)) || c.threads < 1) return false;
  if (c.x_dtype < TL_FLOAT32 || c.x_dtype > TL_FLOAT16) return false;
  if ((c.act_bits != 8 && c.act_bits != 16) || (c.m > 1 && c.x_stride < w.geometry.k)) return false;
  if (c.m > 1 && (!addressable(c.m, c.x_stride) || !addressable(c.m, output.stride))) return false;
  if (!c.counts) return w.geometry.experts == 1;
  int64_t rows = 0;
  for (int64_t e = 0; e < w.geometry.experts; e++) {
    if (c.counts[e] < 0 || c.counts[e] > c.m - rows) return false;
    rows += c.counts[e];
  }
  return rows == c.m;
}

// The most rows that one expert has.
int64_t most_rows(const tl_product &c, const Plan &p) {
  const int64_t experts = p.weight->geometry.experts;
  return (c.counts ? *std::max_element(c.counts, c.counts + experts) : c.m) * (p.split ? 2 : 1);
}

// Rows of a tile: as many tiles as it takes, all of about the same height.
int rows_of_tile(const Isa &isa, const Plan &p, int64_t rows) {
  const int64_t step = std::max(isa.row_step, p.split ? 2 : 1);
  const int64_t tiles = (rows + isa.most_rows - 1) / isa.most_rows, even = (rows + tiles - 1) / tiles;
  return static_cast<int>((even + step - 1) / step * step);
}

tl_status multiply_rows(const tl_product &call, const Output &output, const Layout &layout) {
  if (!valid(call, output, layout)) return TL_BAD_ARGUMENT;
  Work w{};
  w.call = &call;
  w.output = output;
  if (!plan_of(layout, call.act_bits, call.act_group, &w.plan)) return TL_BAD_ARGUMENT;
  int64_t rows = most_rows(call, w.plan);
  w.isa = find_isa(call.isa, w.plan, rows);
  if (w.isa == nullptr) return TL_UNSUPPORTED_CPU;
  w.plan.value_bytes = 1;
  if (const Isa *dense = find_bf16(*w.isa, w.plan, rows, call.x_dtype)) {
    w.isa = dense;
    w.plan.split = false;
    w.plan.value_bytes = 2;
    rows /= 2;
  }
  if (rows == 0) return TL_OK;
  w.plan.rows = rows_of_tile(*w.isa, w.plan, rows);
  w.plan.chunk = w.isa->chunk;
  w.threads = call.threads;
  static thread_local Scratch scratch;
  cut_rows(w);
  cut_panels(w);
  reserve_memory(w, scratch);
  run(w);
  scratch.release_large();
  return TL_OK;
}

// A plain result: rows of the weight's outputs, of x's type.
tl_status multiply_all(const tl_product &call) {
  Layout layout;
  const tl_status status = read_header(call.packed, call.packed_bytes, &layout);
  if (status != TL_OK) return status;
  return multiply_rows(call, {call.y, layout.geometry.n, call.x_dtype}, layout);
}

}  // namespace

tl_status multiply_rows(const tl_product &call, const Output &output) {
  Layout layout;
  const tl_status status = read_header(call.packed, call.packed_bytes, &layout);
  return status == TL_OK ? multiply_rows(call, output, layout) : status;
}

}  // namespace transload

extern "C" int32_t tl_matmul(const tl_product *product) {
  if (product == nullptr) return TL_BAD_ARGUMENT;
  try {
    return transload::multiply_all(*product);
  } catch (const std::exception &) {  // bad_alloc, or length_error for more than a vector can ever hold
    return TL_OUT_OF_MEMORY;
  }
}

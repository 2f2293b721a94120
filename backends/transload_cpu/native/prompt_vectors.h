// Attention of many tokens at once, in the vectors of decoder_vectors.h. Unnamed namespace: see floats.h.
//
// Rows are pairs of a token and a query head, token by token. Keys are taken in blocks, turned so that a vector holds
// neighbouring tokens; a tile of rows then reads every vector once for all of its rows, and keeps a running largest score,
// sum and weighted values. Blocks start at multiples of kKeys: what a row's result is does not depend on its neighbours.
#pragma once

#include "decoder_vectors.h"

namespace transload {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 12;  // rows: 12 * 2 vectors of sums leave 8 of 32 registers for operands
#else
constexpr int kTile = 6;   // 6 * 2 of 16
#endif
constexpr int kKeys = 128;          // tokens of a block
constexpr int kPair = 2 * kLanes;   // columns that a tile sums at once
constexpr float kLowest = -3.0e38f; // below any score that counts

#define TL_INLINE inline __attribute__((always_inline))

inline int64_t padded(int64_t dim) { return (dim + kPair - 1) / kPair * kPair; }
inline int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

// Memory of one worker, in floats.
struct PromptRoom {
  float *q;       // [rows][dim]
  float *keys;    // [dim][kKeys]
  float *values;  // [kKeys][padded dim]
  float *scores;  // [kTile][kKeys]
  float *out;     // [rows][padded dim]
  float *largest, *sum;  // [rows]
};

int64_t prompt_floats(int64_t rows, int64_t dim) {
  const int64_t all = tiles_of(rows) * kTile;
  return all * dim + dim * kKeys + kKeys * padded(dim) + kTile * kKeys + all * padded(dim) + 2 * all;
}

inline PromptRoom room_of(float *memory, int64_t rows, int64_t dim) {
  const int64_t all = tiles_of(rows) * kTile;
  PromptRoom r{};
  r.out = memory;
  r.values = r.out + all * padded(dim);
  r.keys = r.values + kKeys * padded(dim);
  r.scores = r.keys + dim * kKeys;
  r.q = r.scores + kTile * kKeys;
  r.largest = r.q + all * dim;
  r.sum = r.largest + all;
  return r;
}

// out[r][0 .. kPair) (+)= sum over i < count of a[r][i] * b[i][0 .. kPair), for the rows of a tile.
template <bool ADD>
TL_INLINE void multiply_pair(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t count,
                             float *out, int64_t out_stride) {
  Vector sums[kTile][2];
  unroll<kTile>([&](auto r) {
    sums[r][0] = ADD ? load(out + r * out_stride) : Vector{};
    sums[r][1] = ADD ? load(out + r * out_stride + kLanes) : Vector{};
  });
  for (int64_t i = 0; i < count; i++, b += b_stride) {
    const Vector left = load(b), right = load(b + kLanes);
    unroll<kTile>([&](auto r) {
      const Vector x = all(a[r * a_stride + i]);
      sums[r][0] += x * left;
      sums[r][1] += x * right;
    });
  }
  unroll<kTile>([&](auto r) {
    save(sums[r][0], out + r * out_stride);
    save(sums[r][1], out + r * out_stride + kLanes);
  });
}

// The lanes of two vectors by turns: the first half of them, or the second.
template <int FROM, int... I>
TL_INLINE Vector by_turns(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, Integers{(FROM + I / 2 + I % 2 * kLanes)...});
}

// kLanes rows of kLanes values, `stride` apart, as columns. Taking the first and the second half of all rows by turns,
// as often as kLanes can be halved, turns a square.
template <class T>
TL_INLINE void turn(const T *from, int64_t stride, float *to, int64_t to_stride) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  Vector a[kLanes], b[kLanes];
  unroll<kLanes>([&](auto i) { a[i] = load(from + i * stride); });
  for (int halves = kLanes; halves > 1; halves /= 4) {
    unroll<kLanes / 2>([&](auto i) {
      b[2 * i] = by_turns<0>(a[i], a[i + kLanes / 2], lanes);
      b[2 * i + 1] = by_turns<kLanes / 2>(a[i], a[i + kLanes / 2], lanes);
    });
    if (halves == 2) {
      unroll<kLanes>([&](auto i) { a[i] = b[i]; });
      break;
    }
    unroll<kLanes / 2>([&](auto i) {
      a[2 * i] = by_turns<0>(b[i], b[i + kLanes / 2], lanes);
      a[2 * i + 1] = by_turns<kLanes / 2>(b[i], b[i + kLanes / 2], lanes);
    });
  }
  unroll<kLanes>([&](auto i) { save(a[i], to + i * to_stride); });
}

// Tokens [first, first + count) into place.
template <class T>
void read_block(const PromptAttention &a, int64_t first, int64_t count, const PromptRoom &m) {
  const int64_t dim = a.dim, width = padded(dim), squares = dim / kLanes * kLanes;
  const T *keys = static_cast<const T *>(a.keys) + first * dim;
  const T *values = static_cast<const T *>(a.values) + first * dim;
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes)
    for (int64_t d = 0; d < squares; d += kLanes) turn(keys + t * dim + d, dim, m.keys + d * kKeys + t, kKeys);
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = i < t ? squares : 0; d < dim; d++) m.keys[d * kKeys + i] = one(keys + i * dim + d);
  for (int64_t i = 0; i < count; i++) {
    float *to = m.values + i * width;
    for (int64_t d = 0; d < squares; d += kLanes) save(load(values + i * dim + d), to + d);
    for (int64_t d = squares; d < width; d++) to[d] = d < dim ? one(values + i * dim + d) : 0.f;
  }
}

// Tokens of the block that a row sees: [from, to), counted from the block's first.
struct Seen {
  int64_t from, to;
};

inline Seen seen_by(const PromptAttention &a, int64_t row, int64_t block) {
  const int64_t last = a.first + row / a.queries - block, start = a.window > 0 ? last + 1 - a.window : 0;
  const int64_t to = last + 1 < kKeys ? last + 1 : kKeys, from = start > 0 ? start : 0;
  return from < to ? Seen{from, to} : Seen{0, 0};
}

// Scores of one row become weights; its sums so far are scaled to the new largest score.
inline void weigh(float *scores, Seen s, int64_t width, float *largest, float *sum, float *out) {
  if (s.from >= s.to) return;
  float top = *largest;
  Vector tops = all(top);
  int64_t t = s.from;
  for (; t + kLanes <= s.to; t += kLanes) {
    const Vector score = load(scores + t);
    tops = score > tops ? score : tops;
  }
  for (int i = 0; i < kLanes; i++) top = tops[i] > top ? tops[i] : top;
  for (; t < s.to; t++) top = scores[t] > top ? scores[t] : top;
  float added = 0;
  t = s.from;
  Vector weights{};
  for (; t + kLanes <= s.to; t += kLanes) {
    const Vector weight = exponential(load(scores + t) - top);
    save(weight, scores + t);
    weights += weight;
  }
  for (; t < s.to; t++) added += scores[t] = exponential(scores[t] - top);
  if (top > *largest) {
    const float share = *largest == kLowest ? 0.f : exponential(*largest - top);
    for (int64_t d = 0; d < width; d++) out[d] *= share;
    *sum *= share;
    *largest = top;
  }
  *sum += added + total(weights);
}

// Adds what a tile's rows see of the block. Tokens that all of them see are multiplied together; for those that only some
// see, every row adds its own: a weight of zero would still spread a NaN.
inline void attend_tile(const PromptAttention &a, const PromptRoom &m, int64_t tile, int64_t rows, int64_t block) {
  const int64_t first = tile * kTile, count = rows - first < kTile ? rows - first : kTile, width = padded(a.dim);
  Seen seen[kTile], common{0, kKeys};
  int64_t end = 0;
  for (int64_t r = 0; r < count; r++) {
    seen[r] = seen_by(a, first + r, block);
    common.from = seen[r].from > common.from ? seen[r].from : common.from;
    common.to = seen[r].to < common.to ? seen[r].to : common.to;
    end = seen[r].to > end ? seen[r].to : end;
  }
  if (end == 0) return;
  float *out = m.out + first * width;
  for (int64_t t = 0; t < end; t += kPair)
    multiply_pair<false>(m.q + first * a.dim, a.dim, m.keys + t, kKeys, a.dim, m.scores + t, kKeys);
  for (int64_t r = 0; r < count; r++)
    weigh(m.scores + r * kKeys, seen[r], width, m.largest + first + r, m.sum + first + r, out + r * width);
  if (common.from >= common.to) common = {end, end};
  for (int64_t d = 0; d < width && common.from < common.to; d += kPair)
    multiply_pair<true>(m.scores + common.from, kKeys, m.values + common.from * width + d, width,
                        common.to - common.from, out + d, width);
  for (int64_t r = 0; r < count; r++) {
    const auto add = [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; t++)
        for (int64_t d = 0; d < width; d += kLanes)
          save(load(out + r * width + d) + load(m.values + t * width + d) * m.scores[r * kKeys + t], out + r * width + d);
    };
    add(seen[r].from, seen[r].to < common.from ? seen[r].to : common.from);
    add(seen[r].from > common.to ? seen[r].from : common.to, seen[r].to);
  }
}

void attend_many(const PromptAttention &a, float *memory) {
  const int64_t rows = a.tokens * a.queries, all_rows = tiles_of(rows) * kTile, width = padded(a.dim);
  const PromptRoom m = room_of(memory, rows, a.dim);
  for (int64_t r = 0; r < all_rows; r++) {
    const float *q = a.q + r / a.queries * a.q_stride + r % a.queries * a.dim;
    for (int64_t d = 0; d < a.dim; d++) m.q[r * a.dim + d] = r < rows ? q[d] : 0.f;
    m.largest[r] = kLowest;
    m.sum[r] = 0;
  }
  for (int64_t i = 0; i < all_rows * width; i++) m.out[i] = 0;
  const int64_t end = a.first + a.tokens, start = a.window > 0 && a.first + 1 > a.window ? a.first + 1 - a.window : 0;
  for (int64_t block = start / kKeys * kKeys; block < end; block += kKeys) {
    const int64_t count = end - block < kKeys ? end - block : kKeys;
    if (a.cache_dtype == TL_BFLOAT16)
      read_block<uint16_t>(a, block, count, m);
    else
      read_block<float>(a, block, count, m);
    for (int64_t tile = 0; tile < tiles_of(rows); tile++) attend_tile(a, m, tile, rows, block);
  }
  for (int64_t r = 0; r < rows; r++) {
    float *to = a.out + r / a.queries * a.out_stride + r % a.queries * a.dim;
    for (int64_t d = 0; d < a.dim; d++) to[d] = m.out[r * width + d] / m.sum[r];
  }
}

#undef TL_INLINE

}  // namespace
}  // namespace transload

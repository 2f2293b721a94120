// A stretch of a prompt on its way through a decoder.
#pragma once

#include <algorithm>

#include "decoder_run.h"
#include "parallel.h"

namespace transload {

// Some tokens, and the memory that they use.
struct Stretch {
  const Decoder *decoder;
  const tl_decoder_prompt *call;
  int64_t first, count;     // of the call's tokens
  float *x, *normed;        // [count][hidden]
  float *qkv, *attended;    // [count][all heads * dim], [count][query heads * dim]
  float *gate_up;           // [count][2 * width]
  float *rooms;             // of attention, for every thread
  int64_t room, tokens_per_item;
  // Of layers with experts:
  float *results;           // [count * branches][hidden]: the MLP's, then those of experts, sorted by expert
  float *logits, *gates;    // [count][experts]; [count], of the MLP beside the experts
  Choice *choices;          // [count][2 * experts]: first those that were chosen
  int64_t *rows;            // [count][top_k]: place of each choice among the rows of experts
  int64_t *experts;         // [2 * experts]: first the rows of each
};

// Rows of x, and where their results go, each `stride` values apart.
struct Rows {
  const float *x;
  int64_t x_stride, count;
  float *y;
  int64_t y_stride;
  const int64_t *experts;  // rows of each expert, which follow each other; null for a plain linear
};

constexpr int64_t kRowsPerItem = 8;  // of everything that is done row by row

// body(row) for every row.
template <class Body>
void each_row(int threads, int64_t rows, const Body &body) {
  parallel(threads, (rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item, int) {
    const int64_t last = std::min(rows, (item + 1) * kRowsPerItem);
    for (int64_t row = item * kRowsPerItem; row < last; row++) body(row);
  });
}

// y = W x + bias for all rows. The outputs of the layer's parts follow each other.
tl_status multiply(const Stretch &p, const Linear &linear, const Rows &rows);

// normed = what the layer's MLP and its experts make of normed.
tl_status run_mlp(const Stretch &p, const DecoderLayer &layer);

}  // namespace transload

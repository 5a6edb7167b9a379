// The count sketch of formed gradients: the last step of project_gradients of linear layers with
// kind sketch (formed_sketch.cpp).
#pragma once

#include <cstdint>

#include "cpu/signs.h"
#include "kernels.h"
#include "scratch.h"

namespace tracmod::cpu {

constexpr int64_t kSketchExamples = 64;  // examples that are sketched together

// A column that is not part of a whole group: it goes `lane` sums behind the position of hash
// `number`.
struct SketchSingle {
  int32_t column, number, lane;
};

struct SketchPlan {
  int64_t rows;            // of a gradient
  int64_t columns, width;  // I + bias, and the same padded to whole vectors
  int64_t size;            // K
  int64_t hashes;          // of a row
  int64_t band;            // rows that are hashed together
  float* column_signs;     // (columns,), with the scale of R_out
  float* x;                // (tokens of a wave, width), with the signs of the columns
  uint32_t* buckets;       // (band, hashes), as sketch_buckets writes them
  SketchGroup* groups;     // whole groups of 16 columns
  SketchSingle* singles;   // all other columns
  int64_t group_count, single_count;
  float* sums;    // (examples, K + 16)
  float* formed;  // (threads, a few rows, width)
};

// `rows` is the number of rows of the gradient that is sketched, `wave` the tokens of a wave.
SketchPlan plan_sketch(Scratch& scratch, const Gradients& gradients, const Projection& projection,
                       int64_t rows, int64_t wave, int threads);

// Fills what all waves share.
void begin_sketches(const Projection& projection, SketchPlan& plan, int threads);

// out[b] += sketch of sum_s q_s [x_s, 1]^T for the examples [first, end), at most kSketchExamples.
// Their read tokens are the rows of q (tokens, ldq); starts is that of rows.h.
void add_sketches(const Gradients& gradients, const Projection& projection, const SketchPlan& plan,
                  const int64_t* starts, int64_t first, int64_t end, const float* q, int64_t ldq,
                  float* out, int64_t stride, int threads);

}  // namespace tracmod::cpu

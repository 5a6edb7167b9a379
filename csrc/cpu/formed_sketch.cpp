// out[b, 0 : K] += the count sketch of a gradient G_b = sum_s q_bs [x_bs, 1]^T (random.h), which is
// formed. q is g itself, for layers at which an example has one token or a few, or g reduced to a few
// rows by R_out.
//
// G has R (I + 1) numbers, and each is multiplied by its sign and added to one of K sums. 16
// neighbours of a row share a hash and go to 16 consecutive sums, so they take one load, one
// multiply-add with q_r times the group's sign, and one store. The signs of columns are applied to
// x, once per token.
//
// Work: up to 64 examples at a time. For a band of rows, an item hashes the groups of a row, for all
// examples; then an item is an example, which adds the band to its own K + 16 sums. A group may run
// over the last sum; the sums behind it belong to the first ones. With one token, a row of G is x
// times q_r and is not written out; with more, 24 rows at a time are, by add_product.
//
// Operations: S R (I + 1) multiply-adds per example to form G, R (I + 1) to sketch it, and R (I + 1)
// / 16 hashes for all examples. The sums stay in the first-level cache. Their loads and stores, at
// any address and so mostly across two cache lines, are the limit of the sketch: 0.1 ns per number,
// measured. Hashing each number singly takes about 1 ns.
#include "cpu/formed_sketch.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/signs.h"
#include "cpu/sketch.h"
#include "cpu/tiles.h"
#include "random.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kBandHashes = 8192;  // hashes of a band
constexpr int64_t kFormedRows = 24;    // rows of a gradient that are written out together

int64_t number_of(const int64_t* numbers, int64_t i) { return numbers == nullptr ? i : numbers[i]; }

// Whether the 16 columns from i on are one whole group. Columns that were left out break up groups.
bool whole_group(const int64_t* numbers, int64_t i, int64_t columns) {
  if (i + kSparseGroup > columns || number_of(numbers, i) % kSparseGroup != 0) return false;
  for (int64_t l = 1; numbers != nullptr && l < kSparseGroup; ++l) {
    if (numbers[i + l] != numbers[i] + l) return false;
  }
  return true;
}

void list_columns(const Projection& projection, SketchPlan& plan) {
  const int64_t* numbers = projection.input_columns;
  const uint64_t stream = stream_of(projection.seed, projection.input_key);
  const double scale =
      projection.rows == 0 ? 1.0 : 1.0 / std::sqrt(static_cast<double>(projection.rows));
  for (int64_t i = 0; i < plan.columns; ++i) {
    plan.column_signs[i] =
        static_cast<float>(scale) * sign_of(step(stream, number_of(numbers, i)));
  }
  for (int64_t i = 0; i < plan.columns;) {
    const int64_t number = number_of(numbers, i);
    const auto hash = static_cast<int32_t>(formed_hash_number(number, plan.size));
    const auto column = static_cast<int32_t>(i);
    if (plan.size >= kSparseGroup && whole_group(numbers, i, plan.columns)) {
      plan.groups[plan.group_count++] = {column, hash};
      i += kSparseGroup;
    } else {
      const auto lane = static_cast<int32_t>(formed_lane(number, plan.size));
      plan.singles[plan.single_count++] = {column, hash, lane};
      ++i;
    }
  }
}

// Writes x with the signs of its columns as float32, for the examples [first, end), and sets their
// sums to 0.
template <class T>
void begin_wave(const Gradients& gradients, const SketchPlan& plan, const int64_t* starts,
                int64_t first, int64_t end, int threads) {
  const int64_t stride = plan.size + kSparseGroup;
  parallel_for(threads, end - first, [&](int64_t item, int) {
    const int64_t b = first + item;
    for (int64_t s = 0; s < length_of(gradients, b); ++s) {
      const T* from = static_cast<const T*>(gradients.x) + (b * gradients.tokens + s) * gradients.in;
      float* x = plan.x + (starts[b] - starts[first] + s) * plan.width;
      for (int64_t i = 0; i < gradients.in; ++i) x[i] = to_float(from[i]) * plan.column_signs[i];
      for (int64_t i = gradients.in; i < plan.columns; ++i) x[i] = plan.column_signs[i];
      std::fill(x + plan.columns, x + plan.width, 0.0f);
    }
    std::fill(plan.sums + item * stride, plan.sums + (item + 1) * stride, 0.0f);
  });
}

// Rows of a gradient that R_out has reduced belong to all layers that read x, so their hashes come
// from a key of x: not input_key itself, from which the signs of columns come.
void hash_band(const Projection& projection, const SketchPlan& plan, int64_t first, int64_t count,
               int threads) {
  const Output& output = projection.output[0];
  const bool reduced = projection.rows > 0;
  const uint64_t stream =
      stream_of(projection.seed, reduced ? reduced_key(projection.input_key) : output.key);
  parallel_for(threads, count, [&](int64_t m, int) {
    const int64_t* numbers = reduced ? nullptr : output.columns;
    const uint64_t row = step(stream, number_of(numbers, first + m));
    for (int64_t at = 0; at < plan.hashes; at += kSketchColumns) {
      sketch_buckets(row, at, std::min(kSketchColumns, plan.hashes - at), plan.size,
                     plan.buckets + m * plan.hashes + at);
    }
  });
}

// sums += the sketch of a row of G, which is `scale` times `values`.
void add_row(const SketchPlan& plan, const uint32_t* buckets, const float* values, float scale,
             float* sums) {
  signs().add_sketch(values, plan.groups, plan.group_count, buckets, scale, sums);
  for (int64_t j = 0; j < plan.single_count; ++j) {
    const SketchSingle& single = plan.singles[j];
    const uint32_t bucket = buckets[single.number];
    const float value = scale * values[single.column];
    sums[(bucket >> 1) + single.lane] += bucket & 1 ? -value : value;
  }
}

// sums += the sketch of rows [first, first + count) of an example's gradient, whose tokens begin at
// x and q.
void add_band(const SketchPlan& plan, const float* x, const float* q, int64_t ldq, int64_t tokens,
              int64_t first, int64_t count, float* formed, float* sums) {
  for (int64_t m = 0; m < count; m += kFormedRows) {
    const int64_t together = std::min(kFormedRows, count - m);
    if (tokens > 1) {
      std::fill(formed, formed + together * plan.width, 0.0f);
      signs().add_product(q + first + m, ldq, together, x, plan.width, plan.width, tokens, 1.0f,
                          formed, plan.width);
    }
    for (int64_t r = 0; r < together; ++r) {
      const uint32_t* buckets = plan.buckets + (m + r) * plan.hashes;
      if (tokens == 1) {
        add_row(plan, buckets, x, q[first + m + r], sums);
      } else {
        add_row(plan, buckets, formed + r * plan.width, 1.0f, sums);
      }
    }
  }
}

}  // namespace

SketchPlan plan_sketch(Scratch& scratch, const Gradients& gradients, const Projection& projection,
                       int64_t rows, int64_t wave, int threads) {
  SketchPlan plan{};
  plan.rows = rows;
  plan.columns = gradients.in + (projection.bias ? 1 : 0);
  plan.width = padded(plan.columns);
  plan.size = projection.k_out * projection.k_in;
  int64_t last = 0;
  for (int64_t i = 0; i < plan.columns; ++i) {
    last = std::max(last, number_of(projection.input_columns, i));
  }
  plan.hashes = formed_hash_number(last, plan.size) + 1;
  plan.band = std::min(rows, std::max<int64_t>(1, kBandHashes / plan.hashes));
  plan.column_signs = scratch.take<float>(plan.columns);
  plan.x = scratch.take<float>(wave * plan.width);
  plan.buckets = scratch.take<uint32_t>(plan.band * plan.hashes);
  plan.groups = scratch.take<SketchGroup>(plan.columns / kSparseGroup);
  plan.singles = scratch.take<SketchSingle>(plan.columns);
  plan.sums =
      scratch.take<float>(std::min(kSketchExamples, gradients.batch) * (plan.size + kSparseGroup));
  plan.formed = scratch.take<float>(threads * kFormedRows * plan.width);
  return plan;
}

void begin_sketches(const Projection& projection, SketchPlan& plan, int threads) {
  list_columns(projection, plan);
  if (plan.band == plan.rows) hash_band(projection, plan, 0, plan.rows, threads);
}

void add_sketches(const Gradients& gradients, const Projection& projection, const SketchPlan& plan,
                  const int64_t* starts, int64_t first, int64_t end, const float* q, int64_t ldq,
                  float* out, int64_t stride, int threads) {
  const auto begin = gradients.dtype == DType::bfloat16 ? begin_wave<bfloat16> : begin_wave<float>;
  begin(gradients, plan, starts, first, end, threads);
  const int64_t sums_stride = plan.size + kSparseGroup;
  for (int64_t m = 0; m < plan.rows; m += plan.band) {
    const int64_t count = std::min(plan.band, plan.rows - m);
    if (plan.band < plan.rows) hash_band(projection, plan, m, count, threads);
    parallel_for(threads, end - first, [&](int64_t item, int slot) {
      const int64_t token = starts[first + item] - starts[first];
      const int64_t tokens = length_of(gradients, first + item);
      if (tokens == 0) return;
      add_band(plan, plan.x + token * plan.width, q + token * ldq, ldq, tokens, m, count,
               plan.formed + slot * kFormedRows * plan.width, plan.sums + item * sums_stride);
    });
  }
  parallel_for(threads, end - first, [&](int64_t item, int) {
    const float* sums = plan.sums + item * sums_stride;
    float* features = out + (first + item) * stride;
    for (int64_t r = 0; r < plan.size; ++r) features[r] += sums[r];
    for (int64_t r = 0; r < std::min(kSparseGroup, plan.size); ++r) {
      features[r] += sums[plan.size + r];
    }
  });
}

}  // namespace tracmod::cpu

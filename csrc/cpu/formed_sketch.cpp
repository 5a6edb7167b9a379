// out[b, 0 : K] += the count sketch of the formed gradient G_b = sum_s g_bs [x_bs, 1]^T (random.h).
//
// For layers at which an example has one token or a few: G has O (I + 1) numbers, and each is
// multiplied by its sign and added to one of K sums. 16 neighbours of a row share a hash and go to
// 16 consecutive sums, so they take one load, one multiply-add with g_o times the group's sign, and
// one store. The signs of columns are applied to x, once per token.
//
// Work: up to 64 examples at a time. For a band of rows, an item hashes the groups of a row, for all
// examples; then an item is an example, which adds the band to its own K + 16 sums. A group may run
// over the last sum; the sums behind it belong to the first ones. With one token, a row of G is x
// times g_o and is not written out; with more, six rows at a time are, by add_product.
//
// Operations: O (I + 1) multiply-adds per example, O (I + 1) / 16 hashes per 64 examples. The sums
// stay in the first-level cache. Their loads and stores, at any address and so mostly across two
// cache lines, are the limit: 0.1 to 0.2 ns per number. Hashing each number takes about 1 ns.
#include "cpu/formed_sketch.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/signs.h"
#include "cpu/sketch.h"
#include "cpu/tiles.h"
#include "random.h"
#include "scratch.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kExamples = 64;          // examples that share the hashes of a band
constexpr int64_t kWaveTokens = 768;       // tokens of a wave, per thread
constexpr int64_t kBandHashes = 4096;      // hashes of a band
constexpr int64_t kFormedRows = 6;         // rows of G that are written out together

// A column that is not part of a whole group: it goes `lane` sums behind the position of hash
// `number`.
struct SketchSingle {
  int32_t column, number, lane;
};

struct Plan {
  int64_t columns, width;  // I + bias, and the same padded to whole vectors
  int64_t size;            // K
  int64_t hashes;          // of a row
  int64_t band, wave;      // rows of a band, tokens of a wave
  int64_t* starts;         // (B + 1,) see rows.h
  float* column_signs;     // (columns,)
  float *x, *g;            // (tokens, width), with the signs of the columns, and (tokens, O)
  uint32_t* buckets;       // (band, hashes), as sketch_buckets writes them
  SketchGroup* groups;     // whole groups of 16 columns
  SketchSingle* singles;   // all other columns
  int64_t group_count, single_count;
  float* sums;    // (examples, K + 16)
  float* formed;  // (threads, kFormedRows, width)
};

int64_t number_of(const int64_t* numbers, int64_t i) { return numbers == nullptr ? i : numbers[i]; }

Plan make_plan(Scratch& scratch, const Gradients& gradients, const Projection& projection,
               int threads) {
  Plan plan{};
  plan.columns = gradients.in + (projection.bias ? 1 : 0);
  plan.width = padded(plan.columns);
  plan.size = projection.k_out * projection.k_in;
  int64_t last = 0;
  for (int64_t i = 0; i < plan.columns; ++i) {
    last = std::max(last, number_of(projection.input_columns, i));
  }
  plan.hashes = formed_hash_number(last, plan.size) + 1;
  plan.band = std::min(gradients.out, std::max<int64_t>(1, kBandHashes / plan.hashes));
  plan.wave = std::min(gradients.batch * gradients.tokens,
                       std::max(gradients.tokens, kWaveTokens * threads));
  plan.starts = scratch.take<int64_t>(gradients.batch + 1);
  plan.column_signs = scratch.take<float>(plan.columns);
  plan.x = scratch.take<float>(plan.wave * plan.width);
  plan.g = scratch.take<float>(plan.wave * gradients.out);
  plan.buckets = scratch.take<uint32_t>(plan.band * plan.hashes);
  plan.groups = scratch.take<SketchGroup>(plan.columns / kSparseGroup);
  plan.singles = scratch.take<SketchSingle>(plan.columns);
  plan.sums =
      scratch.take<float>(std::min(kExamples, gradients.batch) * (plan.size + kSparseGroup));
  plan.formed = scratch.take<float>(threads * kFormedRows * plan.width);
  return plan;
}

// Whether the 16 columns from i on are one whole group. Columns that were left out break up groups.
bool whole_group(const int64_t* numbers, int64_t i, int64_t columns) {
  if (i + kSparseGroup > columns || number_of(numbers, i) % kSparseGroup != 0) return false;
  for (int64_t l = 1; numbers != nullptr && l < kSparseGroup; ++l) {
    if (numbers[i + l] != numbers[i] + l) return false;
  }
  return true;
}

void list_columns(const Projection& projection, Plan& plan) {
  const int64_t* numbers = projection.input_columns;
  const uint64_t stream = stream_of(projection.seed, projection.input_key);
  for (int64_t i = 0; i < plan.columns; ++i) {
    plan.column_signs[i] = sign_of(step(stream, number_of(numbers, i)));
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

// Writes x with the signs of its columns, and g, as float32, for the examples [first, end), and sets
// their sums to 0.
template <class T>
void begin_wave(const Gradients& gradients, const Plan& plan, int64_t first, int64_t end,
                int threads) {
  const int64_t stride = plan.size + kSparseGroup;
  parallel_for(threads, end - first, [&](int64_t item, int) {
    const int64_t b = first + item;
    for (int64_t s = 0; s < length_of(gradients, b); ++s) {
      const int64_t token = plan.starts[b] - plan.starts[first] + s;
      const int64_t row = b * gradients.tokens + s;
      float* x = plan.x + token * plan.width;
      widen(static_cast<const T*>(gradients.x) + row * gradients.in, gradients.in,
            plan.columns - gradients.in, plan.width, x);
      for (int64_t i = 0; i < plan.columns; ++i) x[i] *= plan.column_signs[i];
      widen(static_cast<const T*>(gradients.g) + row * gradients.out, gradients.out, 0,
            gradients.out, plan.g + token * gradients.out);
    }
    std::fill(plan.sums + item * stride, plan.sums + (item + 1) * stride, 0.0f);
  });
}

void hash_band(const Projection& projection, const Plan& plan, int64_t first, int64_t count,
               int threads) {
  const Output& output = projection.output[0];
  const uint64_t stream = stream_of(projection.seed, output.key);
  parallel_for(threads, count, [&](int64_t m, int) {
    const uint64_t row = step(stream, number_of(output.columns, first + m));
    for (int64_t at = 0; at < plan.hashes; at += kSketchColumns) {
      sketch_buckets(row, at, std::min(kSketchColumns, plan.hashes - at), plan.size,
                     plan.buckets + m * plan.hashes + at);
    }
  });
}

// sums += the sketch of a row of G, which is `scale` times `values`.
void add_row(const Plan& plan, const uint32_t* buckets, const float* values, float scale,
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
// x and g.
void add_band(const Plan& plan, const float* x, const float* g, int64_t rows, int64_t tokens,
              int64_t first, int64_t count, float* formed, float* sums) {
  for (int64_t m = 0; m < count; m += kFormedRows) {
    const int64_t together = std::min(kFormedRows, count - m);
    if (tokens > 1) {
      std::fill(formed, formed + together * plan.width, 0.0f);
      signs().add_product(g + first + m, rows, together, x, plan.width, plan.width, tokens, 1.0f,
                          formed, plan.width);
    }
    for (int64_t r = 0; r < together; ++r) {
      const uint32_t* buckets = plan.buckets + (m + r) * plan.hashes;
      if (tokens == 1) {
        add_row(plan, buckets, x, g[first + m + r], sums);
      } else {
        add_row(plan, buckets, formed + r * plan.width, 1.0f, sums);
      }
    }
  }
}

template <class T>
void sketch_examples(const Gradients& gradients, const Projection& projection, const Plan& plan,
                     int64_t first, int64_t end, float* out, int64_t stride, int threads) {
  begin_wave<T>(gradients, plan, first, end, threads);
  const int64_t sums_stride = plan.size + kSparseGroup;
  for (int64_t m = 0; m < gradients.out; m += plan.band) {
    const int64_t count = std::min(plan.band, gradients.out - m);
    hash_band(projection, plan, m, count, threads);
    parallel_for(threads, end - first, [&](int64_t item, int slot) {
      const int64_t begin = plan.starts[first + item] - plan.starts[first];
      const int64_t tokens = length_of(gradients, first + item);
      if (tokens == 0) return;
      add_band(plan, plan.x + begin * plan.width, plan.g + begin * gradients.out, gradients.out,
               tokens, m, count, plan.formed + slot * kFormedRows * plan.width,
               plan.sums + item * sums_stride);
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

}  // namespace

size_t formed_sketch_scratch(const Gradients& gradients, const Projection& projection,
                             int threads) {
  Scratch scratch;
  make_plan(scratch, gradients, projection, threads);
  return scratch.bytes();
}

void formed_sketch(const Gradients& gradients, const Projection& projection, float* out,
                   int64_t stride, void* memory, int threads) {
  Scratch scratch(memory);
  Plan plan = make_plan(scratch, gradients, projection, threads);
  count_tokens(gradients, plan.starts);
  list_columns(projection, plan);
  const auto sketch = gradients.dtype == DType::bfloat16 ? sketch_examples<bfloat16>
                                                         : sketch_examples<float>;
  for (int64_t first = 0; first < gradients.batch;) {
    int64_t end = first + 1;
    while (end < gradients.batch && end - first < kExamples &&
           plan.starts[end + 1] - plan.starts[first] <= plan.wave) {
      ++end;
    }
    sketch(gradients, projection, plan, first, end, out, stride, threads);
    first = end;
  }
}

}  // namespace tracmod::cpu

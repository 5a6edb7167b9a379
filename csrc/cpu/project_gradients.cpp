// Projected per-example gradients of a layer, added to the feature rows out (B, stride):
//
//   out[b] += sum_j vec(R_out_j G_bj R_in^T),   G_bj = sum_s g_bjs [x_bs, 1]^T  (O_j, I + bias),
//
// summed over the layers j that read the same x. A gradient G is never formed. Because
// R_out (g x^T) R_in^T = (R_out g) (R_in x)^T, both sides are projected first:
//
//   P = [x, 1] R_in^T (S, k_in),   Q = sum_j g_j R_out_j^T (S, k_out),   out[b] += Q_b^T P_b
//
// Work: examples are taken in waves, as many at a time as keep P and Q in the second-level cache.
// Each wave has two phases over the threads:
//   1. An item is a block of 48 tokens of P or of Q.
//      Dense R (rademacher): with AVX-512 by tables of sums (signs.cpp); else the signs are written
//      out as floats once per call, which is cheap because R has few rows, and multiplied as
//      `outer` tiles.
//      Sparse R (sjlt): whole groups of 16 neighbouring columns at a time, other columns singly.
//   2. An item is a band of 48 rows of one example's Q^T P, which the item adds to the feature row.
//      It owns these numbers, so there are no atomics and results repeat bit by bit.
//
// Bytes: x and g once, B S (I + O) times 4 or 2. Operations, dense: 2 B S (I k_in + O k_out + k_in
// k_out), and the vector units are the limit. At k = 64 tables take three instructions in place of
// four multiply-adds (five in place of four products of bfloat16 pairs), but spread over more
// units. Operations, sparse: 2 B S (I + O + k_in k_out); the limit is the read of x and g and, for
// narrow layers, the last term.
//
// sketch: only Q is projected, to `rows` rows by dense signs, or not at all; formed_sketch.cpp forms
// the gradients Q_b^T [x, 1] and sketches them.
//
// LayerNorm (elementwise) gradients are short and embedding gradients are sparse, so a two-sided
// projection gains nothing: each element is added to the grid of k_out k_in features as a count
// sketch (random.h), in float64. An item is one example; one read of x and g is the limit.
#include <algorithm>
#include <cmath>

#include "cpu/formed_sketch.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/signs.h"
#include "cpu/sketch.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "random.h"
#include "scratch.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kTokenBlock = 48;   // tokens of an item of the first phase
constexpr int64_t kWaveTokens = 768;  // tokens of a wave, per thread
constexpr int64_t kColumnBlock = 64;  // columns of P or Q that project_dense computes together
constexpr int64_t kRowBlock = 48;     // rows of Q^T P of an item of the second phase
constexpr int64_t kSketchNumbers = int64_t{1} << 18;  // numbers of x of a wave that is sketched
constexpr int64_t kWidenDepth = 256;  // columns of bfloat16 rows that are widened at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The entry of a sparse column that is not part of a whole group.
struct SparseSingle {
  int32_t column, row;
  float sign;
};

// One matrix of tokens (x, or the g of one layer) and the random matrix R that multiplies it.
// `ones` is 1 where a column of ones for the bias follows the `size` columns.
struct Part {
  const void* rows;
  int64_t size, ones;
  const int64_t* columns;  // numbers of R's columns, or null for 0, 1, ...
  uint64_t stream;
  float* dense = nullptr;      // dense R as floats, (size + ones, width); or
  int32_t* indices = nullptr;  // dense R as table indices: per 64 rows of R, those of all columns
  // Sparse R: the whole groups of 16 columns, and the entries of all other columns.
  SparseGroup* groups = nullptr;
  SparseSingle* singles = nullptr;
  int64_t group_count = 0, single_count = 0;

  int64_t number(int64_t i) const { return columns == nullptr ? i : columns[i]; }
  int64_t tables() const { return (size + ones + kTableColumns - 1) / kTableColumns; }
};

// One projected side, P or Q: the sum of the products of its parts.
struct Side {
  int64_t k, width;  // columns of P or Q, and the same padded to whole vectors
  int parts;
  Part part[kMaxOutputs];
  float* projected;  // (tokens, width)
};

// Scratch memory. Linear layers use the first group of members, LayerNorm and embedding the second.
struct Plan {
  int64_t* starts;  // (B + 1,) see rows.h
  int64_t wave;     // tokens of a wave
  Side in, out;     // P and Q
  SketchPlan sketch;
  float* sums;  // (threads, sums_size) for sjlt
  int64_t sums_size;

  double* grids;         // (threads, grid + rows)
  int64_t grid, rows;    // buckets of the count sketch; elements of a LayerNorm gradient
  float* parts;          // (threads, rows) float32 sums of a LayerNorm gradient
  SparseEntry* buckets;  // (rows,) bucket and sign of each element of a LayerNorm gradient
};

// The kind of R_out. A sketch is of g, or of g reduced by dense signs.
Kind out_kind(const Projection& projection) {
  if (projection.kind != Kind::sketch) return projection.kind;
  return projection.rows > 0 ? Kind::rademacher : Kind::identity;
}

void plan_side(Scratch& scratch, Kind kind, int64_t tokens, Side& side) {
  side.width = padded(side.k);
  for (int j = 0; j < side.parts; ++j) {
    Part& part = side.part[j];
    if (kind == Kind::rademacher && signs().add_dense != nullptr) {
      part.indices = scratch.take<int32_t>(part.tables() * side.width);
    } else if (kind == Kind::rademacher) {
      part.dense = scratch.take<float>((part.size + part.ones) * side.width);
    }
    if (kind == Kind::sjlt) {
      part.groups = scratch.take<SparseGroup>(part.size / kSparseGroup);
      part.singles = scratch.take<SparseSingle>(part.size);
    }
  }
  side.projected = scratch.take<float>(tokens * side.width);
}

Plan make_plan(Scratch& scratch, const Gradients& gradients, const Projection& projection,
               int threads) {
  Plan plan{};
  if (projection.layer == Layer::linear) {
    plan.wave = std::min(gradients.batch * gradients.tokens,
                         std::max(gradients.tokens, kWaveTokens * threads));
    plan.starts = scratch.take<int64_t>(gradients.batch + 1);
    plan.in.k = projection.k_in;
    plan.in.parts = 1;
    plan.in.part[0] = {gradients.x, gradients.in, projection.bias ? 1 : 0, projection.input_columns,
                       stream_of(projection.seed, projection.input_key)};
    plan.out.k = projection.k_out;
    plan.out.parts = projection.outputs;
    for (int j = 0; j < projection.outputs; ++j) {
      const Output& output = projection.output[j];
      plan.out.part[j] = {output.g, output.size, 0, output.columns,
                          stream_of(projection.seed, output.key)};
    }
    if (projection.kind == Kind::sketch) {
      plan.wave = std::max(gradients.tokens, std::min(plan.wave, kSketchNumbers / gradients.in));
      plan.out.k = projection.rows > 0 ? projection.rows : gradients.out;
      plan.sketch =
          plan_sketch(scratch, gradients, projection, plan.out.k, plan.wave, threads);
    } else {
      plan_side(scratch, projection.kind, plan.wave, plan.in);
    }
    plan_side(scratch, out_kind(projection), plan.wave, plan.out);
    if (projection.kind == Kind::sjlt) {
      plan.sums_size = kSparseTokens * (std::max(plan.in.k, plan.out.k) + kSparseGroup);
      plan.sums = scratch.take<float>(plan.sums_size * threads);
    }
  } else {
    plan.grid = projection.k_out * projection.k_in;
    // LayerNorm's gradient [v, u] is summed before it is sketched, behind the grid.
    plan.rows = projection.layer == Layer::elementwise ? 2 * gradients.in : 0;
    plan.grids = scratch.take<double>((plan.grid + plan.rows) * threads);
    plan.parts = scratch.take<float>(plan.rows * threads);
    plan.buckets = scratch.take<SparseEntry>(plan.rows);
  }
  return plan;
}

// The four signs that four bits encode.
constexpr float kSigns[16][4] = {
    {1, 1, 1, 1},   {-1, 1, 1, 1},   {1, -1, 1, 1},   {-1, -1, 1, 1},
    {1, 1, -1, 1},  {-1, 1, -1, 1},  {1, -1, -1, 1},  {-1, -1, -1, 1},
    {1, 1, 1, -1},  {-1, 1, 1, -1},  {1, -1, 1, -1},  {-1, -1, 1, -1},
    {1, 1, -1, -1}, {-1, 1, -1, -1}, {1, -1, -1, -1}, {-1, -1, -1, -1}};

// Writes column i of R as a row of floats, zero beyond k; width is a multiple of 4.
void write_column(const Side& side, const Part& part, int64_t i) {
  float* row = part.dense + i * side.width;
  for (int64_t r = 0; r < side.width; r += 64) {
    uint64_t word = sign_word(part.stream, part.number(i), r / 64);
    const int64_t end = std::min(side.width, r + 64);
    for (int64_t at = r; at < end; at += 4, word >>= 4) {
      std::copy(kSigns[word & 15], kSigns[word & 15] + 4, row + at);
    }
  }
  std::fill(row + side.k, row + side.width, 0.0f);
}

// The table indices of the 64 rows of R from `row` on, starting at column i.
int32_t* indices_at(const Side& side, const Part& part, int64_t row, int64_t i) {
  const int64_t rows = std::min(kBlockRows, side.width - row);
  return part.indices + row * part.tables() + i / kTableColumns * rows;
}

// Writes a dense R, as floats or as table indices; 256 columns are an item.
void write_signs(const Side& side, const Part& part, int threads) {
  constexpr int64_t kColumns = 256;
  const int64_t columns = part.size + part.ones;
  parallel_for(threads, ceil_div(columns, kColumns), [&](int64_t item, int) {
    const int64_t begin = item * kColumns, end = std::min(columns, begin + kColumns);
    if (part.dense != nullptr) {
      for (int64_t i = begin; i < end; ++i) write_column(side, part, i);
      return;
    }
    for (int64_t r = 0; r < side.width; r += kBlockRows) {
      signs().write_indices(part.stream, part.columns, begin, end, r, side.width,
                            indices_at(side, part, r, begin));
    }
  });
}

// Whether columns i ... i + 15 have the numbers of one whole group of R. Columns that were left out
// break up groups.
bool whole_group(const Part& part, int64_t i) {
  if (i + kSparseGroup > part.size || part.number(i) % kSparseGroup != 0) return false;
  for (int64_t l = 1; l < kSparseGroup; ++l) {
    if (part.number(i + l) != part.number(i) + l) return false;
  }
  return true;
}

// Lists the groups and single columns of a sparse R.
void write_sparse(Part& part, int64_t k) {
  for (int64_t i = 0; i < part.size;) {
    if (k >= kSparseGroup && whole_group(part, i)) {
      const uint64_t hash = group_hash(part.stream, part.number(i) / kSparseGroup);
      SparseGroup& group = part.groups[part.group_count++];
      group.column = static_cast<int32_t>(i);
      group.position = static_cast<int32_t>(position_of(hash, k));
      for (int64_t l = 0; l < kSparseGroup; ++l) {
        group.flip[l] = static_cast<uint32_t>(hash >> l) << 31;
      }
      i += kSparseGroup;
    } else {
      const SparseEntry entry = sparse_entry(part.stream, part.number(i), k);
      part.singles[part.single_count++] = {static_cast<int32_t>(i), static_cast<int32_t>(entry.row),
                                           entry.sign};
      ++i;
    }
  }
}

void write_projections(Side& side, Kind kind, int threads) {
  for (int j = 0; j < side.parts; ++j) {
    if (kind == Kind::rademacher) write_signs(side, side.part[j], threads);
    if (kind == Kind::sjlt) write_sparse(side.part[j], side.k);
  }
}

// a[m] = pointer to columns [begin, begin + depth) of row m as float32. bfloat16 rows are widened
// into the buffer.
void block_rows(const float* const* rows, int64_t count, int64_t begin, int64_t, float*,
                const float** a) {
  for (int64_t m = 0; m < count; ++m) a[m] = rows[m] + begin;
}

void block_rows(const bfloat16* const* rows, int64_t count, int64_t begin, int64_t depth,
                float* buffer, const float** a) {
  for (int64_t m = 0; m < count; ++m) {
    a[m] = buffer + m * kWidenDepth;
    widen(rows[m] + begin, depth, 0, depth, buffer + m * kWidenDepth);
  }
}

// Pointers to the rows of a block of tokens, for each part.
template <class T>
struct Rows {
  const T* part[kMaxOutputs][kTokenBlock];
};

// P or Q of a block of tokens for a dense R written out as floats.
template <class T>
void project_dense(const Side& side, const Rows<T>& rows, int64_t count, float* projected) {
  float buffer[kTokenBlock * kWidenDepth];
  double sums[kTokenBlock * kColumnBlock];
  const float* a[kTokenBlock];
  for (int64_t n = 0; n < side.width; n += kColumnBlock) {
    const int64_t columns = std::min(kColumnBlock, side.width - n);
    std::fill(sums, sums + count * kColumnBlock, 0.0);
    for (int p = 0; p < side.parts; ++p) {
      const Part& part = side.part[p];
      for (int64_t d = 0; d < part.size; d += kWidenDepth) {
        const int64_t depth = std::min(kWidenDepth, part.size - d);
        block_rows(rows.part[p], count, d, depth, buffer, a);
        tiles().outer(a, 1, count, part.dense + d * side.width + n, side.width, columns, depth,
                      sums, kColumnBlock);
      }
    }
    const Part& first = side.part[0];  // only the first part may have a bias
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t j = 0; j < columns; ++j) {
        double sum = sums[m * kColumnBlock + j];
        if (first.ones != 0) sum += first.dense[first.size * side.width + n + j];
        projected[m * side.width + n + j] = static_cast<float>(sum);
      }
    }
  }
}

// P or Q of a block of tokens for a dense R written out as table indices.
template <class T>
void project_tables(const Side& side, const Rows<T>& rows, int64_t count, float* projected) {
  std::fill(projected, projected + count * side.width, 0.0f);
  const T* a[kTokenBlock];
  for (int p = 0; p < side.parts; ++p) {
    const Part& part = side.part[p];
    for (int64_t d = 0; d < part.size + part.ones; d += kDenseColumns) {
      const int64_t columns = std::min(kDenseColumns, part.size - d);
      const int64_t ones = std::min(part.ones, kDenseColumns - columns);
      for (int64_t m = 0; m < count; ++m) a[m] = rows.part[p][m] + d;
      for (int64_t r = 0; r < side.width; r += kBlockRows) {
        const int64_t vectors = std::min(kBlockRows, side.width - r) / kColumnUnit;
        add_dense(a, count, columns, ones, indices_at(side, part, r, d), vectors, projected + r,
                  side.width);
      }
    }
  }
}

// projected[0, k) += sums, and clears sums (k + 16,). A group of 16 rows may run over the last row
// of R; the rows behind it are the first rows again. That way add_sparse needs no case for it.
void fold(float* sums, int64_t k, float* projected) {
  for (int64_t r = 0; r < k; ++r) projected[r] += sums[r];
  for (int64_t r = 0; r < kSparseGroup && r < k; ++r) projected[r] += sums[k + r];
  std::fill(sums, sums + k + kSparseGroup, 0.0f);
}

// projected += `count` tokens (at most kSparseTokens) times a sparse R. The tokens of the next call
// begin `next` rows later, for prefetching. `sums` (kSparseTokens, k + 16) must be zeros and is
// left as zeros: it collects at most 256 groups or 64 single entries before it is added to the
// result, which keeps chains of float32 additions short.
template <class T>
void project_sparse(const Side& side, const Rows<T>& rows, int64_t next, int64_t count, float* sums,
                    float* projected) {
  constexpr int64_t kGroups = 256, kSingles = 64;
  const int64_t ld = side.k + kSparseGroup;
  for (int p = 0; p < side.parts; ++p) {
    const Part& part = side.part[p];
    const int64_t blocks =
        std::max(ceil_div(part.group_count, kGroups), ceil_div(part.single_count, kSingles));
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t groups = std::min(kGroups, part.group_count - i * kGroups);
      const int64_t singles = std::min((i + 1) * kSingles, part.single_count);
      if (groups > 0) {
        add_sparse(rows.part[p], rows.part[p] + next, count, part.groups + i * kGroups, groups,
                   sums, ld);
      }
      for (int64_t m = 0; m < count; ++m) {
        for (int64_t j = i * kSingles; j < singles; ++j) {
          const SparseSingle& single = part.singles[j];
          sums[m * ld + single.row] += single.sign * to_float(rows.part[p][m][single.column]);
        }
        fold(sums + m * ld, side.k, projected + m * side.width);
      }
    }
  }
}

// P or Q of a block of tokens for a sparse R.
template <class T>
void project_sparse_block(const Side& side, const Rows<T>& rows, int64_t count, float* sums,
                          float* projected) {
  std::fill(projected, projected + count * side.width, 0.0f);
  std::fill(sums, sums + kSparseTokens * (side.k + kSparseGroup), 0.0f);
  for (int64_t begin = 0; begin < count; begin += kSparseTokens) {
    Rows<T> rest;
    for (int p = 0; p < side.parts; ++p) {
      std::copy(rows.part[p] + begin, rows.part[p] + count, rest.part[p]);
    }
    const int64_t next = begin + 2 * kSparseTokens <= count ? kSparseTokens : 0;
    project_sparse(side, rest, next, std::min(kSparseTokens, count - begin), sums,
                   projected + begin * side.width);
  }
  const Part& first = side.part[0];  // only the first part may have a bias
  if (first.ones == 0) return;
  const SparseEntry bias = sparse_entry(first.stream, first.number(first.size), side.k);
  for (int64_t m = 0; m < count; ++m) projected[m * side.width + bias.row] += bias.sign;
}

// P or Q of the read tokens [begin, end). For kind identity that is a copy as float32.
template <class T>
void project_block(const Side& side, Kind kind, const Gradients& gradients, const int64_t* starts,
                   int64_t begin, int64_t end, float* sums, float* projected) {
  Rows<T> rows;
  for_tokens(starts, gradients.batch, gradients.tokens, begin, end, [&](int64_t n, int64_t row) {
    for (int p = 0; p < side.parts; ++p) {
      rows.part[p][n - begin] = static_cast<const T*>(side.part[p].rows) + row * side.part[p].size;
    }
  });
  if (kind == Kind::rademacher) {
    if (signs().add_dense != nullptr) return project_tables(side, rows, end - begin, projected);
    return project_dense(side, rows, end - begin, projected);
  }
  if (kind == Kind::sjlt) return project_sparse_block(side, rows, end - begin, sums, projected);
  const Part& first = side.part[0];
  for (int64_t m = 0; m < end - begin; ++m) {
    widen(rows.part[0][m], first.size, first.ones, side.width, projected + m * side.width);
  }
}

// First phase: P and Q of the read tokens [first, end), or with `sides` 1 only Q.
template <class T>
void project_tokens(const Gradients& gradients, Kind kind, const Plan& plan, int64_t first,
                    int64_t end, int sides, int threads) {
  const int64_t blocks = ceil_div(end - first, kTokenBlock);
  parallel_for(threads, sides * blocks, [&](int64_t item, int slot) {
    const Side& side = item < blocks ? plan.out : plan.in;
    const int64_t begin = first + (item % blocks) * kTokenBlock;
    project_block<T>(side, kind, gradients, plan.starts, begin, std::min(end, begin + kTokenBlock),
                     plan.sums + slot * plan.sums_size,
                     side.projected + (begin - first) * side.width);
  });
}

// Second phase: out[b] += scale * Q_b^T P_b for the examples [first, end) of a wave, whose tokens
// are the first rows of P and Q. The scale 1 / sqrt(k_in k_out) of dense signs is applied here,
// once.
void add_products(const Plan& plan, Kind kind, int64_t first, int64_t end, float* out,
                  int64_t stride, int threads) {
  const Side &p = plan.in, &q = plan.out;
  double scale = 1.0;
  if (kind == Kind::rademacher) {
    scale = 1.0 / std::sqrt(static_cast<double>(p.k) * static_cast<double>(q.k));
  }
  const int64_t bands = ceil_div(q.k, kRowBlock);
  parallel_for(threads, (end - first) * bands, [&](int64_t item, int) {
    const int64_t b = first + item / bands, m = item % bands * kRowBlock;
    const int64_t begin = plan.starts[b] - plan.starts[first];
    signs().add_product(q.projected + begin * q.width + m, q.width, std::min(kRowBlock, q.k - m),
                        p.projected + begin * p.width, p.width, p.k,
                        plan.starts[b + 1] - plan.starts[b], static_cast<float>(scale),
                        out + b * stride + m * p.k, p.k);
  });
}

template <class T>
void project_sketch(const Gradients& gradients, const Projection& projection, Plan& plan,
                    float* out, int64_t stride, int threads) {
  count_tokens(gradients, plan.starts);
  write_projections(plan.out, out_kind(projection), threads);
  begin_sketches(projection, plan.sketch, threads);
  for (int64_t first = 0; first < gradients.batch;) {
    int64_t end = first + 1;
    while (end < gradients.batch && end - first < kSketchExamples &&
           plan.starts[end + 1] - plan.starts[first] <= plan.wave) {
      ++end;
    }
    project_tokens<T>(gradients, out_kind(projection), plan, plan.starts[first], plan.starts[end],
                      1, threads);
    add_sketches(gradients, projection, plan.sketch, plan.starts, first, end, plan.out.projected,
                 plan.out.width, out, stride, threads);
    first = end;
  }
}

template <class T>
void project_linear(const Gradients& gradients, const Projection& projection, Plan& plan,
                    float* out, int64_t stride, int threads) {
  if (projection.kind == Kind::sketch) {
    return project_sketch<T>(gradients, projection, plan, out, stride, threads);
  }
  count_tokens(gradients, plan.starts);
  write_projections(plan.in, projection.kind, threads);
  write_projections(plan.out, projection.kind, threads);
  for (int64_t first = 0; first < gradients.batch;) {
    int64_t end = first + 1;
    while (end < gradients.batch && plan.starts[end + 1] - plan.starts[first] <= plan.wave) ++end;
    project_tokens<T>(gradients, projection.kind, plan, plan.starts[first], plan.starts[end], 2,
                      threads);
    add_products(plan, projection.kind, first, end, out, stride, threads);
    first = end;
  }
}

// The LayerNorm gradient of example b: sums = [v, u] with v_d = sum_s g_sd x_sd and u_d = sum_s
// g_sd. Sums are float32 within blocks of 128 tokens (in `part`, as large as sums), float64 across
// blocks.
template <class T>
void sum_elementwise(const Gradients& gradients, int64_t b, float* part, double* sums) {
  constexpr int64_t kTokens = 128;
  const int64_t size = gradients.in, length = length_of(gradients, b);
  std::fill(sums, sums + 2 * size, 0.0);
  for (int64_t s = 0; s < length; s += kTokens) {
    const int64_t at = (b * gradients.tokens + s) * size;
    std::fill(part, part + 2 * size, 0.0f);
    add_elementwise(static_cast<const T*>(gradients.x) + at,
                    static_cast<const T*>(gradients.g) + at, std::min(kTokens, length - s), size,
                    part, part + size);
    for (int64_t d = 0; d < 2 * size; ++d) sums[d] += static_cast<double>(part[d]);
  }
}

void add_grid(const double* grid, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] += static_cast<float>(grid[i]);
}

// All examples have the same buckets, so these are computed once per call.
template <class T>
void project_elementwise(const Gradients& gradients, const Projection& projection, const Plan& plan,
                         float* out, int64_t stride, int threads) {
  const int64_t size = gradients.in, rows = projection.bias ? 2 : 1;
  const uint64_t stream = stream_of(projection.seed, projection.output[0].key);
  for (int64_t i = 0; projection.kind != Kind::identity && i < rows * size; ++i) {
    const uint64_t hash = element_hash(stream, i / size, i % size);
    plan.buckets[i] = {position_of(hash, plan.grid), sign_of(hash)};
  }
  parallel_for(threads, gradients.batch, [&](int64_t b, int slot) {
    if (length_of(gradients, b) == 0) return;
    double* grid = plan.grids + slot * (plan.grid + plan.rows);
    double* sums = grid + plan.grid;
    sum_elementwise<T>(gradients, b, plan.parts + slot * plan.rows, sums);
    if (projection.kind == Kind::identity) {
      add_grid(sums, rows * size, out + b * stride);
      return;
    }
    std::fill(grid, grid + plan.grid, 0.0);
    for (int64_t i = 0; i < rows * size; ++i) {
      grid[plan.buckets[i].row] += static_cast<double>(plan.buckets[i].sign) * sums[i];
    }
    add_grid(grid, plan.grid, out + b * stride);
  });
}

// Here the buckets depend on the token ids, so each token hashes its own elements, 256 at a time.
template <class T>
void project_embedding(const Gradients& gradients, const Projection& projection, const Plan& plan,
                       float* out, int64_t stride, int threads) {
  const int64_t size = gradients.out;
  const uint64_t stream = stream_of(projection.seed, projection.output[0].key);
  parallel_for(threads, gradients.batch, [&](int64_t b, int slot) {
    if (length_of(gradients, b) == 0) return;
    double* grid = plan.grids + slot * plan.grid;
    constexpr float kSign[2] = {1.0f, -1.0f};
    uint32_t buckets[kSketchColumns];
    std::fill(grid, grid + plan.grid, 0.0);
    for (int64_t s = 0; s < length_of(gradients, b); ++s) {
      const int64_t token = b * gradients.tokens + s;
      const int64_t id = static_cast<const int64_t*>(gradients.x)[token];
      const T* g = static_cast<const T*>(gradients.g) + token * size;
      const uint64_t row = step(stream, id);
      for (int64_t first = 0; first < size; first += kSketchColumns) {
        const int64_t columns = std::min(kSketchColumns, size - first);
        sketch_buckets(row, first, columns, plan.grid, buckets);
        for (int64_t d = 0; d < columns; ++d) {
          // A table, because a branch on a random sign is mispredicted every other time.
          const float sign = kSign[buckets[d] & 1];
          grid[buckets[d] >> 1] += static_cast<double>(sign * to_float(g[first + d]));
        }
      }
    }
    add_grid(grid, plan.grid, out + b * stride);
  });
}

template <class T>
void project(const Gradients& gradients, const Projection& projection, Plan& plan, float* out,
             int64_t stride, int threads) {
  switch (projection.layer) {
    case Layer::linear:
      return project_linear<T>(gradients, projection, plan, out, stride, threads);
    case Layer::elementwise:
      return project_elementwise<T>(gradients, projection, plan, out, stride, threads);
    case Layer::embedding:
      return project_embedding<T>(gradients, projection, plan, out, stride, threads);
  }
}

}  // namespace

void projection_matrix(Kind kind, int64_t rows, int64_t size, uint64_t seed, uint64_t key,
                       float* matrix) {
  const uint64_t stream = stream_of(seed, key);
  for (int64_t i = 0; i < size; ++i) {
    const SparseEntry entry = sparse_entry(stream, i, rows);
    for (int64_t r = 0; r < rows; ++r) {
      matrix[r * size + i] = kind == Kind::rademacher ? sign_of_bit(sign_word(stream, i, r / 64),
                                                                    static_cast<int>(r % 64))
                             : r == entry.row         ? entry.sign
                                                      : 0.0f;
    }
  }
}

size_t project_gradients_scratch(const Gradients& gradients, const Projection& projection,
                                 int threads) {
  Scratch scratch;
  make_plan(scratch, gradients, projection, threads);
  return scratch.bytes();
}

void project_gradients(const Gradients& gradients, const Projection& projection, float* out,
                       int64_t stride, void* memory, int threads) {
  Scratch scratch(memory);
  Plan plan = make_plan(scratch, gradients, projection, threads);
  if (gradients.dtype == DType::bfloat16) {
    project<bfloat16>(gradients, projection, plan, out, stride, threads);
  } else {
    project<float>(gradients, projection, plan, out, stride, threads);
  }
}

}  // namespace tracmod::cpu

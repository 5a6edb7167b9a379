// out[b] += sum_j vec(R_out_j G_bj R_in^T),  G_bj = sum_s g_js [x_s, 1]^T over the layers j that read
// the same x; the gradients are never formed:
//
//   P = x R_in^T (S,k_in)    Q = sum_j g_j R_out_j^T (S,k_out)    out[b] += Q^T P
//
// Work: two phases over threads. First a block of 48 tokens of P or Q an item: the signs are
// written out once per call as floats (rows of R are few) and multiplied as `outer` tiles; a sparse
// R is read as lists, one list of columns for each row of R. Then a band of 48 rows of one
// example's Q^T P an item, added to its feature row by the item that owns it.
//
// Bytes: x and g once, B S (I + O) times 4 or 2, plus B S (k_in + k_out) 8 written and read.
// Operations: 2 B S (I k_in + O k_out + k_in k_out); at k = 64 that is 32 or 64 a byte of input, so
// the multiply-add units are the limit; sparse: 2 B S (I + O + k_in k_out), the memory is.
//
// LayerNorm (elementwise) and embedding gradients are few sums or sparse: each example's go into
// the grid as a count sketch, in float64, one example an item; one read of x and g is the limit.
#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "random.h"
#include "scratch.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kTokenBlock = 48;
constexpr int64_t kColumnBlock = 64;
constexpr int64_t kRowBlock = 48;
constexpr int64_t kWidenDepth = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of `size` values each, and a 1 for the bias, that are multiplied by an R^T of their own.
struct Part {
  const void* rows;
  int64_t size, ones;
  const int64_t* columns;  // the numbers of R's columns; null: 0, 1, ...
  uint64_t stream;
  float* dense = nullptr;  // (size + ones, width) signs
  // Sparse: columns [first[r], first[r + 1]) of `column`, with `sign`, are row r of R.
  int64_t* first = nullptr;
  int32_t* column = nullptr;
  float* sign = nullptr;

  int64_t number(int64_t i) const { return columns == nullptr ? i : columns[i]; }
};

// One side of the product, P or Q: the sum of its parts' products.
struct Side {
  int64_t k, width;  // width: k padded
  int parts;
  Part part[kMaxOutputs];
  float* projected;  // (tokens, width)
};

struct Plan {
  int64_t* starts;
  Side in, out;
  double* grids;  // (threads, grid + sums): elementwise and embedding
  int64_t grid, sums;
};

void plan_side(Scratch& scratch, Kind kind, int64_t tokens, Side& side) {
  side.width = padded(side.k);
  for (int j = 0; j < side.parts; ++j) {
    Part& part = side.part[j];
    if (kind == Kind::rademacher) {
      part.dense = scratch.take<float>((part.size + part.ones) * side.width);
    }
    if (kind == Kind::sjlt) {
      part.first = scratch.take<int64_t>(side.k + 1);
      part.column = scratch.take<int32_t>(part.size);
      part.sign = scratch.take<float>(part.size);
    }
  }
  side.projected = scratch.take<float>(tokens * side.width);
}

Plan make_plan(Scratch& scratch, const Gradients& gradients, const Projection& projection,
               int threads) {
  Plan plan{};
  if (projection.layer == Layer::linear) {
    const int64_t tokens = gradients.batch * gradients.tokens;
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
    plan_side(scratch, projection.kind, tokens, plan.in);
    plan_side(scratch, projection.kind, tokens, plan.out);
  } else {
    plan.grid = projection.k_out * projection.k_in;
    // LayerNorm's sums are made before they are sketched: two more rows behind the grid.
    plan.sums = projection.layer == Layer::elementwise ? 2 * gradients.in : 0;
    plan.grids = scratch.take<double>((plan.grid + plan.sums) * threads);
  }
  return plan;
}

// The four signs that four bits stand for.
constexpr float kSigns[16][4] = {
    {1, 1, 1, 1},   {-1, 1, 1, 1},   {1, -1, 1, 1},   {-1, -1, 1, 1},
    {1, 1, -1, 1},  {-1, 1, -1, 1},  {1, -1, -1, 1},  {-1, -1, -1, 1},
    {1, 1, 1, -1},  {-1, 1, 1, -1},  {1, -1, 1, -1},  {-1, -1, 1, -1},
    {1, 1, -1, -1}, {-1, 1, -1, -1}, {1, -1, -1, -1}, {-1, -1, -1, -1}};

// Column i of R as a row of floats, zero beyond k; width is a multiple of 4.
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

void write_signs(const Side& side, const Part& part, int threads) {
  constexpr int64_t kColumns = 64;
  const int64_t columns = part.size + part.ones;
  parallel_for(threads, ceil_div(columns, kColumns), [&](int64_t item, int) {
    const int64_t end = std::min(columns, (item + 1) * kColumns);
    for (int64_t i = item * kColumns; i < end; ++i) write_column(side, part, i);
  });
}

// Sorts the columns by their row of R, ascending within a row.
void write_lists(const Part& part, int64_t k) {
  std::fill(part.first, part.first + k + 1, 0);
  for (int64_t i = 0; i < part.size; ++i) {
    ++part.first[sparse_entry(part.stream, part.number(i), k).row + 1];
  }
  for (int64_t r = 0; r < k; ++r) part.first[r + 1] += part.first[r];
  // Filling moves first[r] to the end of row r, which is where row r + 1 began: shift back after.
  for (int64_t i = 0; i < part.size; ++i) {
    const SparseEntry entry = sparse_entry(part.stream, part.number(i), k);
    const int64_t place = part.first[entry.row]++;
    part.column[place] = static_cast<int32_t>(i);
    part.sign[place] = entry.sign;
  }
  for (int64_t r = k; r > 0; --r) part.first[r] = part.first[r - 1];
  part.first[0] = 0;
}

void write_projections(const Side& side, Kind kind, int threads) {
  for (int j = 0; j < side.parts; ++j) {
    if (kind == Kind::rademacher) write_signs(side, side.part[j], threads);
    if (kind == Kind::sjlt) write_lists(side.part[j], side.k);
  }
}

// a[m]: the rows of a block of tokens from column `begin` on, as float32.
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

// Pointers to the rows of a block of tokens, of each part.
template <class T>
struct Rows {
  const T* of[kMaxOutputs][kTokenBlock];
};

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
        block_rows(rows.of[p], count, d, depth, buffer, a);
        tiles().outer(a, 1, count, part.dense + d * side.width + n, side.width, columns, depth,
                      sums, kColumnBlock);
      }
    }
    const Part& first = side.part[0];  // the one that may have a bias
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t j = 0; j < columns; ++j) {
        double sum = sums[m * kColumnBlock + j];
        if (first.ones != 0) sum += first.dense[first.size * side.width + n + j];
        projected[m * side.width + n + j] = static_cast<float>(sum);
      }
    }
  }
}

template <class T>
void project_sparse(const Side& side, const Rows<T>& rows, int64_t m, float* projected) {
  const Part& first = side.part[0];
  SparseEntry bias{-1, 0.0f};
  if (first.ones != 0) bias = sparse_entry(first.stream, first.number(first.size), side.k);
  for (int64_t r = 0; r < side.k; ++r) {
    double sum = r == bias.row ? bias.sign : 0.0;
    for (int p = 0; p < side.parts; ++p) {
      const Part& part = side.part[p];
      for (int64_t j = part.first[r]; j < part.first[r + 1]; ++j) {
        sum += static_cast<double>(part.sign[j] * to_float(rows.of[p][m][part.column[j]]));
      }
    }
    projected[r] = static_cast<float>(sum);
  }
  std::fill(projected + side.k, projected + side.width, 0.0f);
}

template <class T>
void project_block(const Side& side, Kind kind, const Gradients& gradients, const int64_t* starts,
                   int64_t begin, int64_t end) {
  Rows<T> rows;
  for_tokens(starts, gradients.batch, gradients.tokens, begin, end, [&](int64_t n, int64_t row) {
    for (int p = 0; p < side.parts; ++p) {
      rows.of[p][n - begin] = static_cast<const T*>(side.part[p].rows) + row * side.part[p].size;
    }
  });
  float* projected = side.projected + begin * side.width;
  if (kind == Kind::rademacher) {
    project_dense(side, rows, end - begin, projected);
    return;
  }
  const Part& first = side.part[0];
  for (int64_t m = 0; m < end - begin; ++m) {
    if (kind == Kind::sjlt) {
      project_sparse(side, rows, m, projected + m * side.width);
    } else {
      widen(rows.of[0][m], first.size, first.ones, side.width, projected + m * side.width);
    }
  }
}

// Rows [m, m + count) of scale * Q^T P over one example's tokens, added to `out` (k_out, k_in).
void add_products(const Plan& plan, int64_t begin, int64_t end, int64_t m, int64_t count,
                  double scale, float* out) {
  double sums[kRowBlock * kColumnBlock];
  const float* a[kRowBlock];
  for (int64_t i = 0; i < count; ++i) a[i] = plan.out.projected + begin * plan.out.width + m + i;
  const float* b = plan.in.projected + begin * plan.in.width;
  for (int64_t n = 0; n < plan.in.width; n += kColumnBlock) {
    const int64_t columns = std::min(kColumnBlock, plan.in.width - n);
    std::fill(sums, sums + count * kColumnBlock, 0.0);
    tiles().outer(a, plan.out.width, count, b + n, plan.in.width, columns, end - begin, sums,
                  kColumnBlock);
    const int64_t written = std::min(columns, plan.in.k - n);
    for (int64_t i = 0; i < count; ++i) {
      float* row = out + (m + i) * plan.in.k + n;
      for (int64_t j = 0; j < written; ++j) {
        row[j] += static_cast<float>(scale * sums[i * kColumnBlock + j]);
      }
    }
  }
}

template <class T>
void project_linear(const Gradients& gradients, const Projection& projection, const Plan& plan,
                    float* out, int64_t stride, int threads) {
  count_tokens(gradients, plan.starts);
  const int64_t tokens = plan.starts[gradients.batch];
  write_projections(plan.in, projection.kind, threads);
  write_projections(plan.out, projection.kind, threads);
  const int64_t blocks = ceil_div(tokens, kTokenBlock);
  parallel_for(threads, 2 * blocks, [&](int64_t item, int) {
    const Side& side = item < blocks ? plan.in : plan.out;
    const int64_t begin = (item % blocks) * kTokenBlock;
    project_block<T>(side, projection.kind, gradients, plan.starts, begin,
                     std::min(tokens, begin + kTokenBlock));
  });
  double scale = 1.0;
  if (projection.kind == Kind::rademacher) {
    scale = 1.0 / std::sqrt(static_cast<double>(plan.in.k) * static_cast<double>(plan.out.k));
  }
  const int64_t bands = ceil_div(plan.out.k, kRowBlock);
  parallel_for(threads, gradients.batch * bands, [&](int64_t item, int) {
    const int64_t b = item / bands, m = item % bands * kRowBlock;
    const int64_t begin = plan.starts[b], end = plan.starts[b + 1];
    if (begin == end) return;
    add_products(plan, begin, end, m, std::min(kRowBlock, plan.out.k - m), scale, out + b * stride);
  });
}

// One example's LayerNorm gradient: sums = [v, u], v_d = sum_s g_sd x_sd, u_d = sum_s g_sd.
template <class T>
void sum_elementwise(const Gradients& gradients, int64_t b, double* sums) {
  const int64_t size = gradients.in;
  std::fill(sums, sums + 2 * size, 0.0);
  for (int64_t s = 0; s < length_of(gradients, b); ++s) {
    const int64_t at = (b * gradients.tokens + s) * size;
    const T* x = static_cast<const T*>(gradients.x) + at;
    const T* g = static_cast<const T*>(gradients.g) + at;
    for (int64_t d = 0; d < size; ++d) {
      sums[d] += static_cast<double>(to_float(g[d])) * static_cast<double>(to_float(x[d]));
      sums[size + d] += static_cast<double>(to_float(g[d]));
    }
  }
}

void add_grid(const double* grid, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] += static_cast<float>(grid[i]);
}

template <class T>
void project_elementwise(const Gradients& gradients, const Projection& projection, const Plan& plan,
                         float* out, int64_t stride, int threads) {
  const int64_t size = gradients.in, rows = projection.bias ? 2 : 1;
  const uint64_t stream = stream_of(projection.seed, projection.output[0].key);
  parallel_for(threads, gradients.batch, [&](int64_t b, int slot) {
    if (length_of(gradients, b) == 0) return;
    double* grid = plan.grids + slot * (plan.grid + plan.sums);
    double* sums = grid + plan.grid;
    sum_elementwise<T>(gradients, b, sums);
    if (projection.kind == Kind::identity) {
      add_grid(sums, rows * size, out + b * stride);
      return;
    }
    std::fill(grid, grid + plan.grid, 0.0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < size; ++d) {
        const uint64_t hash = element_hash(stream, row, d);
        grid[position_of(hash, plan.grid)] += sign_of(hash) * sums[row * size + d];
      }
    }
    add_grid(grid, plan.grid, out + b * stride);
  });
}

template <class T>
void project_embedding(const Gradients& gradients, const Projection& projection, const Plan& plan,
                       float* out, int64_t stride, int threads) {
  const int64_t size = gradients.out;
  const uint64_t stream = stream_of(projection.seed, projection.output[0].key);
  parallel_for(threads, gradients.batch, [&](int64_t b, int slot) {
    if (length_of(gradients, b) == 0) return;
    double* grid = plan.grids + slot * plan.grid;
    std::fill(grid, grid + plan.grid, 0.0);
    for (int64_t s = 0; s < length_of(gradients, b); ++s) {
      const int64_t token = b * gradients.tokens + s;
      const int64_t id = static_cast<const int64_t*>(gradients.x)[token];
      const T* g = static_cast<const T*>(gradients.g) + token * size;
      for (int64_t d = 0; d < size; ++d) {
        const uint64_t hash = element_hash(stream, id, d);
        grid[position_of(hash, plan.grid)] += static_cast<double>(sign_of(hash) * to_float(g[d]));
      }
    }
    add_grid(grid, plan.grid, out + b * stride);
  });
}

template <class T>
void project(const Gradients& gradients, const Projection& projection, const Plan& plan, float* out,
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
  const Plan plan = make_plan(scratch, gradients, projection, threads);
  if (gradients.dtype == DType::bfloat16) {
    project<bfloat16>(gradients, projection, plan, out, stride, threads);
  } else {
    project<float>(gradients, projection, plan, out, stride, threads);
  }
}

}  // namespace tracmod::cpu

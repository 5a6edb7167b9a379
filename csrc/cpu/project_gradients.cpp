// out[b] += sum_j vec(R_out_j G_bj R_in^T),  G_bj = sum_s g_js [x_s, 1]^T over the layers j that read
// the same x; the gradients are never formed:
//
//   P = x R_in^T (S,k_in)    Q = sum_j g_j R_out_j^T (S,k_out)    out[b] += Q^T P
//
// Work: as many examples at a time as leave P and Q in the second cache, in two phases over threads.
// First a block of 48 tokens of P or Q an item. Dense R: with AVX-512 by tables of sums (see
// signs.cpp), else the signs are written out once per call as floats (rows of R are few) and
// multiplied as `outer` tiles. Sparse R: 16 columns at a time, those that are in no whole group one
// by one. Then a band of 48 rows of one example's Q^T P an item, added to its feature row by the
// item that owns it.
//
// Bytes: x and g once, B S (I + O) times 4 or 2. Operations: 2 B S (I k_in + O k_out + k_in k_out);
// tables take three instructions where four multiply-adds would stand, or five where four products
// of bfloat16 pairs would (k = 64), on more units than those, and the vector units are the limit;
// sparse: 2 B S (I + O + k_in k_out), the limit is the read of x and g and, for narrow layers, the
// last term.
//
// LayerNorm (elementwise) and embedding gradients are few sums or sparse: each example's go into
// the grid as a count sketch, in float64, one example an item; one read of x and g is the limit.
#include <algorithm>
#include <cmath>

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

constexpr int64_t kTokenBlock = 48;
constexpr int64_t kWaveTokens = 768;  // of each thread
constexpr int64_t kColumnBlock = 64;
constexpr int64_t kRowBlock = 48;
constexpr int64_t kWidenDepth = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct SparseSingle {
  int32_t column, row;
  float sign;
};

// Rows of `size` values each, and a 1 for the bias, that are multiplied by an R^T of their own.
struct Part {
  const void* rows;
  int64_t size, ones;
  const int64_t* columns;  // the numbers of R's columns; null: 0, 1, ...
  uint64_t stream;
  float* dense = nullptr;      // (size + ones, width) signs, or
  int32_t* indices = nullptr;  // tables' indices: for each 64 rows of R, all columns'
  // Sparse: whole groups of 16 columns, and the entries of the columns that are in none.
  SparseGroup* groups = nullptr;
  SparseSingle* singles = nullptr;
  int64_t group_count = 0, single_count = 0;

  int64_t number(int64_t i) const { return columns == nullptr ? i : columns[i]; }
  int64_t tables() const { return (size + ones + kTableColumns - 1) / kTableColumns; }
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
  int64_t wave;  // tokens whose P and Q are there at a time
  Side in, out;
  float* sums;  // (threads, sums_size): sjlt
  int64_t sums_size;
  double* grids;  // (threads, grid + rows): elementwise and embedding
  int64_t grid, rows;
  float* parts;         // (threads, rows): elementwise
  SparseEntry* places;  // (rows,): of each element in the grid
};

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
    plan_side(scratch, projection.kind, plan.wave, plan.in);
    plan_side(scratch, projection.kind, plan.wave, plan.out);
    if (projection.kind == Kind::sjlt) {
      plan.sums_size = kSparseTokens * (std::max(plan.in.k, plan.out.k) + kSparseGroup);
      plan.sums = scratch.take<float>(plan.sums_size * threads);
    }
  } else {
    plan.grid = projection.k_out * projection.k_in;
    // LayerNorm's sums are made before they are sketched: two more rows behind the grid.
    plan.rows = projection.layer == Layer::elementwise ? 2 * gradients.in : 0;
    plan.grids = scratch.take<double>((plan.grid + plan.rows) * threads);
    plan.parts = scratch.take<float>(plan.rows * threads);
    plan.places = scratch.take<SparseEntry>(plan.rows);
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

// The indices of 64 rows of R from `row` on, from column i on.
int32_t* indices_at(const Side& side, const Part& part, int64_t row, int64_t i) {
  const int64_t rows = std::min(kBlockRows, side.width - row);
  return part.indices + row * part.tables() + i / kTableColumns * rows;
}

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

// Whether columns i ... i + 15 are one group of R's.
bool whole_group(const Part& part, int64_t i) {
  if (i + kSparseGroup > part.size || part.number(i) % kSparseGroup != 0) return false;
  for (int64_t l = 1; l < kSparseGroup; ++l) {
    if (part.number(i + l) != part.number(i) + l) return false;
  }
  return true;
}

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
void project_tables(const Side& side, const Rows<T>& rows, int64_t count, float* projected) {
  std::fill(projected, projected + count * side.width, 0.0f);
  const T* a[kTokenBlock];
  for (int p = 0; p < side.parts; ++p) {
    const Part& part = side.part[p];
    for (int64_t d = 0; d < part.size + part.ones; d += kDenseColumns) {
      const int64_t columns = std::min(kDenseColumns, part.size - d);
      const int64_t ones = std::min(part.ones, kDenseColumns - columns);
      for (int64_t m = 0; m < count; ++m) a[m] = rows.of[p][m] + d;
      for (int64_t r = 0; r < side.width; r += kBlockRows) {
        const int64_t vectors = std::min(kBlockRows, side.width - r) / kColumnUnit;
        add_dense(a, count, columns, ones, indices_at(side, part, r, d), vectors, projected + r,
                  side.width);
      }
    }
  }
}

// projected[0, k) += sums, of which what went beyond the last row belongs to the first ones.
void fold(float* sums, int64_t k, float* projected) {
  for (int64_t r = 0; r < k; ++r) projected[r] += sums[r];
  for (int64_t r = 0; r < kSparseGroup && r < k; ++r) projected[r] += sums[k + r];
  std::fill(sums, sums + k + kSparseGroup, 0.0f);
}

// At most kSparseTokens tokens, after which those from `next` on come; `sums` (kSparseTokens, k + 16) zeros, and so they are left.
template <class T>
void project_sparse(const Side& side, const Rows<T>& rows, int64_t next, int64_t count, float* sums,
                    float* projected) {
  constexpr int64_t kGroups = 256, kSingles = 64;  // additions in a row
  const int64_t ld = side.k + kSparseGroup;
  for (int p = 0; p < side.parts; ++p) {
    const Part& part = side.part[p];
    const int64_t blocks =
        std::max(ceil_div(part.group_count, kGroups), ceil_div(part.single_count, kSingles));
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t groups = std::min(kGroups, part.group_count - i * kGroups);
      const int64_t singles = std::min((i + 1) * kSingles, part.single_count);
      if (groups > 0) {
        add_sparse(rows.of[p], rows.of[p] + next, count, part.groups + i * kGroups, groups, sums,
                   ld);
      }
      for (int64_t m = 0; m < count; ++m) {
        for (int64_t j = i * kSingles; j < singles; ++j) {
          const SparseSingle& single = part.singles[j];
          sums[m * ld + single.row] += single.sign * to_float(rows.of[p][m][single.column]);
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
    Rows<T> some;
    for (int p = 0; p < side.parts; ++p) {
      std::copy(rows.of[p] + begin, rows.of[p] + count, some.of[p]);
    }
    const int64_t next = begin + 2 * kSparseTokens <= count ? kSparseTokens : 0;
    project_sparse(side, some, next, std::min(kSparseTokens, count - begin), sums,
                   projected + begin * side.width);
  }
  const Part& first = side.part[0];  // the one that may have a bias
  if (first.ones == 0) return;
  const SparseEntry bias = sparse_entry(first.stream, first.number(first.size), side.k);
  for (int64_t m = 0; m < count; ++m) projected[m * side.width + bias.row] += bias.sign;
}

template <class T>
void project_block(const Side& side, Kind kind, const Gradients& gradients, const int64_t* starts,
                   int64_t begin, int64_t end, float* sums, float* projected) {
  Rows<T> rows;
  for_tokens(starts, gradients.batch, gradients.tokens, begin, end, [&](int64_t n, int64_t row) {
    for (int p = 0; p < side.parts; ++p) {
      rows.of[p][n - begin] = static_cast<const T*>(side.part[p].rows) + row * side.part[p].size;
    }
  });
  if (kind == Kind::rademacher) {
    if (signs().add_dense != nullptr) return project_tables(side, rows, end - begin, projected);
    return project_dense(side, rows, end - begin, projected);
  }
  if (kind == Kind::sjlt) return project_sparse_block(side, rows, end - begin, sums, projected);
  const Part& first = side.part[0];
  for (int64_t m = 0; m < end - begin; ++m) {
    widen(rows.of[0][m], first.size, first.ones, side.width, projected + m * side.width);
  }
}

// P and Q of tokens [first, end).
template <class T>
void project_tokens(const Gradients& gradients, Kind kind, const Plan& plan, int64_t first,
                    int64_t end, int threads) {
  const int64_t blocks = ceil_div(end - first, kTokenBlock);
  parallel_for(threads, 2 * blocks, [&](int64_t item, int slot) {
    const Side& side = item < blocks ? plan.in : plan.out;
    const int64_t begin = first + (item % blocks) * kTokenBlock;
    project_block<T>(side, kind, gradients, plan.starts, begin, std::min(end, begin + kTokenBlock),
                     plan.sums + slot * plan.sums_size,
                     side.projected + (begin - first) * side.width);
  });
}

// out[b] += scale * Q_b^T P_b of examples [first, end), whose P and Q begin the scratch.
void add_products(const Plan& plan, Kind kind, int64_t first, int64_t end, float* out,
                  int64_t stride, int threads) {
  const Side &in = plan.in, &of = plan.out;
  double scale = 1.0;
  if (kind == Kind::rademacher) {
    scale = 1.0 / std::sqrt(static_cast<double>(in.k) * static_cast<double>(of.k));
  }
  const int64_t bands = ceil_div(of.k, kRowBlock);
  parallel_for(threads, (end - first) * bands, [&](int64_t item, int) {
    const int64_t b = first + item / bands, m = item % bands * kRowBlock;
    const int64_t begin = plan.starts[b] - plan.starts[first];
    signs().add_product(of.projected + begin * of.width + m, of.width,
                        std::min(kRowBlock, of.k - m), in.projected + begin * in.width, in.width,
                        in.k, plan.starts[b + 1] - plan.starts[b], static_cast<float>(scale),
                        out + b * stride + m * in.k, in.k);
  });
}

template <class T>
void project_linear(const Gradients& gradients, const Projection& projection, Plan& plan,
                    float* out, int64_t stride, int threads) {
  count_tokens(gradients, plan.starts);
  write_projections(plan.in, projection.kind, threads);
  write_projections(plan.out, projection.kind, threads);
  for (int64_t first = 0; first < gradients.batch;) {
    int64_t end = first + 1;
    while (end < gradients.batch && plan.starts[end + 1] - plan.starts[first] <= plan.wave) ++end;
    project_tokens<T>(gradients, projection.kind, plan, plan.starts[first], plan.starts[end],
                      threads);
    add_products(plan, projection.kind, first, end, out, stride, threads);
    first = end;
  }
}

// One example's LayerNorm gradient: sums = [v, u], v_d = sum_s g_sd x_sd, u_d = sum_s g_sd, float32
// in blocks of tokens (`part`, as large as sums), float64 across.
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

template <class T>
void project_elementwise(const Gradients& gradients, const Projection& projection, const Plan& plan,
                         float* out, int64_t stride, int threads) {
  const int64_t size = gradients.in, rows = projection.bias ? 2 : 1;
  const uint64_t stream = stream_of(projection.seed, projection.output[0].key);
  for (int64_t i = 0; projection.kind != Kind::identity && i < rows * size; ++i) {
    const uint64_t hash = element_hash(stream, i / size, i % size);
    plan.places[i] = {position_of(hash, plan.grid), sign_of(hash)};
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
      grid[plan.places[i].row] += static_cast<double>(plan.places[i].sign) * sums[i];
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
    constexpr float kSign[2] = {1.0f, -1.0f};
    uint32_t places[kSketchColumns];
    std::fill(grid, grid + plan.grid, 0.0);
    for (int64_t s = 0; s < length_of(gradients, b); ++s) {
      const int64_t token = b * gradients.tokens + s;
      const int64_t id = static_cast<const int64_t*>(gradients.x)[token];
      const T* g = static_cast<const T*>(gradients.g) + token * size;
      const uint64_t row = step(stream, id);
      for (int64_t first = 0; first < size; first += kSketchColumns) {
        const int64_t columns = std::min(kSketchColumns, size - first);
        sketch_places(row, first, columns, plan.grid, places);
        for (int64_t d = 0; d < columns; ++d) {
          const float sign = kSign[places[d] & 1];  // a branch would be wrong every other time
          grid[places[d] >> 1] += static_cast<double>(sign * to_float(g[first + d]));
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

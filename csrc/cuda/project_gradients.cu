// out[b] += sum_j vec(R_out_j G_bj R_in^T),  G_bj = sum_s g_js [x_s, 1]^T over the layers j that read
// the same x, in three launches for linear layers:
//
//   project_tokens   P = x R_in^T (B,S,k_in), then Q = sum_j g_j R_out_j^T (B,S,k_out), into scratch.
//                    A block owns 64 tokens of one example x 64 rows of R; signs are made where
//                    they are used. Blocks past the example's length return at once.
//   add_products     out[b] += Q_b^T P_b. A block owns 64 x 64 numbers of one example's feature
//                    row: one writer each, no atomics. identity: straight from g and [x, 1].
//
// Bytes: x and g once per 64 rows of R, B S (I + O) times 4 or 2; P and Q 8 B S (k_in + k_out).
// Operations: 2 B S (I k_in + O k_out + k_in k_out), float32: at k = 64, 32 or 64 a byte of input,
// so the float32 units are the limit here; with matrix units and both launches in one it would be
// the read of x and g.
//
// LayerNorm (elementwise): sum_elementwise makes v and u into scratch, a thread per feature; sketch
// adds them into the grid. Embedding: sketch reads the tokens. A block of sketch owns one example's
// grid, a thread the positions that equal its number modulo 256: it looks at every element and adds
// its own, in order. Operations 256 per element: the integer units are the limit.
#include "cuda/tile.cuh"
#include "random.h"
#include "scratch.h"

namespace tracmod::cuda {
namespace {

constexpr char kOp[] = "project_gradients";
constexpr int kThreads = 256;

// Rows [first, first + 64) of R as the second operand of a tile.
template <Kind kind>
struct Entries {
  static constexpr bool kAlongDepth = true;
  uint64_t stream;
  const int64_t* columns;  // the numbers of R's columns; null: 0, 1, ...
  int64_t k, first;

  __device__ float operator()(int64_t row, int64_t i) const {
    const int64_t r = first + row;
    if (r >= k) return 0.0f;
    const int64_t column = columns == nullptr ? i : columns[i];
    if (kind == Kind::rademacher) {
      return sign_of_bit(sign_word(stream, column, r / 64), static_cast<int>(r % 64));
    }
    const SparseEntry entry = sparse_entry(stream, column, k);
    return entry.row == r ? entry.sign : 0.0f;
  }
};

// `size` values a token (and a one for the bias) that are multiplied by an R^T of their own.
struct Part {
  const void* rows;
  int64_t size;
  bool one;
  const int64_t* columns;
  uint64_t stream;
};

// One side of the product, P or Q: the sum of its parts' products.
struct Side {
  int64_t k;
  int parts;
  Part part[kMaxOutputs];
  float* projected;  // (B, S, k)
};

template <class T, Kind kind>
__global__ void __launch_bounds__(kTileThreads)
    project_tokens(Side side, Lengths lengths, int64_t token_tiles) {
  __shared__ TileMemory memory;
  const int64_t b = blockIdx.x / token_tiles, s = blockIdx.x % token_tiles * kTile;
  const int64_t left = lengths.of(b) - s;
  if (left <= 0) return;
  const int64_t token = b * lengths.tokens + s;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTile;
  float total[kPerThread][kPerThread] = {};
  for (int p = 0; p < side.parts; ++p) {
    const Part& part = side.part[p];
    const Entries<kind> entries{part.stream, part.columns, side.k, first};
    const MatrixRows<T> rows{static_cast<const T*>(part.rows) + token * part.size, part.size, left};
    float sum[kPerThread][kPerThread];
    multiply_tile(rows, entries, part.size, memory, sum);
    for (int j = 0; j < kPerThread; ++j) {
      const float bias = part.one ? entries(tile_column(j), part.size) : 0.0f;
      for (int i = 0; i < kPerThread; ++i) total[i][j] += sum[i][j] + bias;
    }
  }
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t r = first + tile_column(j);
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t row = tile_row(i);
      if (r < side.k && row < left) side.projected[(token + row) * side.k + r] = total[i][j];
    }
  }
}

// The two factors of a feature row: (B, S, m_width) and (B, S, n_width); columns from n_width to
// n_count are ones.
template <class T>
struct Factors {
  const T *m, *n;
  int64_t m_width, n_width, n_count;
};

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    add_products(Factors<T> factors, Lengths lengths, float scale, float* out, int64_t stride) {
  __shared__ TileMemory memory;
  const int64_t b = blockIdx.x, tokens = lengths.of(b);
  const int64_t n = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t m = static_cast<int64_t>(blockIdx.z) * kTile;
  const bool bad = lengths.bad(b);
  if (tokens == 0 && !bad) return;
  const MatrixColumns<T> rows{factors.m + b * lengths.tokens * factors.m_width, factors.m_width, m,
                              factors.m_width};
  const MatrixColumns<T> columns{factors.n + b * lengths.tokens * factors.n_width, factors.n_width,
                                 n, factors.n_count};
  float sum[kPerThread][kPerThread];
  multiply_tile(rows, columns, tokens, memory, sum);
  for (int i = 0; i < kPerThread; ++i) {
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t row = m + tile_row(i), column = n + tile_column(j);
      if (row >= factors.m_width || column >= factors.n_count) continue;
      const float value = bad ? not_a_number() : scale * sum[i][j];
      out[b * stride + row * factors.n_count + column] += value;
    }
  }
}

// sums (B, 2, D) = [v, u].
template <class T>
__global__ void sum_elementwise(const T* x, const T* g, int64_t size, Lengths lengths,
                                float* sums) {
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x, b = blockIdx.x;
  if (d >= size) return;
  float weight = 0.0f, shift = 0.0f;
  for (int64_t s = 0; s < lengths.of(b); ++s) {
    const int64_t at = (b * lengths.tokens + s) * size + d;
    const float value = to_float(g[at]);
    weight += value * to_float(x[at]);
    shift += value;
  }
  const float bad = lengths.bad(b) ? not_a_number() : 0.0f;
  sums[2 * b * size + d] = weight + bad;
  sums[(2 * b + 1) * size + d] = shift + bad;
}

__global__ void add_sums(const float* sums, int64_t sums_stride, int64_t count, float* out,
                         int64_t stride) {
  const int64_t b = blockIdx.x, at = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (at < count) out[b * stride + at] += sums[b * sums_stride + at];
}

// The elements of an example's gradient: `rows` rows of `size` values; row r is hashed as id[r], or
// as r itself.
template <class T>
struct Elements {
  const T* values;
  const int64_t* ids;
  int64_t rows_stride, rows, size;  // rows_stride: rows of an example that are stored
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    sketch(Elements<T> elements, Lengths lengths, uint64_t stream, int64_t grid, float* out,
           int64_t stride) {
  __shared__ int64_t positions[kThreads];
  __shared__ float values[kThreads];
  const int64_t b = blockIdx.x;
  const int mine = static_cast<int>(threadIdx.x);
  float* row = out + b * stride;
  if (lengths.bad(b)) {
    for (int64_t at = mine; at < grid; at += kThreads) row[at] = not_a_number();
    return;
  }
  const int64_t rows = elements.ids == nullptr ? elements.rows : lengths.of(b);
  const int64_t count = lengths.of(b) == 0 ? 0 : rows * elements.size;
  for (int64_t begin = 0; begin < count; begin += kThreads) {
    const int64_t at = begin + mine;
    if (at < count) {
      const int64_t r = b * elements.rows_stride + at / elements.size, d = at % elements.size;
      const int64_t id = elements.ids == nullptr ? at / elements.size : elements.ids[r];
      const uint64_t hash = element_hash(stream, id, d);
      positions[mine] = position_of(hash, grid);
      values[mine] = sign_of(hash) * to_float(elements.values[r * elements.size + d]);
    } else {
      positions[mine] = -1;  // no thread's
    }
    __syncthreads();
    for (int i = 0; i < kThreads; ++i) {
      const int64_t position = positions[i];
      if (position >= 0 && position % kThreads == mine) row[position] += values[i];
    }
    __syncthreads();
  }
}

struct Plan {
  Side in, out;
  float* sums;  // (B, 2, D): LayerNorm
};

Plan make_plan(Scratch& scratch, const Gradients& gradients, const Projection& projection) {
  Plan plan{};
  if (projection.layer == Layer::linear && projection.kind != Kind::identity) {
    const int64_t tokens = gradients.batch * gradients.tokens;
    plan.in.k = projection.k_in;
    plan.in.parts = 1;
    plan.in.part[0] = {gradients.x, gradients.in, projection.bias, projection.input_columns,
                       stream_of(projection.seed, projection.input_key)};
    plan.in.projected = scratch.take<float>(tokens * projection.k_in);
    plan.out.k = projection.k_out;
    plan.out.parts = projection.outputs;
    for (int j = 0; j < projection.outputs; ++j) {
      const Output& output = projection.output[j];
      plan.out.part[j] = {output.g, output.size, false, output.columns,
                          stream_of(projection.seed, output.key)};
    }
    plan.out.projected = scratch.take<float>(tokens * projection.k_out);
  }
  if (projection.layer == Layer::elementwise) {
    plan.sums = scratch.take<float>(2 * gradients.batch * gradients.in);
  }
  return plan;
}

template <class T>
void launch_projection(const Side& side, const Gradients& gradients, Kind kind,
                       cudaStream_t stream) {
  const int64_t tiles = ceil_div(gradients.tokens, kTile);
  if (tiles == 0) return;
  const dim3 blocks(static_cast<unsigned>(gradients.batch * tiles),
                    static_cast<unsigned>(ceil_div(side.k, kTile)));
  const Lengths lengths = lengths_of(gradients);
  if (kind == Kind::rademacher) {
    project_tokens<T, Kind::rademacher><<<blocks, kTileThreads, 0, stream>>>(side, lengths, tiles);
  } else {
    project_tokens<T, Kind::sjlt><<<blocks, kTileThreads, 0, stream>>>(side, lengths, tiles);
  }
  check_launch(kOp);
}

template <class T>
void launch_products(const Factors<T>& factors, const Gradients& gradients, double scale,
                     float* out, int64_t stride, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(gradients.batch),
                    static_cast<unsigned>(ceil_div(factors.n_count, kTile)),
                    static_cast<unsigned>(ceil_div(factors.m_width, kTile)));
  add_products<T><<<blocks, kTileThreads, 0, stream>>>(factors, lengths_of(gradients),
                                                       static_cast<float>(scale), out, stride);
  check_launch(kOp);
}

template <class T>
void project_linear(const Gradients& gradients, const Projection& projection, const Plan& plan,
                    float* out, int64_t stride, cudaStream_t stream) {
  if (projection.kind == Kind::identity) {
    const Factors<T> raw{static_cast<const T*>(gradients.g), static_cast<const T*>(gradients.x),
                         gradients.out, gradients.in, projection.k_in};
    launch_products<T>(raw, gradients, 1.0, out, stride, stream);
    return;
  }
  launch_projection<T>(plan.in, gradients, projection.kind, stream);
  launch_projection<T>(plan.out, gradients, projection.kind, stream);
  const Factors<float> factors{plan.out.projected, plan.in.projected, plan.out.k, plan.in.k,
                               plan.in.k};
  double scale = 1.0;
  if (projection.kind == Kind::rademacher) {
    scale = 1.0 / sqrt(static_cast<double>(plan.in.k) * static_cast<double>(plan.out.k));
  }
  launch_products<float>(factors, gradients, scale, out, stride, stream);
}

template <class T>
void project_elementwise(const Gradients& gradients, const Projection& projection, const Plan& plan,
                         float* out, int64_t stride, cudaStream_t stream) {
  const int64_t size = gradients.in, rows = projection.bias ? 2 : 1;
  const unsigned batch = static_cast<unsigned>(gradients.batch);
  const Lengths lengths = lengths_of(gradients);
  const dim3 blocks(batch, static_cast<unsigned>(ceil_div(size, kThreads)));
  sum_elementwise<T><<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(gradients.x),
                                                      static_cast<const T*>(gradients.g), size,
                                                      lengths, plan.sums);
  check_launch(kOp);
  if (projection.kind == Kind::identity) {
    const dim3 all(batch, static_cast<unsigned>(ceil_div(rows * size, kThreads)));
    add_sums<<<all, kThreads, 0, stream>>>(plan.sums, 2 * size, rows * size, out, stride);
  } else {
    const Elements<float> elements{plan.sums, nullptr, 2, rows, size};
    sketch<float><<<batch, kThreads, 0, stream>>>(
        elements, lengths, stream_of(projection.seed, projection.output[0].key),
        projection.k_out * projection.k_in, out, stride);
  }
  check_launch(kOp);
}

template <class T>
void project_embedding(const Gradients& gradients, const Projection& projection, float* out,
                       int64_t stride, cudaStream_t stream) {
  const Elements<T> elements{static_cast<const T*>(gradients.g),
                             static_cast<const int64_t*>(gradients.x), gradients.tokens,
                             gradients.tokens, gradients.out};
  sketch<T><<<static_cast<unsigned>(gradients.batch), kThreads, 0, stream>>>(
      elements, lengths_of(gradients), stream_of(projection.seed, projection.output[0].key),
      projection.k_out * projection.k_in, out, stride);
  check_launch(kOp);
}

template <class T>
void project(const Gradients& gradients, const Projection& projection, const Plan& plan, float* out,
             int64_t stride, cudaStream_t stream) {
  switch (projection.layer) {
    case Layer::linear:
      return project_linear<T>(gradients, projection, plan, out, stride, stream);
    case Layer::elementwise:
      return project_elementwise<T>(gradients, projection, plan, out, stride, stream);
    case Layer::embedding:
      return project_embedding<T>(gradients, projection, out, stride, stream);
  }
}

}  // namespace

size_t project_gradients_scratch(const Gradients& gradients, const Projection& projection) {
  Scratch scratch;
  make_plan(scratch, gradients, projection);
  return scratch.bytes();
}

void project_gradients(const Gradients& gradients, const Projection& projection, float* out,
                       int64_t stride, void* memory, void* stream) {
  Scratch scratch(memory);
  const Plan plan = make_plan(scratch, gradients, projection);
  const auto on = static_cast<cudaStream_t>(stream);
  if (gradients.dtype == DType::bfloat16) {
    project<__nv_bfloat16>(gradients, projection, plan, out, stride, on);
  } else {
    project<float>(gradients, projection, plan, out, stride, on);
  }
}

}  // namespace tracmod::cuda

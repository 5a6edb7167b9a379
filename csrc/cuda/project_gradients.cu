// Projected per-example gradients of a layer, added to the feature rows out (B, stride):
//
//   out[b] += sum_j vec(R_out_j G_bj R_in^T),   G_bj = sum_s g_bjs [x_bs, 1]^T  (O_j, I + bias),
//
// summed over the layers j that read the same x.
//
// Linear layers take one launch of project_tiles (project.cuh), which never forms G:
// P = [x, 1] R_in^T and Q = sum_j g_j R_out_j^T, each (tokens, 64) in float32, stay on the chip,
// then out[b] += Q_b^T P_b.
//
//   Block: 64 x 64 features of as many examples as fit into 128 tokens, or of one longer example,
//   128 tokens at a time. Each feature has one writer, so there are no atomics. Sums run over 16,
//   then 64, then all tokens of one example; no other example, tile boundary or padding changes a
//   bit. If few long examples would leave multiprocessors idle, a block owns only one tile and
//   stores its sums of 64 tokens, and add_sums_in_order adds them in the same order. Padding is not
//   read, and not multiplied where 16 rows have no token.
//
//   Bytes: x and every g once per 64 x 64 features, B S (I + sum O) (2 or 4), and the features are
//   read and written, 8 k_out k_in per example, which dominates for short examples.
//   Operations: 2 B S (k (I + sum O) + k_out k_in) on the tensor cores. +-1 is exact in bfloat16,
//   so a bfloat16 value takes one product; a float32 takes three, its 24 bits in three parts. Q^T P
//   takes three products in tf32.
//   Limit on an H200 (4.8 TB/s, 989 TFLOP/s): the read of x and g. At k = 64 a byte of bfloat16
//   takes 64 operations, 0.3 of what the tensor cores can do in the time of its read, or 0.6 if
//   mma.sync reaches half their rate. Issuing the instructions takes nearly as long as the read
//   (about 300 per warp for 2 KB, of which 128 unpack signs); for float32 the three products do.
//   These figures are counted in the SASS; this file has not run on a GPU yet.
//
// identity: add_exact forms the gradient directly from g and [x, 1]; a block owns 64 x 64 of it.
//
// sketch: with `rows`, reduce_outputs computes Q = sum_j g_j R_out_j^T (tokens, rows) and form the
// gradients Q_b^T [x, 1], both into scratch and without tensor cores, so float32 multiply-adds are
// the limit there. A warp of sketch_formed owns a slice of the rows of an example's gradient. It forms 32
// neighbouring numbers of a row at a time and adds them to its own K sums; 16 numbers that share a
// hash have different positions, so half a warp adds them at once and the other half then does.
// add_slices adds the sums of all slices in order. No number of slices depends on the batch. The
// sums of a slice stay in the caches; the latency of an addition there is the limit, which many
// warps hide.
//
// LayerNorm (elementwise): sum_elementwise forms v = sum_s g_s x_s and u = sum_s g_s in scratch (a
// thread owns one feature), and sketch adds them to the features as a count sketch (random.h).
// Embedding: sketch reads the tokens directly. A block of sketch owns the buckets of one example; a
// thread owns the buckets that equal its number modulo 256, looks at every element and adds its
// own, in order. That costs 256 comparisons per element, so the integer units are the limit; it is
// the price of sums that repeat bit by bit without float atomics.
#include <algorithm>
#include <climits>
#include <cmath>

#include "cuda/project.cuh"
#include "cuda/tile.cuh"
#include "random.h"
#include "scratch.h"

namespace tracmod::cuda {
namespace {

using namespace fused;

constexpr char kOp[] = "project_gradients";
constexpr int kThreads = 256;

// The two factors of a gradient: m (B, S, m_width) and n (B, S, n_width). Column n_width of n, if
// below n_count, is a column of ones.
template <class T>
struct Factors {
  const T *m, *n;
  int64_t m_width, n_width, n_count;
};

// out[b] += the gradient of example b itself; a block owns 64 x 64 numbers of it.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    add_exact(Factors<T> factors, Lengths lengths, float* out, int64_t stride) {
  __shared__ TileMemory memory;
  const int64_t b = blockIdx.x, tokens = lengths.of(b);
  const int64_t n = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t m = static_cast<int64_t>(blockIdx.z) * kTile;
  const bool invalid = lengths.invalid(b);
  if (tokens == 0 && !invalid) return;
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
      const float value = invalid ? not_a_number() : sum[i][j];
      out[b * stride + row * factors.n_count + column] += value;
    }
  }
}

// sums (B, 2, D) = [v, u]; a thread owns one feature of one example.
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
  const float invalid = lengths.invalid(b) ? not_a_number() : 0.0f;
  sums[2 * b * size + d] = weight + invalid;
  sums[(2 * b + 1) * size + d] = shift + invalid;
}

// out[b] += sums[b] (kind identity); a thread owns one number.
__global__ void add_sums(const float* sums, int64_t sums_stride, int64_t count, float* out,
                         int64_t stride) {
  const int64_t b = blockIdx.x, at = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (at < count) out[b * stride + at] += sums[b * sums_stride + at];
}

// The elements of an example's gradient: `rows` rows of `size` values. Row r is hashed as ids[r],
// or as r if ids is null; the rows of the next example start rows_stride rows later.
template <class T>
struct Elements {
  const T* values;
  const int64_t* ids;
  int64_t rows_stride, rows, size;
};

// A gradient that is formed and sketched: g (B, S, rows), x (B, S, width), and a column of ones for
// the bias behind x if columns > width. Row and column numbers are null for 0, 1, ...
template <class T>
struct Formed {
  const T *g, *x;
  int64_t rows, width, columns;
  const int64_t *row_numbers, *column_numbers;
  uint64_t stream, column_stream;
  int64_t size;         // K, of the slot
  int64_t slice;        // rows of a slice
  float* sums;          // (examples, slices, K)
  const float* values;  // (examples, rows, columns) the gradient if it is formed already, or null
  float scale;
};

// Tokens [first, first + 64) of a source as an operand of multiply_tile.
template <class T>
struct TokenRows {
  static constexpr bool kAlongDepth = true;
  const T* tokens;
  int64_t size, first, count;

  __device__ float operator()(int64_t row, int64_t d) const {
    return first + row < count ? to_float(tokens[(first + row) * size + d]) : 0.0f;
  }
};

// Rows [first, first + 64) of R_out, without its scale.
struct SignRows {
  static constexpr bool kAlongDepth = false;
  const int64_t* numbers;
  uint64_t stream;
  int64_t first, count;

  __device__ float operator()(int64_t row, int64_t d) const {
    const int64_t r = first + row;
    if (r >= count) return 0.0f;
    const uint64_t word = sign_word(stream, numbers == nullptr ? d : numbers[d], r / 64);
    return sign_of_bit(word, static_cast<int>(r % 64));
  }
};

// The outputs of a linear layer, for reduce_outputs.
struct Outputs {
  int count;
  const void* g[kMaxOutputs];
  int64_t sizes[kMaxOutputs];
  const int64_t* numbers[kMaxOutputs];
  uint64_t streams[kMaxOutputs];
};

// q (tokens, rows) = sum_j g_j R_out_j^T of the tokens from `first_token` on; a block owns 64 x 64.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    reduce_outputs(const __grid_constant__ Outputs outputs, int64_t first_token, int64_t tokens,
                   int64_t rows, float* q) {
  __shared__ TileMemory memory;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTile;
  float total[kPerThread][kPerThread] = {};
  for (int output = 0; output < outputs.count; ++output) {
    const int64_t size = outputs.sizes[output];
    const TokenRows<T> a{static_cast<const T*>(outputs.g[output]) + first_token * size, size, token,
                         tokens};
    const SignRows b{outputs.numbers[output], outputs.streams[output], first, rows};
    float sum[kPerThread][kPerThread];
    multiply_tile(a, b, size, memory, sum);
    for (int i = 0; i < kPerThread; ++i) {
      for (int j = 0; j < kPerThread; ++j) total[i][j] += sum[i][j];
    }
  }
  for (int i = 0; i < kPerThread; ++i) {
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t row = token + tile_row(i), column = first + tile_column(j);
      if (row < tokens && column < rows) q[row * rows + column] = total[i][j];
    }
  }
}

// formed (examples, rows, columns) = sum_s q_s [x_s, 1]^T; a block owns 64 x 64 of an example.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    form(const float* q, int64_t rows, const T* x, int64_t width, int64_t columns, Lengths lengths,
         int64_t first_example, float* formed) {
  __shared__ TileMemory memory;
  const int64_t b = first_example + blockIdx.x;
  const int64_t n = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t m = static_cast<int64_t>(blockIdx.z) * kTile;
  const MatrixColumns<float> left{q + blockIdx.x * lengths.tokens * rows, rows, m, rows};
  const MatrixColumns<T> right{x + b * lengths.tokens * width, width, n, columns};
  float sum[kPerThread][kPerThread];
  multiply_tile(left, right, lengths.of(b), memory, sum);
  for (int i = 0; i < kPerThread; ++i) {
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t row = m + tile_row(i), column = n + tile_column(j);
      if (row < rows && column < columns) {
        formed[(blockIdx.x * rows + row) * columns + column] = sum[i][j];
      }
    }
  }
}

// Element (row, column) of the gradient of an example, in float32 sums of 32 tokens.
template <class T>
__device__ float formed_element(const Formed<T>& formed, int64_t first, int64_t tokens, int64_t row,
                                int64_t column) {
  float total = 0.0f;
  for (int64_t block = 0; block < tokens; block += 32) {
    float sum = 0.0f;
    for (int64_t s = block; s < block + 32 && s < tokens; ++s) {
      const float value = to_float(formed.g[(first + s) * formed.rows + row]);
      sum += column < formed.width
                 ? value * to_float(formed.x[(first + s) * formed.width + column])
                 : value;
    }
    total += sum;
  }
  return total;
}

// Whether the 16 columns of this half of the warp, or those of them that exist, share a hash, and so
// have different positions.
__device__ bool halves_are_groups(int64_t number, bool exists, int lane) {
  const int group = exists ? static_cast<int>(number / kSparseGroup) : -1;
  const int first = __shfl_sync(0xffffffffu, group, lane & 16);
  int same = group == -1 || group == first;
  for (int mask = 16; mask > 0; mask /= 2) same &= __shfl_xor_sync(0xffffffffu, same, mask);
  return same != 0;
}

// One warp: the sums of one slice of the rows of one example.
template <class T>
__global__ void __launch_bounds__(32)
    sketch_formed(Formed<T> formed, Lengths lengths, int64_t first_example) {
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t b = first_example + blockIdx.x, tokens = lengths.of(b);
  float* sums = formed.sums + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) *
                                  formed.size;
  for (int64_t at = lane; at < formed.size; at += 32) sums[at] = 0.0f;
  __syncwarp();
  if (tokens == 0) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * formed.slice;
  for (int64_t column = 0; column < formed.columns; column += 32) {
    const int64_t i = column + lane;
    const bool exists = i < formed.columns;
    const int64_t number =
        !exists ? 0 : formed.column_numbers == nullptr ? i : formed.column_numbers[i];
    const bool groups = formed.size >= kSparseGroup && halves_are_groups(number, exists, lane);
    const int64_t hash_number = formed_hash_number(number, formed.size);
    const int64_t lane_behind = formed_lane(number, formed.size);
    const float column_sign = sign_of(step(formed.column_stream, number));
    for (int64_t row = begin; row < begin + formed.slice && row < formed.rows; ++row) {
      const int64_t row_number = formed.row_numbers == nullptr ? row : formed.row_numbers[row];
      const uint64_t hash = step(step(formed.stream, row_number), hash_number);
      const int64_t position = position_of(hash, formed.size) + lane_behind;
      float* sum = sums + (position < formed.size ? position : position - formed.size);
      float value = 0.0f;
      if (exists && formed.values != nullptr) {
        value = formed.values[(blockIdx.x * formed.rows + row) * formed.columns + i];
      } else if (exists) {
        value = formed_element(formed, b * lengths.tokens, tokens, row, i);
      }
      value *= sign_of(hash) * column_sign * formed.scale;
      const int steps = groups ? 2 : 32, turn = groups ? lane / 16 : lane;
      for (int at = 0; at < steps; ++at) {
        if (turn == at && exists) *sum += value;
        __syncwarp();
      }
    }
  }
}

// out[b] += the sums of all slices of example b, in order; a thread owns one number.
__global__ void add_slices(const float* sums, int64_t slices, int64_t size, Lengths lengths,
                           int64_t first_example, float* out, int64_t stride) {
  const int64_t at = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t b = first_example + blockIdx.x;
  if (at >= size) return;
  float total = 0.0f;
  for (int64_t slice = 0; slice < slices; ++slice) {
    total += sums[(static_cast<int64_t>(blockIdx.x) * slices + slice) * size + at];
  }
  out[b * stride + at] += lengths.invalid(b) ? not_a_number() : total;
}

// out[b] += count sketch of the elements of example b; a block owns one example. 256 elements at a
// time, each thread hashes one element; then each thread goes through all 256 in order and adds
// those whose bucket it owns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sketch(Elements<T> elements, Lengths lengths, uint64_t stream, int64_t grid, float* out,
           int64_t stride) {
  __shared__ int64_t positions[kThreads];
  __shared__ float values[kThreads];
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  float* row = out + b * stride;
  if (lengths.invalid(b)) {
    for (int64_t at = thread; at < grid; at += kThreads) row[at] = not_a_number();
    return;
  }
  const int64_t rows = elements.ids == nullptr ? elements.rows : lengths.of(b);
  const int64_t count = lengths.of(b) == 0 ? 0 : rows * elements.size;
  for (int64_t begin = 0; begin < count; begin += kThreads) {
    const int64_t at = begin + thread;
    if (at < count) {
      const int64_t r = b * elements.rows_stride + at / elements.size, d = at % elements.size;
      const int64_t id = elements.ids == nullptr ? at / elements.size : elements.ids[r];
      const uint64_t hash = element_hash(stream, id, d);
      positions[thread] = position_of(hash, grid);
      values[thread] = sign_of(hash) * to_float(elements.values[r * elements.size + d]);
    } else {
      positions[thread] = -1;  // owned by no thread
    }
    __syncthreads();
    for (int i = 0; i < kThreads; ++i) {
      const int64_t position = positions[i];
      if (position >= 0 && position % kThreads == thread) row[position] += values[i];
    }
    __syncthreads();
  }
}

// Adds the sums of 64 tokens of each example in the order in which project_tiles adds them if one
// block owns all tiles of an example. A thread owns one feature.
__global__ void add_sums_in_order(const __grid_constant__ Job job) {
  const int64_t b = blockIdx.x, size = static_cast<int64_t>(job.k_out) * job.k_in;
  const int64_t at = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  const int64_t tokens = job.lengths.of(b);
  if (at >= size || tokens == 0) return;
  float value = job.out[b * job.stride + at];
  for (int64_t token = 0; token < tokens; token += kSumTokens) {
    value = fmaf(job.scale, job.sums_of(b, token)[at], value);
  }
  job.out[b * job.stride + at] = value;
}

// Launchers.

constexpr int kBlocksWanted = 264;  // two for every multiprocessor of an H200

constexpr int64_t kMaxSums = int64_t{1} << 24;  // numbers of scratch

// Rows of a slice of a gradient that is sketched, and the slices of an example. They depend on the
// layer only, so that sums do not depend on the batch.
constexpr int64_t kSliceRows = 32;
constexpr int64_t kMaxSlices = 32;

struct SketchSizes {
  int64_t rows, columns;  // of the gradient that is sketched
  int64_t slice, slices;  // rows of a slice, slices of an example
  int64_t sums, q, formed;  // numbers of scratch per example; the last two 0 if `rows` is 0
  int64_t together;         // examples in scratch at a time
};

SketchSizes sketch_sizes(const Gradients& gradients, const Projection& projection) {
  SketchSizes sizes{};
  sizes.rows = projection.rows > 0 ? projection.rows : gradients.out;
  sizes.columns = gradients.in + (projection.bias ? 1 : 0);
  sizes.slice = std::max(kSliceRows, ceil_div(sizes.rows, kMaxSlices));
  sizes.slices = ceil_div(sizes.rows, sizes.slice);
  sizes.sums = sizes.slices * projection.k_out * projection.k_in;
  sizes.q = projection.rows * gradients.tokens;
  sizes.formed = projection.rows * sizes.columns;
  const int64_t all = sizes.sums + sizes.q + sizes.formed;
  sizes.together = std::min(gradients.batch, std::max<int64_t>(1, kMaxSums / all));
  return sizes;
}

// If there are fewer blocks than multiprocessors want, and each has several tiles to do, every tile
// becomes a block. Returns the numbers of scratch for the sums of 64 tokens, or 0 if that is not
// so.
int64_t sums_wanted(const Gradients& gradients, const Projection& projection) {
  if (projection.layer != Layer::linear || projection.kind == Kind::identity) return 0;
  if (projection.kind == Kind::sketch) {
    const SketchSizes sizes = sketch_sizes(gradients, projection);
    return sizes.together * (sizes.sums + sizes.q + sizes.formed);
  }
  const int64_t parts = ceil_div(projection.k_out, kRows) * ceil_div(projection.k_in, kRows);
  if (gradients.tokens <= kTileTokens || gradients.batch * parts >= kBlocksWanted) return 0;
  const int64_t sums =
      gradients.batch * ceil_div(gradients.tokens, kSumTokens) * projection.k_out * projection.k_in;
  return sums <= kMaxSums ? sums : 0;
}

// The kernels use 32-bit sizes, which keeps their registers within 128 per thread.
int checked_int(int64_t size, const char* argument) {
  if (size > INT_MAX) {
    throw std::invalid_argument(std::string(kOp) + ": " + argument +
                                ": expected a size of at most " + std::to_string(INT_MAX) +
                                ", got " + std::to_string(size));
  }
  return static_cast<int>(size);
}

Source source_of(const void* rows, int64_t size, const int64_t* columns, uint64_t stream,
                 DType dtype) {
  const int64_t bytes = size * (dtype == DType::bfloat16 ? 2 : 4);
  const bool aligned = reinterpret_cast<uintptr_t>(rows) % 16 == 0 && bytes % 16 == 0;
  return {rows, checked_int(size, "x and g"), columns, stream, aligned};
}

// Several whole examples share a tile if they fit, but only as many as leave enough blocks to fill
// the GPU.
Job job_of(const Gradients& gradients, const Projection& projection, float* sums, float* out,
           int64_t stride) {
  const int tokens = std::max(1, checked_int(gradients.tokens, "x"));
  Job job{};
  job.sources[0] = source_of(gradients.x, gradients.in, projection.input_columns,
                             stream_of(projection.seed, projection.input_key), gradients.dtype);
  for (int j = 0; j < projection.outputs; ++j) {
    const Output& output = projection.output[j];
    job.sources[1 + j] = source_of(output.g, output.size, output.columns,
                                   stream_of(projection.seed, output.key), gradients.dtype);
  }
  job.count = 1 + projection.outputs;
  job.bias = projection.bias;
  job.lengths = lengths_of(gradients);
  job.batch = checked_int(gradients.batch, "x");
  job.span = std::min(tokens, kTileTokens);
  const int wanted = static_cast<int>(ceil_div(job.batch, kBlocksWanted));
  job.examples = std::max(1, std::min(kTileTokens / tokens, wanted));
  job.tiles = sums == nullptr ? 1 : static_cast<int>(ceil_div(tokens, job.span));
  job.k_out = checked_int(projection.k_out, "k_out");
  job.k_in = checked_int(projection.k_in, "k_in");
  job.out_blocks = static_cast<int>(ceil_div(job.k_out, kRows));
  job.in_blocks = static_cast<int>(ceil_div(job.k_in, kRows));
  const double rows = static_cast<double>(job.k_out) * static_cast<double>(job.k_in);
  // 0.25 makes up for the entries +-2 of sjlt (kUnit) on both sides.
  job.scale = projection.kind == Kind::rademacher ? static_cast<float>(1 / std::sqrt(rows)) : 0.25f;
  job.out = out;
  job.stride = stride;
  job.sums = sums;
  return job;
}

template <class T, Kind kind>
void launch_tiles(const Job& job, cudaStream_t stream) {
  const int warps = static_cast<int>(ceil_div(job.examples * job.span, kWarpTokens));
  const size_t bytes = shared_bytes<kind>(warps);
  const int64_t tiles = ceil_div(job.batch, job.examples) * job.tiles;
  const int blocks = checked_int(tiles * job.out_blocks * job.in_blocks, "the number of blocks");
  check_call(kOp, cudaFuncSetAttribute(project_tiles<T, kind>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)));
  project_tiles<T, kind><<<blocks, 32 * warps, bytes, stream>>>(job);
  check_launch(kOp);
  if (job.tiles == 1) return;
  const int64_t numbers = static_cast<int64_t>(job.k_out) * job.k_in;
  const dim3 rows(job.batch, static_cast<unsigned>(ceil_div(numbers, kThreads)));
  add_sums_in_order<<<rows, kThreads, 0, stream>>>(job);
  check_launch(kOp);
}

template <class T>
void launch_products(const Factors<T>& factors, const Gradients& gradients, float* out,
                     int64_t stride, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(gradients.batch),
                    static_cast<unsigned>(ceil_div(factors.n_count, kTile)),
                    static_cast<unsigned>(ceil_div(factors.m_width, kTile)));
  add_exact<T><<<blocks, kTileThreads, 0, stream>>>(factors, lengths_of(gradients), out, stride);
  check_launch(kOp);
}

Outputs outputs_of(const Projection& projection) {
  Outputs outputs{};
  outputs.count = projection.outputs;
  for (int j = 0; j < projection.outputs; ++j) {
    const Output& output = projection.output[j];
    outputs.g[j] = output.g;
    outputs.sizes[j] = output.size;
    outputs.numbers[j] = output.columns;
    outputs.streams[j] = stream_of(projection.seed, output.key);
  }
  return outputs;
}

// Forms R_out G of `count` examples from `first` on in scratch.
template <class T>
void launch_form(const Gradients& gradients, const Projection& projection, const SketchSizes& sizes,
                 int64_t first, int64_t count, float* q, float* formed, cudaStream_t stream) {
  const int64_t tokens = count * gradients.tokens;
  const auto row_blocks = static_cast<unsigned>(ceil_div(sizes.rows, kTile));
  if (tokens > 0) {
    const dim3 tiles(static_cast<unsigned>(ceil_div(tokens, kTile)), row_blocks);
    reduce_outputs<T><<<tiles, kTileThreads, 0, stream>>>(
        outputs_of(projection), first * gradients.tokens, tokens, sizes.rows, q);
    check_launch(kOp);
  }
  const dim3 blocks(static_cast<unsigned>(count),
                    static_cast<unsigned>(ceil_div(sizes.columns, kTile)), row_blocks);
  const Lengths lengths = lengths_of(gradients);
  form<T><<<blocks, kTileThreads, 0, stream>>>(q, sizes.rows, static_cast<const T*>(gradients.x),
                                               gradients.in, sizes.columns, lengths, first, formed);
  check_launch(kOp);
}

template <class T>
void launch_sketch(const Gradients& gradients, const Projection& projection, float* sums,
                   float* out, int64_t stride, cudaStream_t stream) {
  const SketchSizes sizes = sketch_sizes(gradients, projection);
  const bool reduced = projection.rows > 0;
  const Output& output = projection.output[0];
  const int64_t size = projection.k_out * projection.k_in;
  float* q = sums + sizes.together * sizes.sums;
  float* values = q + sizes.together * sizes.q;
  const Formed<T> formed{
      static_cast<const T*>(gradients.g),
      static_cast<const T*>(gradients.x),
      sizes.rows,
      gradients.in,
      sizes.columns,
      reduced ? nullptr : output.columns,
      projection.input_columns,
      stream_of(projection.seed, reduced ? reduced_key(projection.input_key) : output.key),
      stream_of(projection.seed, projection.input_key),
      size,
      sizes.slice,
      sums,
      reduced ? values : nullptr,
      reduced ? static_cast<float>(1 / std::sqrt(static_cast<double>(sizes.rows))) : 1.0f};
  const Lengths lengths = lengths_of(gradients);
  for (int64_t first = 0; first < gradients.batch; first += sizes.together) {
    const int64_t count = std::min(sizes.together, gradients.batch - first);
    if (reduced) {
      launch_form<T>(gradients, projection, sizes, first, count, q, values, stream);
    }
    const dim3 blocks(static_cast<unsigned>(count), static_cast<unsigned>(sizes.slices));
    sketch_formed<T><<<blocks, 32, 0, stream>>>(formed, lengths, first);
    check_launch(kOp);
    const dim3 numbers(static_cast<unsigned>(count),
                       static_cast<unsigned>(ceil_div(size, kThreads)));
    add_slices<<<numbers, kThreads, 0, stream>>>(sums, sizes.slices, size, lengths, first, out,
                                                 stride);
    check_launch(kOp);
  }
}

template <class T>
void project_linear(const Gradients& gradients, const Projection& projection, float* sums,
                    float* out, int64_t stride, cudaStream_t stream) {
  if (projection.kind == Kind::sketch) {
    return launch_sketch<T>(gradients, projection, sums, out, stride, stream);
  }
  if (projection.kind == Kind::identity) {
    const Factors<T> raw{static_cast<const T*>(gradients.g), static_cast<const T*>(gradients.x),
                         gradients.out, gradients.in, projection.k_in};
    return launch_products<T>(raw, gradients, out, stride, stream);
  }
  const Job job = job_of(gradients, projection, sums, out, stride);
  if (projection.kind == Kind::rademacher) return launch_tiles<T, Kind::rademacher>(job, stream);
  return launch_tiles<T, Kind::sjlt>(job, stream);
}

template <class T>
void project_elementwise(const Gradients& gradients, const Projection& projection, float* sums,
                         float* out, int64_t stride, cudaStream_t stream) {
  const int64_t size = gradients.in, rows = projection.bias ? 2 : 1;
  const unsigned batch = static_cast<unsigned>(gradients.batch);
  const Lengths lengths = lengths_of(gradients);
  const dim3 blocks(batch, static_cast<unsigned>(ceil_div(size, kThreads)));
  sum_elementwise<T><<<blocks, kThreads, 0, stream>>>(
      static_cast<const T*>(gradients.x), static_cast<const T*>(gradients.g), size, lengths, sums);
  check_launch(kOp);
  if (projection.kind == Kind::identity) {
    const dim3 all(batch, static_cast<unsigned>(ceil_div(rows * size, kThreads)));
    add_sums<<<all, kThreads, 0, stream>>>(sums, 2 * size, rows * size, out, stride);
  } else {
    const Elements<float> elements{sums, nullptr, 2, rows, size};
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
void project(const Gradients& gradients, const Projection& projection, float* sums, float* out,
             int64_t stride, cudaStream_t stream) {
  switch (projection.layer) {
    case Layer::linear:
      return project_linear<T>(gradients, projection, sums, out, stride, stream);
    case Layer::elementwise:
      return project_elementwise<T>(gradients, projection, sums, out, stride, stream);
    case Layer::embedding:
      return project_embedding<T>(gradients, projection, out, stride, stream);
  }
}

// Scratch: (B, 2, D) for the gradients of LayerNorm, or the sums of 64 tokens of a linear layer.
float* take_sums(Scratch& scratch, const Gradients& gradients, const Projection& projection) {
  const int64_t count = projection.layer == Layer::elementwise ? 2 * gradients.batch * gradients.in
                                                               : sums_wanted(gradients, projection);
  return count == 0 ? nullptr : scratch.take<float>(count);
}

}  // namespace

size_t project_gradients_scratch(const Gradients& gradients, const Projection& projection) {
  Scratch scratch;
  take_sums(scratch, gradients, projection);
  return scratch.bytes();
}

void project_gradients(const Gradients& gradients, const Projection& projection, float* out,
                       int64_t stride, void* memory, void* stream) {
  Scratch scratch(memory);
  float* sums = take_sums(scratch, gradients, projection);
  const auto on = static_cast<cudaStream_t>(stream);
  if (gradients.dtype == DType::bfloat16) {
    project<__nv_bfloat16>(gradients, projection, sums, out, stride, on);
  } else {
    project<float>(gradients, projection, sums, out, stride, on);
  }
}

}  // namespace tracmod::cuda

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
// sketch: formed_sketch.cuh has the kernels. make_lists says where the numbers of the gradient
// go; with `rows`, reduce_outputs computes Q = sum_j g_j R_out_j^T; then sketch_tiles forms the
// gradient and adds it, or, with one token, sketch_products does.
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

#include "cuda/formed_sketch.cuh"
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

// Buckets of a block of sketch_products and of sketch_tiles, at most: 48 KB of sums each, so that
// several blocks share a multiprocessor.
constexpr int kProductBuckets = 3072, kTileBuckets = 12288;
static_assert(kTileBuckets / formed::kOwners <= formed::kMaxShare);

constexpr int kMostOwners = 11264;  // make_lists counts their runs in 44 KB of shared memory

constexpr int64_t kReducedNumbers = int64_t{1} << 24;  // of Q in scratch at a time

// If there are fewer blocks than multiprocessors want, and each has several tiles to do, every tile
// becomes a block. Returns the numbers of scratch for the sums of 64 tokens, or 0 if that is not
// so.
int64_t sums_wanted(const Gradients& gradients, const Projection& projection) {
  if (projection.layer != Layer::linear || projection.kind == Kind::identity) return 0;
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
void place_tiles(Job& job, int64_t tokens) {
  job.span = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tokens, kTileTokens)));
  const int wanted = static_cast<int>(ceil_div(job.batch, kBlocksWanted));
  job.examples = std::max(1, std::min(kTileTokens / job.span, wanted));
}

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
  place_tiles(job, tokens);
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
  check_call(
      kOp, cudaFuncSetAttribute(project_tiles<T, kind>, cudaFuncAttributeMaxDynamicSharedMemorySize,
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

// Scratch of a sketch: the lists of runs, and Q of some examples at a time.
struct SketchMemory {
  formed::Lists lists;
  bool products;  // examples have one token
  float* q;
  int pitch;         // of a row of Q, a multiple of 4
  int64_t together;  // examples
};

SketchMemory take_sketch(Scratch& scratch, const Gradients& gradients,
                         const Projection& projection) {
  SketchMemory memory{};
  memory.products = projection.rows == 0 && gradients.tokens == 1;
  memory.together = gradients.batch;
  formed::Lists& lists = memory.lists;
  lists.rows = checked_int(projection.rows > 0 ? projection.rows : gradients.out, "g");
  lists.columns = checked_int(gradients.in + (projection.bias ? 1 : 0), "x");
  lists.part_rows = memory.products ? formed::kThreads : formed::kSide;
  lists.part_columns = 16 * formed::kThreads / lists.part_rows;
  lists.size = checked_int(projection.k_out * projection.k_in, "k_out * k_in");
  const bool whole = projection.input_columns == nullptr && lists.size >= kSparseGroup;
  lists.slots = whole ? 1 : kSparseGroup;
  // An example has several blocks if one block would have many buckets, or if there would be fewer
  // blocks than multiprocessors, as long as an owner has 16 buckets: every block forms the gradient
  // again or reads all of g. The choice changes no result.
  const int64_t blocks =
      memory.products ? ceil_div(gradients.batch, formed::kTogether) : gradients.batch;
  const int64_t most = memory.products ? kProductBuckets : kTileBuckets;
  const int64_t ranges =
      std::max<int64_t>({1, ceil_div(lists.size, most),
                         std::min<int64_t>(kBlocksWanted / 2 / std::max<int64_t>(1, blocks),
                                           lists.size / (kSparseGroup * formed::kOwners))});
  lists.share = static_cast<int>(ceil_div(lists.size, ranges * formed::kOwners));
  lists.owners =
      static_cast<int>(ceil_div(lists.size, lists.share * formed::kOwners)) * formed::kOwners;
  if (lists.owners > kMostOwners) {
    const int64_t largest = int64_t{kMostOwners} / formed::kOwners * most;
    throw std::invalid_argument(std::string(kOp) + ": k_out * k_in: expected a sketch of at most " +
                                std::to_string(largest) + " numbers on a GPU, got " +
                                std::to_string(lists.size));
  }
  // A run is listed for every owner that it reaches: the first, the last, which may have fewer
  // buckets, and those in between.
  const int64_t listed = 2 + ceil_div(kSparseGroup - 1, lists.share);
  lists.capacity = static_cast<int>(listed * formed::kThreads * lists.slots);
  const int64_t parts = static_cast<int64_t>(lists.row_parts()) * lists.column_parts();
  lists.signs = scratch.take<float>(lists.column_parts() * lists.part_columns);
  lists.starts = scratch.take<int>(parts * (lists.owners + 1));
  lists.entries = scratch.take<uint32_t>(parts * lists.capacity);
  if (projection.rows > 0) {
    memory.pitch = checked_int(ceil_div(lists.rows, 4) * 4, "rows");
    const int64_t numbers = std::max<int64_t>(1, gradients.tokens * memory.pitch);
    memory.together = std::min(gradients.batch, std::max<int64_t>(1, kReducedNumbers / numbers));
    memory.q = scratch.take<float>(memory.together * numbers);
  }
  return memory;
}

// Q of `count` examples from `first` on.
template <class T>
void launch_reduce(const Gradients& gradients, const Projection& projection,
                   const SketchMemory& memory, int64_t first, int64_t count, cudaStream_t stream) {
  Job job{};
  job.count = projection.outputs;
  for (int j = 0; j < projection.outputs; ++j) {
    const Output& output = projection.output[j];
    const T* g = static_cast<const T*>(output.g) + first * gradients.tokens * output.size;
    job.sources[j] = source_of(g, output.size, output.columns,
                               stream_of(projection.seed, output.key), gradients.dtype);
  }
  job.lengths = lengths_of(gradients, first);
  job.batch = checked_int(count, "x");
  place_tiles(job, gradients.tokens);
  job.tiles = static_cast<int>(ceil_div(gradients.tokens, job.span));
  job.k_out = memory.lists.rows;
  job.out_blocks = static_cast<int>(ceil_div(job.k_out, kRows));
  job.in_blocks = 1;
  const int warps = static_cast<int>(ceil_div(job.examples * job.span, kWarpTokens));
  const size_t bytes = sizeof(Signs<Kind::rademacher>[2]) + warps * kStages * kStageBytes;
  const int64_t tiles = ceil_div(job.batch, job.examples) * job.tiles;
  const int blocks = checked_int(tiles * job.out_blocks, "the number of blocks");
  check_call(kOp, cudaFuncSetAttribute(formed::reduce_outputs<T>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)));
  formed::reduce_outputs<T><<<blocks, 32 * warps, bytes, stream>>>(job, memory.pitch, memory.q);
  check_launch(kOp);
}

// The sketch of `count` examples from `first` on, whose q has rows of `pitch` numbers.
template <class Q, class T>
void launch_sketch_tiles(const Gradients& gradients, const formed::Lists& lists, const Q* q,
                         int pitch, float scale, int64_t first, int64_t count, float* out,
                         int64_t stride, cudaStream_t stream) {
  const int floats = formed::kSide * kPitch + formed::Operands<Q, T>::kFloats;
  const size_t bytes = sizeof(float) * (floats + formed::kOwners * lists.share);
  const dim3 blocks(static_cast<unsigned>(count), lists.owners / formed::kOwners);
  check_call(kOp, cudaFuncSetAttribute(formed::sketch_tiles<Q, T>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)));
  formed::sketch_tiles<Q, T><<<blocks, formed::kThreads, bytes, stream>>>(
      lists, q, pitch, static_cast<const T*>(gradients.x) + first * gradients.tokens * gradients.in,
      checked_int(gradients.in, "x"), lengths_of(gradients, first), scale, out + first * stride,
      stride);
  check_launch(kOp);
}

template <class T, bool kWhole>
void launch_sketch_products(const Gradients& gradients, const formed::Lists& lists, float* out,
                            int64_t stride, cudaStream_t stream) {
  const size_t bytes = sizeof(float4) * (formed::kThreads + formed::kOwners * lists.share);
  const dim3 blocks(static_cast<unsigned>(ceil_div(gradients.batch, formed::kTogether)),
                    lists.owners / formed::kOwners);
  check_call(kOp, cudaFuncSetAttribute(formed::sketch_products<T, kWhole>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)));
  formed::sketch_products<T, kWhole><<<blocks, formed::kThreads, bytes, stream>>>(
      lists, static_cast<const T*>(gradients.g), static_cast<const T*>(gradients.x),
      checked_int(gradients.in, "x"), lengths_of(gradients), checked_int(gradients.batch, "x"), out,
      stride);
  check_launch(kOp);
}

template <class T>
void launch_sketch(const Gradients& gradients, const Projection& projection,
                   const SketchMemory& memory, float* out, int64_t stride, cudaStream_t stream) {
  const formed::Lists& lists = memory.lists;
  const bool reduced = projection.rows > 0;
  const Output& output = projection.output[0];
  const int parts =
      checked_int(static_cast<int64_t>(lists.row_parts()) * lists.column_parts(), "parts of g x");
  const uint64_t row_key = reduced ? reduced_key(projection.input_key) : output.key;
  formed::make_lists<<<parts, formed::kThreads, sizeof(int) * lists.owners, stream>>>(
      lists, reduced ? nullptr : output.columns, stream_of(projection.seed, row_key),
      projection.input_columns, stream_of(projection.seed, projection.input_key));
  check_launch(kOp);
  if (memory.products) {
    if (lists.slots == 1) {
      return launch_sketch_products<T, true>(gradients, lists, out, stride, stream);
    }
    return launch_sketch_products<T, false>(gradients, lists, out, stride, stream);
  }
  if (!reduced) {
    return launch_sketch_tiles<T, T>(gradients, lists, static_cast<const T*>(gradients.g),
                                     lists.rows, 1.0f, 0, gradients.batch, out, stride, stream);
  }
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(lists.rows)));
  for (int64_t first = 0; first < gradients.batch; first += memory.together) {
    const int64_t count = std::min(memory.together, gradients.batch - first);
    if (gradients.tokens > 0) {
      launch_reduce<T>(gradients, projection, memory, first, count, stream);
    }
    launch_sketch_tiles<float, T>(gradients, lists, memory.q, memory.pitch, scale, first, count,
                                  out, stride, stream);
  }
}

template <class T>
void project_linear(const Gradients& gradients, const Projection& projection, float* sums,
                    float* out, int64_t stride, cudaStream_t stream) {
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

// Scratch of a call: of a sketch of a linear layer, or sums: (B, 2, D) for the gradients of
// LayerNorm, or the sums of 64 tokens of a linear layer.
struct Memory {
  SketchMemory sketch;
  float* sums;
};

Memory take_memory(Scratch& scratch, const Gradients& gradients, const Projection& projection) {
  Memory memory{};
  if (projection.layer == Layer::linear && projection.kind == Kind::sketch) {
    memory.sketch = take_sketch(scratch, gradients, projection);
    return memory;
  }
  const int64_t count = projection.layer == Layer::elementwise ? 2 * gradients.batch * gradients.in
                                                               : sums_wanted(gradients, projection);
  if (count > 0) memory.sums = scratch.take<float>(count);
  return memory;
}

template <class T>
void project(const Gradients& gradients, const Projection& projection, const Memory& memory,
             float* out, int64_t stride, cudaStream_t stream) {
  switch (projection.layer) {
    case Layer::linear:
      if (projection.kind == Kind::sketch) {
        return launch_sketch<T>(gradients, projection, memory.sketch, out, stride, stream);
      }
      return project_linear<T>(gradients, projection, memory.sums, out, stride, stream);
    case Layer::elementwise:
      return project_elementwise<T>(gradients, projection, memory.sums, out, stride, stream);
    case Layer::embedding:
      return project_embedding<T>(gradients, projection, out, stride, stream);
  }
}

}  // namespace

size_t project_gradients_scratch(const Gradients& gradients, const Projection& projection) {
  Scratch scratch;
  take_memory(scratch, gradients, projection);
  return scratch.bytes();
}

void project_gradients(const Gradients& gradients, const Projection& projection, float* out,
                       int64_t stride, void* memory, void* stream) {
  Scratch scratch(memory);
  const Memory memory_of_call = take_memory(scratch, gradients, projection);
  const auto on = static_cast<cudaStream_t>(stream);
  if (gradients.dtype == DType::bfloat16) {
    project<__nv_bfloat16>(gradients, projection, memory_of_call, out, stride, on);
  } else {
    project<float>(gradients, projection, memory_of_call, out, stride, on);
  }
}

}  // namespace tracmod::cuda

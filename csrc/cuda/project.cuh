// The fused kernel of project_gradients for a linear layer: what a block owns is told there.
//
// Depth is walked in slices of 128 bytes a token, which cp.async brings into shared memory in
// chunks of 16 bytes, `kStages` slices ahead; a warp owns 16 tokens and all 64 rows of R. With
// g = lane / 4 and q = lane % 4, the thread of an m16n8k16 product needs, of its two tokens, the
// depths 2q, 2q + 1, 2q + 8, 2q + 9 and, of R, row g of eight: depth and rows are named so that
//   - these depths are four neighbours in memory: a chunk is read as it lies;
//   - row n of the j-th eight is row 8 n + j of R: a thread holds 16 neighbours of a result;
//   - the byte n of a column's 64 sign bits is then what lane group n needs: the signs of a step,
//     2 bits for each of 16 registers, are one word a lane.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/mma.cuh"
#include "random.h"

namespace tracmod::cuda::fused {

constexpr int kRows = 64;       // of R_in and of R_out, a block
constexpr int kWarpTokens = 16;
constexpr int kMaxWarps = 8;
constexpr int kTileTokens = kWarpTokens * kMaxWarps;
constexpr int kSumTokens = 64;  // tokens whose products are summed before they are added to out
constexpr int kSliceBytes = 128;
constexpr int kStages = 3;
constexpr int kSignColumns = 256;  // columns whose signs are made at a time
constexpr int kPitch = kRows + 8;  // of P and Q in shared memory: columns read without conflicts

// x, or the g of one output: (B S, size), and the signs of its columns.
struct Source {
  const void* rows;
  int size;
  const int64_t* numbers;  // of the columns; null: their own places
  uint64_t stream;
  bool aligned;  // every row starts at 16 bytes

  __device__ int64_t number(int column) const {
    return numbers == nullptr ? column : numbers[column];
  }
};

struct Job {
  Source sources[1 + kMaxOutputs];  // x, then every g
  int count;
  bool bias;
  Lengths lengths;
  int64_t batch;
  int span;       // tokens of one example in a tile
  int examples;   // of a tile; with more than one, `span` is S
  int out_blocks, in_blocks;  // of 64 rows and of 64 columns of the grid
  int k_out, k_in;
  float scale;
  float* out;
  int64_t stride;
};

// Row i of a tile is token `token + i % span` of example `example + i / span`.
struct Tile {
  int64_t example;
  int token = 0, examples;
  int first_out, first_in;  // of its 64 rows of R_out and of R_in

  __device__ Tile(const Job& job, unsigned block) {
    const unsigned parts = job.out_blocks * job.in_blocks;
    const int part = static_cast<int>(block % parts);
    example = static_cast<int64_t>(block / parts) * job.examples;
    const int64_t left = job.batch - example;
    examples = static_cast<int>(left < job.examples ? left : job.examples);
    first_out = part / job.in_blocks * kRows;
    first_in = part % job.in_blocks * kRows;
  }

  __device__ int64_t first_row(const Job& job) const {
    return example * job.lengths.tokens + token;
  }

  __device__ bool holds(const Job& job, int row) const {
    const int e = row / job.span;
    return e < examples && token + row % job.span < job.lengths.of(example + e);
  }
};

// Rows [first, first + 64) of a column of R: bit r of `set`: not zero; of `negative`: below zero.
struct Entries {
  uint64_t set, negative;
};

// Entries are +-kUnit where they are not zero: an sjlt's +-2 and 0 have one bit of exponent.
template <Kind kind>
constexpr float kUnit = kind == Kind::sjlt ? 2.0f : 1.0f;
template <Kind kind>
constexpr int kPlanes = kind == Kind::sjlt ? 2 : 1;

template <Kind kind>
__device__ Entries entries_of(uint64_t stream, int64_t column, int first, int k) {
  if (kind == Kind::rademacher) return {~uint64_t{0}, sign_word(stream, column, first / kRows)};
  const SparseEntry entry = sparse_entry(stream, column, k);
  const int64_t row = entry.row - first;
  const uint64_t set = row >= 0 && row < kRows ? uint64_t{1} << row : 0;
  return {set, entry.sign < 0 ? set : 0};
}

// Bits i and i + 16 of a word of signs as two bfloat16 entries.
template <Kind kind>
__device__ uint32_t entry_pair(const uint32_t (&word)[kPlanes<kind>], int i) {
  const uint32_t negative = (word[0] << (15 - i)) & 0x80008000u;
  if (kind == Kind::rademacher) return negative | 0x3f803f80u;  // +-1
  const uint32_t set = word[kPlanes<kind> - 1];
  return negative | ((i < 15 ? set << (14 - i) : set >> 1) & 0x40004000u);  // +-2, 0
}

// The signs of 256 columns: a word a lane and step of 16.
template <Kind kind>
using Signs = uint32_t[kPlanes<kind>][kSignColumns / 16 * 32];

// A block's shared memory: signs, of which one half is read while the next is made, and the slices,
// later P and Q.
template <Kind kind>
struct Shared {
  Signs<kind> signs[2];
  alignas(16) unsigned char rest[16];
};

template <Kind kind>
size_t shared_bytes(int warps) {
  const size_t rows = kPitch * sizeof(float), slices = kStages * kSliceBytes;  // a token
  return sizeof(Signs<kind>[2]) + warps * kWarpTokens * (rows + std::max(rows, slices));
}

// The signs of 256 columns from `begin` on.
template <class T, Kind kind>
__device__ void make_signs(const Source& source, int begin, int first, int k,
                           Signs<kind>& words) {
  for (int i = static_cast<int>(threadIdx.x); i < kSignColumns; i += static_cast<int>(blockDim.x)) {
    Entries entries{0, 0};
    if (begin + i < source.size) {
      entries = entries_of<kind>(source.stream, source.number(begin + i), first, k);
    }
    // A chunk holds one thread's depths of one step (float32) or of two (bfloat16).
    constexpr int kWidth = 16 / sizeof(T), kChunkSteps = kWidth / 4;
    const int step = i / (4 * kWidth) * kChunkSteps + i / 4 % kChunkSteps;
    const int q = i / kWidth % 4, depth = (i & 1) << 1 | (i >> 1 & 1);
    for (int plane = 0; plane < kPlanes<kind>; ++plane) {
      const uint64_t bits = plane == 0 ? entries.negative : entries.set;
      auto* bytes = reinterpret_cast<unsigned char*>(words[plane] + step * 32) + 4 * q + depth;
      for (int g = 0; g < 8; ++g) bytes[16 * g] = static_cast<unsigned char>(bits >> 8 * g);
    }
  }
}

// A place along all columns of all sources, in slices.
template <class T>
struct Cursor {
  static constexpr int kWidth = kSliceBytes / sizeof(T);
  int source, column;

  __device__ void skip_ends(const Job& job) {
    while (source < job.count && column >= job.sources[source].size) {
      ++source;
      column = 0;
    }
  }
  __device__ void advance(const Job& job) {
    column += kWidth;
    skip_ends(job);
  }
};

// Copies a slice of the tile, 4 chunks a thread; bit `pass` of `wanted`: that row has a token. What
// has none, and columns past the end, become zeros without being read.
template <class T>
__device__ void load_slice(const Source& source, int64_t first_row, int column, unsigned wanted,
                           unsigned char* stage) {
  constexpr int kWidth = 16 / sizeof(T);
  const int thread = static_cast<int>(threadIdx.x), row = thread / 8, chunk = thread % 8;
  const int rows = static_cast<int>(blockDim.x) / 8;  // even: all of a thread's rows swizzle alike
  const int from = column + chunk * kWidth, left = source.size - from;
  const T* values = static_cast<const T*>(source.rows) + (first_row + row) * source.size + from;
  unsigned char* to = stage + row * kSliceBytes + (chunk ^ (row & 1) << 2) * 16;
  if (left <= 0) wanted = 0;
  if (source.aligned) {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const bool token = (wanted >> pass & 1) != 0;
      copy_16_later(to + pass * rows * kSliceBytes,
                    token ? values + static_cast<int64_t>(pass * rows) * source.size : source.rows,
                    token ? 16 : 0);
    }
    return;
  }
#pragma unroll 1
  for (int pass = 0; pass < 4; ++pass) {
    alignas(16) T chunk_values[kWidth] = {};
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if ((wanted >> pass & 1) != 0 && e < left) chunk_values[e] = values[e];
    }
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(chunk_values);
    values += static_cast<int64_t>(rows) * source.size;
    to += rows * kSliceBytes;
  }
}

// A warp's tokens as first operands, `kSteps` steps of 16 depths: all four of a bfloat16 slice, one
// of a float32 slice's two. A value is the sum of its bfloat16 parts, the largest first: three parts
// hold a float32 exactly.
template <class T>
struct Tokens {
  static constexpr int kParts = sizeof(T) == 4 ? 3 : 1;
  static constexpr int kSteps = sizeof(T) == 4 ? 1 : 4;
  static constexpr int kGroups = kSliceBytes / static_cast<int>(sizeof(T)) / 16 / kSteps;
  uint32_t a[kSteps][kParts][4];
};

// Two floats' leading 8 bits as a pair of bfloat16; the floats keep the rest.
__device__ inline uint32_t take_part(float& first, float& second) {
  const uint32_t one = __float_as_uint(first), two = __float_as_uint(second);
  first -= __uint_as_float(one & 0xffff0000u);
  second -= __uint_as_float(two & 0xffff0000u);
  return one >> 16 | (two & 0xffff0000u);
}

// This thread's chunk `half` of four of a row: 16 bytes of each of its two tokens.
struct Chunks {
  uint4 top, bottom;

  __device__ Chunks(const unsigned char* stage, int half) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
    const int row = static_cast<int>(threadIdx.x) / 32 * kWarpTokens + g;
    const auto* at = stage + row * kSliceBytes + ((half * 4 + q) ^ (g & 1) << 2) * 16;
    top = *reinterpret_cast<const uint4*>(at);
    bottom = *reinterpret_cast<const uint4*>(at + 8 * kSliceBytes);
  }
};

__device__ inline void read_tokens(const unsigned char* stage, int, Tokens<__nv_bfloat16>& to) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Chunks chunks(stage, half);
    const uint32_t first[4] = {chunks.top.x, chunks.bottom.x, chunks.top.y, chunks.bottom.y};
    const uint32_t second[4] = {chunks.top.z, chunks.bottom.z, chunks.top.w, chunks.bottom.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to.a[2 * half][0][i] = first[i];
      to.a[2 * half + 1][0][i] = second[i];
    }
  }
}

__device__ inline void read_tokens(const unsigned char* stage, int group, Tokens<float>& to) {
  const Chunks chunks(stage, group);
  const uint32_t pairs[4][2] = {{chunks.top.x, chunks.top.y},
                                {chunks.bottom.x, chunks.bottom.y},
                                {chunks.top.z, chunks.top.w},
                                {chunks.bottom.z, chunks.bottom.w}};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float first = __uint_as_float(pairs[i][0]), second = __uint_as_float(pairs[i][1]);
#pragma unroll
    for (int part = 0; part < 3; ++part) to.a[0][part][i] = take_part(first, second);
  }
}

// total (16 tokens x 64 rows of R, a warp) += a slice's tokens R^T; `step` is the slice's first of
// the signs. The matrix units drop low bits each time they add: they sum a few steps alone, and
// float32 additions do the rest.
template <class T, Kind kind>
__device__ void multiply_signs(const unsigned char* stage, const Signs<kind>& signs, int step,
                               float (&total)[8][4]) {
  using Group = Tokens<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int group = 0; group < Group::kGroups; ++group) {
    Group tokens;
    read_tokens(stage, group, tokens);
    uint32_t words[Group::kSteps][kPlanes<kind>];
#pragma unroll
    for (int i = 0; i < Group::kSteps * kPlanes<kind>; ++i) {
      const int at = step + group * Group::kSteps + i / kPlanes<kind>;
      words[i / kPlanes<kind>][i % kPlanes<kind>] = signs[i % kPlanes<kind>][at * 32 + lane];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < Group::kSteps; ++i) {
        const uint32_t b[2] = {entry_pair<kind>(words[i], j), entry_pair<kind>(words[i], j + 8)};
#pragma unroll
        for (int part = Group::kParts - 1; part >= 0; --part) {
          multiply_bf16(sum, tokens.a[i][part], b);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) total[j][i] += sum[i];
    }
  }
}

// Adds the ones' column to a warp's P.
template <Kind kind>
__device__ void add_ones(const Job& job, int first, float (&total)[8][4]) {
  const Source& x = job.sources[0];
  const Entries entries = entries_of<kind>(x.stream, x.number(x.size), first, job.k_in);
  const int q = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 8 * (2 * q + i % 2) + j;
      if (entries.set >> r & 1) total[j][i] += kUnit<kind> * sign_of_bit(entries.negative, r);
    }
  }
}

// A warp's 16 tokens of P or Q to rows of `to`.
__device__ inline void store_tokens(const float (&total)[8][4], float* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float* row = to + (warp * kWarpTokens + g + i / 2 * 8) * kPitch + 16 * q + i % 2 * 8;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      *reinterpret_cast<float4*>(row + j) =
          make_float4(total[j][i], total[j + 1][i], total[j + 2][i], total[j + 3][i]);
    }
  }
}

// total (16 rows x 32 columns, a warp) += Q^T P over 16 tokens, of which `count` are there; q and p
// point at the first token and at this thread's row and column.
__device__ inline void multiply_tokens(const float* q, const float* p, int count,
                                       float (&total)[4][4]) {
  const int first = static_cast<int>(threadIdx.x) % 4;
  uint32_t a_high[2][4], a_low[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int token = i / 4 * 8 + i / 2 % 2 * 4 + first;
    split(token < count ? q[token * kPitch + i % 2 * 8] : 0.0f, a_high[i / 4][i % 4],
          a_low[i / 4][i % 4]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = step * 8 + i * 4 + first;
        split(token < count ? p[token * kPitch + 8 * j] : 0.0f, b_high[i], b_low[i]);
      }
      multiply_float(total[j], a_high[step], a_low[step], b_high, b_low);
    }
  }
}

// Adds 16 rows x 32 columns that a warp has multiplied to an example's row of out.
__device__ inline void add_to_rows(const Job& job, const float (&total)[4][4], int row, int column,
                                   float* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  row += lane / 4;
  column += lane % 4;
  float* at = out + static_cast<int64_t>(row) * job.k_in + column;
  float before[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // all reads first: they wait for memory together
    const int down = i / 2 % 2 * 8, right = i / 4 * 8 + i % 2 * 4;
    const bool inside = row + down < job.k_out && column + right < job.k_in;
    before[i / 4][i % 4] = inside ? at[static_cast<int64_t>(down) * job.k_in + right] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int down = i / 2 % 2 * 8, right = i / 4 * 8 + i % 2 * 4;
    if (row + down < job.k_out && column + right < job.k_in) {
      at[static_cast<int64_t>(down) * job.k_in + right] =
          before[i / 4][i % 4] + job.scale * total[i / 4][i % 4];
    }
  }
}

// out += scale Q^T P of every example of the tile; a warp owns 16 rows x 32 columns at a time. Sums
// of 64 tokens are added in order: where a tile begins changes nothing.
__device__ inline void add_products(const Job& job, const Tile& tile, const float* p,
                                    const float* q) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int shuffled = lane / 4 % 2 * 4 + lane / 8;  // lane group n has column 4 (n % 2) + n / 2
  for (int item = warp; item < 8 * tile.examples; item += warps) {
    const int e = item / 8, row = item / 2 % 4 * 16, column = item % 2 * 32;
    const int64_t b = tile.example + e, left = job.lengths.of(b) - tile.token;
    const int count = static_cast<int>(left < job.span ? left : job.span);
    if (count <= 0) continue;
    float* out = job.out + b * job.stride;
    for (int begin = 0; begin < count; begin += kSumTokens) {
      float total[4][4] = {};
      for (int token = begin; token < count && token < begin + kSumTokens; token += kWarpTokens) {
        const int64_t at = static_cast<int64_t>(e * job.span + token) * kPitch;
        multiply_tokens(q + at + row + lane / 4, p + at + column + shuffled, count - token, total);
      }
      add_to_rows(job, total, tile.first_out + row, tile.first_in + column, out);
    }
  }
}

// One walk of a block along all slices; the copies run ahead of the products.
template <class T, Kind kind>
class Walk {
 public:
  __device__ Walk(const Job& job, const Tile& tile, unsigned wanted, Signs<kind> (&signs)[2],
                  unsigned char* slices)
      : job_(job), tile_(tile), wanted_(wanted), signs_(signs), slices_(slices) {
    loading_.skip_ends(job);
    reading_ = loading_;
    for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  }

  // total += the tokens of every source before `end` times its R^T; rows from `first` of k.
  __device__ void project(int end, int first, int k, bool active, float (&total)[8][4]) {
    while (reading_.source < end) {
      const Source& source = job_.sources[reading_.source];
      const int column = reading_.column % kSignColumns;
      if (column == 0) {
        half_ ^= 1;
        make_signs<T, kind>(source, reading_.column, first, k, signs_[half_]);
      }
      wait_copies<kStages - 2>();
      __syncthreads();  // this slice and its signs are there, the slice before has been read
      load((stage_ + kStages - 1) % kStages);
      if (active) {
        multiply_signs<T, kind>(stage(stage_), signs_[half_], column / 16, total);
      }
      stage_ = (stage_ + 1) % kStages;
      reading_.advance(job_);
    }
  }

 private:
  __device__ unsigned char* stage(int number) {
    return slices_ + number * (static_cast<int>(blockDim.x) / 2 * kSliceBytes);
  }
  __device__ void load(int number) {
    if (loading_.source < job_.count) {
      load_slice<T>(job_.sources[loading_.source], tile_.first_row(job_), loading_.column, wanted_,
                    stage(number));
      loading_.advance(job_);
    }
    commit_copies();  // an empty group too, so that they can be counted
  }

  const Job& job_;
  const Tile& tile_;
  const unsigned wanted_;
  Signs<kind> (&signs_)[2];
  unsigned char* slices_;
  Cursor<T> loading_{0, 0}, reading_{0, 0};
  int stage_ = 0, half_ = 0;
};

template <class T, Kind kind>
__device__ void project_tile(const Job& job, const Tile& tile, unsigned wanted,
                             Shared<kind>& memory) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool active = __any_sync(~0u, tile.holds(job, warp * kWarpTokens + lane % kWarpTokens));
  const int tokens = static_cast<int>(blockDim.x) / 2;
  auto* p = reinterpret_cast<float*>(memory.rest);
  unsigned char* slices = memory.rest + tokens * kPitch * sizeof(float);
  Walk<T, kind> walk(job, tile, wanted, memory.signs, slices);
  {
    float total[8][4] = {};
    walk.project(1, tile.first_in, job.k_in, active, total);
    if (job.bias) add_ones<kind>(job, tile.first_in, total);
    store_tokens(total, p);
  }
  float total[8][4] = {};
  walk.project(job.count, tile.first_out, job.k_out, active, total);
  __syncthreads();  // the last slice has been read: Q takes the place of the slices
  auto* q = reinterpret_cast<float*>(slices);
  store_tokens(total, q);
  __syncthreads();
  add_products(job, tile, p, q);
}

// A wrong length is seen as NaN.
__device__ inline void mark_bad(const Job& job, const Tile& tile) {
  for (int e = 0; e < tile.examples; ++e) {
    if (!job.lengths.bad(tile.example + e)) continue;
    float* out = job.out + (tile.example + e) * job.stride;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kRows; i += static_cast<int>(blockDim.x)) {
      const int r = tile.first_out + i / kRows, c = tile.first_in + i % kRows;
      if (r < job.k_out && c < job.k_in) out[static_cast<int64_t>(r) * job.k_in + c] = not_a_number();
    }
  }
}

template <class T, Kind kind>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    project_tiles(const __grid_constant__ Job job) {
  
  auto& memory = *reinterpret_cast<Shared<kind>*>(dynamic_shared());
  Tile tile(job, blockIdx.x);
  mark_bad(job, tile);
  for (; tile.token < job.lengths.tokens; tile.token += job.span) {
    unsigned wanted = 0;
    for (int pass = 0; pass < 4; ++pass) {
      const int row = static_cast<int>((pass * blockDim.x + threadIdx.x) / 8);
      wanted |= (tile.holds(job, row) ? 1u : 0u) << pass;
    }
    if (!__syncthreads_or(wanted != 0)) return;  // and P and Q of the tile before have been read
    project_tile<T, kind>(job, tile, wanted, memory);
  }
}

}  // namespace tracmod::cuda::fused

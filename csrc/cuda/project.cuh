// The fused kernel of project_gradients for linear layers. For a tile of at most 128 tokens,
//
//   P = [x, 1] R_in^T (tokens, 64),   Q = sum_j g_j R_out_j^T (tokens, 64),
//   out[b] += scale Q_b^T P_b.
//
// project_gradients.cu says what a block owns, counts bytes and operations and states the limit.
//
// How x and g arrive. Their columns are walked in slices of 128 bytes per token. A warp owns 16
// tokens and all 64 rows of R. It copies its tokens into a ring of four slices of its own, three
// slices ahead of the products. Because no warp reads another warp's ring, warps wait for each
// other only where all of them need new signs, every 256 columns.
//
// How signs become operands. R is never in memory: every block computes the signs of 256 columns at
// a time (random.h) and stores them as bits. In a product m16 n8 k16 (mma.cuh), lane 4 g + t holds
// row g of the 8 rows of R, at the depths 2t, 2t + 1, 2t + 8 and 2t + 9. The 64 rows of R take 8
// such products; row g of product j is assigned to row 8 g + j of R. Two things follow: of the 64
// sign bits of a column, lane group g needs byte g and nothing else, and each lane's results are 16
// neighbouring columns of P or Q. All signs that a lane needs for 16 columns are 2 registers x 2
// numbers x 8 products = 32 bits, one word, which entry_pair unpacks with a shift and one
// instruction.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/mma.cuh"
#include "random.h"

namespace tracmod::cuda::fused {

constexpr int kRows = 64;  // rows of R_in and of R_out per block
constexpr int kWarpTokens = 16;
constexpr int kMaxWarps = 8;
constexpr int kTileTokens = kWarpTokens * kMaxWarps;
constexpr int kSumTokens = 64;  // tokens whose products are summed before they are added to out
constexpr int kSliceBytes = 128;
constexpr int kStages = 4;  // slices of a ring
constexpr int kStageBytes = kWarpTokens * kSliceBytes;
constexpr int kSignColumns = 256;  // columns whose signs are computed at a time
constexpr int kPitch = kRows + 8;  // row length of P and Q in shared memory, free of bank conflicts

// x, or the g of one output, (B S, size), and the random matrix that multiplies it.
struct Source {
  const void* rows;
  int size;
  const int64_t* numbers;  // numbers of R's columns, or null for 0, 1, ...
  uint64_t stream;
  bool aligned;  // every row starts at a multiple of 16 bytes

  __device__ int64_t number(int column) const {
    return numbers == nullptr ? column : numbers[column];
  }
};

struct Job {
  Source sources[1 + kMaxOutputs];  // x, then the g of each output
  int count;                        // of sources
  bool bias;
  Lengths lengths;
  int batch;
  int span;                   // tokens of one example in a tile
  int examples;               // examples in a tile; if there are several, `span` is S
  int tiles;                  // blocks that share one example; 1 if a block does all its tiles
  int out_blocks, in_blocks;  // the grid of features in parts of 64 rows and of 64 columns
  int k_out, k_in;
  float scale;
  float* out;
  int64_t stride;
  float* sums;  // (B, S / 64, k_out, k_in) sums of 64 tokens if tiles > 1, else null

  __device__ float* sums_of(int64_t example, int64_t token) const {
    const int64_t number = example * ceil_div(lengths.tokens, kSumTokens) + token / kSumTokens;
    return sums + number * k_out * k_in;
  }
};

// The tokens and features of a block. Row i of the tile is token `token + i % span` of example
// `example + i / span`.
struct Tile {
  int example, examples, token;
  int first_out, first_in;  // first of the 64 rows of R_out and of R_in

  __device__ Tile(const Job& job, unsigned block) {
    const unsigned parts = job.out_blocks * job.in_blocks;
    const int part = static_cast<int>(block % parts), tile = static_cast<int>(block / parts);
    example = tile / job.tiles * job.examples;
    token = tile % job.tiles * job.span;
    const int left = job.batch - example;
    examples = left < job.examples ? left : job.examples;
    first_out = part / job.in_blocks * kRows;
    first_in = part % job.in_blocks * kRows;
  }

  __device__ int64_t first_row(const Job& job) const {
    return static_cast<int64_t>(example) * job.lengths.tokens + token;
  }

  __device__ bool holds(const Job& job, int row) const {
    const int e = row / job.span;
    return e < examples && token + row % job.span < job.lengths.of(example + e);
  }
};

// Rows [first, first + 64) of a column of R. Bit r of `set` says that row r is not zero, bit r of
// `negative` that it is below zero.
struct Entries {
  uint64_t set, negative;
};

// Entries that are not zero are +-kUnit. For sjlt that is +-2 instead of +-1, because the bfloat16
// +-2 and 0 differ in a single bit of the exponent (0x4000), which a set bit can be shifted to. The
// scale of the product makes up for the factor 2 x 2. kPlanes is the number of bit planes: signs
// and, for sjlt, set bits.
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

// (a & 0x80008000) | rest in one instruction; from the expression the compiler makes two.
__device__ inline uint32_t with_signs(uint32_t a, uint32_t rest) {
#ifdef TRACMOD_EMULATE
  return (a & 0x80008000u) | rest;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, 0x80008000, %2, 0xea;" : "=r"(result) : "r"(a), "r"(rest));
  return result;
#endif
}

// Unpacks bits i and i + 16 of a word of signs as two bfloat16 entries of R.
template <Kind kind>
__device__ uint32_t entry_pair(const uint32_t (&word)[kPlanes<kind>], int i) {
  const uint32_t negative = word[0] << (15 - i);  // the bits are now 15 and 31, the sign bits
  if (kind == Kind::rademacher) return with_signs(negative, 0x3f803f80u);  // +-1
  const uint32_t set = word[kPlanes<kind> - 1];
  const uint32_t exponent = (i < 15 ? set << (14 - i) : set >> 1) & 0x40004000u;
  return with_signs(negative, exponent);  // +-2, 0
}

// The signs of 256 columns: for each plane and step of 16 columns, one word per lane.
template <Kind kind>
using Signs = uint32_t[kPlanes<kind>][kSignColumns / 16 * 32];

// Shared memory of a block: two sets of signs, of which one is read while the other is written; P;
// the rings of the warps, whose memory Q takes over in the end.
template <Kind kind>
size_t shared_bytes(int warps) {
  const size_t rows = kPitch * sizeof(float), slices = kStages * kSliceBytes;  // per token
  return sizeof(Signs<kind>[2]) + warps * kWarpTokens * (rows + std::max(rows, slices));
}

// Computes the signs of the 256 columns from `begin` on, one column per thread at a time. Columns
// past the end get entries as well, but the values there are zeros. The byte that lane group g
// needs of a column goes into the word of lane 4 g + t, where t is the lane that multiplies this
// column.
template <class T, Kind kind>
__device__ void make_signs(const Source& source, int begin, int first, int k, Signs<kind>& words) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kSignColumns; i += static_cast<int>(blockDim.x)) {
    Entries entries{0, 0};
    if (begin + i < source.size) {
      entries = entries_of<kind>(source.stream, source.number(begin + i), first, k);
    }
    // bfloat16: lane t has the depths 2t, 2t + 1 and 2t + 8, 2t + 9. float32: lane t reads one
    // 16-byte chunk, so the same registers hold the depths 4t, 4t + 1 and 4t + 2, 4t + 3; the order
    // of depths within a step does not matter as long as signs and values agree.
    const int step = i / 16, at = i % 16;
    const int lane = sizeof(T) == 4 ? at / 4 : at % 8 / 2;
    const int pair = sizeof(T) == 4 ? at / 2 % 2 : at / 8;
    for (int plane = 0; plane < kPlanes<kind>; ++plane) {
      const uint64_t bits = plane == 0 ? entries.negative : entries.set;
      auto* bytes = reinterpret_cast<unsigned char*>(words[plane] + step * 32 + lane);
      for (int g = 0; g < 8; ++g)
        bytes[16 * g + at % 2 * 2 + pair] = static_cast<unsigned char>(bits >> 8 * g);
    }
  }
}

// Byte offset of a 16-byte chunk of a row in a slice. The chunk number is swizzled by the row, so
// that each of the reads below spreads over all banks of shared memory.
__device__ inline int chunk_offset(int row, int chunk) {
  return row * kSliceBytes + (chunk ^ ((row & 1) << 2 | (row >> 1 & 3))) * 16;
}

// Copies the 16 tokens of a warp to its ring, slice after slice of source after source. A lane
// copies one 16-byte chunk of four rows per slice: of row lane / 8 and every fourth row below. Rows
// without a token, and columns past the end, become zeros and are not read.
template <class T>
class Loader {
 public:
  __device__ Loader(const Job& job, const Tile& tile, unsigned char* ring)
      : job_(job), tile_(tile), ring_(ring) {
    for (int pass = 0; pass < 4; ++pass) {
      if (tile.holds(job, row() + 4 * pass)) bytes_ |= 16u << 8 * pass;
    }
  }

  __device__ bool has_tokens() const { return bytes_ != 0; }
  __device__ bool warp_has_tokens() const {
    unsigned any = bytes_;  // combined with the lanes that copy other rows
    for (int lanes = 8; lanes < 32; lanes *= 2) any |= __shfl_xor_sync(~0u, any, lanes);
    return any != 0;
  }
  __device__ const unsigned char* ring() const { return ring_; }

  // Starts the copies of the next slice. After the last slice it commits an empty group, so that
  // wait_copies can count groups as slices.
  __device__ void load(int stage) {
    while (left_ <= 0 && source_ < job_.count) open(source_++);
    if (left_ > 0) {
      const int lane_left = left_ - static_cast<int>(threadIdx.x) % 8 * kWidth;
      const Source& source = job_.sources[source_ - 1];
      const int64_t four_rows = 4 * static_cast<int64_t>(sizeof(T)) * source.size;
      if (source.aligned) {
        copy(stage, four_rows, lane_left > 0 ? bytes_ : 0);
      } else {
        copy_values(stage, four_rows, lane_left);
      }
      from_ += kSliceBytes;
      left_ -= 8 * kWidth;
    }
    commit_copies();
  }

 private:
  static constexpr int kWidth = 16 / sizeof(T);  // values of a chunk

  // This lane's first row of the tile; its other rows are 4, 8 and 12 below.
  __device__ static int row() {
    return static_cast<int>(threadIdx.x) / 32 * kWarpTokens +
           static_cast<int>(threadIdx.x) % 32 / 8;
  }
  // Begins to copy a source.
  __device__ void open(int index) {
    const Source& source = job_.sources[index];
    left_ = source.size;
    const int64_t at =
        (tile_.first_row(job_) + row()) * source.size + static_cast<int>(threadIdx.x) % 8 * kWidth;
    from_ = static_cast<const char*>(source.rows) + at * static_cast<int64_t>(sizeof(T));
  }
  // Where this lane's chunk of its row number `pass` goes.
  __device__ unsigned char* chunk(int stage, int pass) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return ring_ + stage * kStageBytes + chunk_offset(lane / 8 + 4 * pass, lane % 8);
  }
  __device__ void copy(int stage, int64_t four_rows, unsigned bytes) const {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      copy_16_later(chunk(stage, pass), from_ + pass * four_rows, bytes >> 8 * pass & 0xff);
    }
  }
  // For rows that are not aligned to 16 bytes, which the copy unit needs.
  __device__ void copy_values(int stage, int64_t four_rows, int left) const {
#pragma unroll 1
    for (int pass = 0; pass < 4; ++pass) {
      const T* values = reinterpret_cast<const T*>(from_ + pass * four_rows);
      alignas(16) T copied[kWidth] = {};
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if ((bytes_ >> 8 * pass & 16) != 0 && e < left) copied[e] = values[e];
      }
      *reinterpret_cast<uint4*>(chunk(stage, pass)) = *reinterpret_cast<const uint4*>(copied);
    }
  }

  const Job& job_;
  const Tile& tile_;
  unsigned char* ring_;
  int source_ = 0, left_ = 0;  // next source; columns of the current one that remain
  unsigned bytes_ = 0;         // bytes to copy of each of the four rows, 0 or 16, 8 bits each
  const char* from_ = nullptr;
};

// The tokens of a warp as first operands of products, kSteps steps of 16 depths at a time. That is
// as many as fit into registers: all four steps of a slice of bfloat16 (two with the two words of
// signs of sjlt), one of the two steps of a slice of float32.
//
// A value is the sum of kParts bfloat16 numbers, the largest first. Three of them hold the 24 bits
// of a float32 exactly, so that its products with signs are exact, too.
template <class T, Kind kind>
struct Tokens {
  static constexpr int kParts = sizeof(T) == 4 ? 3 : 1;
  static constexpr int kSteps = sizeof(T) == 4 ? 1 : kind == Kind::sjlt ? 2 : 4;
  static constexpr int kGroups = kSliceBytes / static_cast<int>(sizeof(T)) / 16 / kSteps;
  uint32_t a[kSteps][kParts][4];
};

// Removes the leading 8 bits of two floats and returns them as a pair of bfloat16.
__device__ inline uint32_t take_part(float& first, float& second) {
  const uint32_t first_bits = __float_as_uint(first), second_bits = __float_as_uint(second);
  first -= __uint_as_float(first_bits & 0xffff0000u);
  second -= __uint_as_float(second_bits & 0xffff0000u);
  return first_bits >> 16 | (second_bits & 0xffff0000u);
}

// Reads the steps of group `group` of a slice. A pair of bfloat16 is a register as it is in memory.
template <Kind kind>
__device__ void read_tokens(const unsigned char* slice, int group,
                            Tokens<__nv_bfloat16, kind>& to) {
  constexpr int kSteps = Tokens<__nv_bfloat16, kind>::kSteps;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = 2 * (group * kSteps + step) + lane / 16;
    load_matrices(to.a[step][0], slice + chunk_offset(lane % 16, chunk));
  }
}

// A float32 is split into three bfloat16 while it is read.
template <Kind kind>
__device__ void read_tokens(const unsigned char* slice, int group, Tokens<float, kind>& to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const float4 chunk = *reinterpret_cast<const float4*>(
        slice + chunk_offset(lane / 4 + 8 * below, group * 4 + lane % 4));
    float pair[2][2] = {{chunk.x, chunk.y}, {chunk.z, chunk.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        to.a[0][part][2 * i + below] = take_part(pair[i][0], pair[i][1]);
      }
    }
  }
}

// total (16 tokens x 64 rows of R, per warp) += the tokens of a slice times R^T. `step` is the
// first step of the slice in `signs`. The tensor cores round towards zero when they add (mma.cuh),
// so they sum only a few steps in `sum`, the smallest parts first, and ordinary float32 additions
// do the rest.
template <class T, Kind kind>
__device__ void multiply_signs(const unsigned char* slice, const Signs<kind>& signs, int step,
                               float (&total)[8][4]) {
  using Group = Tokens<T, kind>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int group = 0; group < Group::kGroups; ++group) {
    Group tokens;
    read_tokens(slice, group, tokens);
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

// Adds the column of ones of the bias, times its column of R_in, to the P of a warp.
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

// Stores the 16 tokens of a warp as rows of P or Q. Lane 4 g + q holds 16 neighbouring columns,
// from 16 q on, of tokens g and g + 8.
__device__ inline void store_tokens(const float (&total)[8][4], float* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float* row = to + (warp * kWarpTokens + g + i / 2 * 8) * kPitch + 16 * q + i % 2 * 8;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      *reinterpret_cast<float4*>(row + j) =
          float4{total[j][i], total[j + 1][i], total[j + 2][i], total[j + 3][i]};
    }
  }
}

// value = high + low, with high rounded to tf32. low is passed as it is; the tensor cores read only
// its leading 11 bits. This takes three instructions, a third of split in mma.cuh, which here would
// take as long as the products.
__device__ inline void split_quickly(float value, uint32_t& high, uint32_t& low) {
  high = (__float_as_uint(value) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(value - __uint_as_float(high));
}

// total (16 rows x 32 columns, per warp) += Q^T P over 16 tokens, of which the first `count` exist.
// q and p point at the first token, at this thread's row and column.
__device__ inline void multiply_tokens(const float* q, const float* p, int count,
                                       float (&total)[4][4]) {
  const int first = static_cast<int>(threadIdx.x) % 4;
  uint32_t a_high[2][4], a_low[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int token = i / 4 * 8 + i / 2 % 2 * 4 + first;
    split_quickly(token < count ? q[token * kPitch + i % 2 * 8] : 0.0f, a_high[i / 4][i % 4],
                  a_low[i / 4][i % 4]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float sum[4] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = step * 8 + i * 4 + first;
        split_quickly(token < count ? p[token * kPitch + 8 * j] : 0.0f, b_high[i], b_low[i]);
      }
      multiply_tf32(sum, a_low[step], b_high);
      multiply_tf32(sum, a_high[step], b_low);
      multiply_tf32(sum, a_high[step], b_high);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) total[j][i] += sum[i];
  }
}

// Adds the 16 rows x 32 columns of a warp, times the scale, to an example's row of out; or, if not
// `add`, stores them.
__device__ inline void add_to_rows(const Job& job, const float (&total)[4][4], int row, int column,
                                   float* to, bool add) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  row += lane / 4;
  column += lane % 4;
  float* at = to + static_cast<int64_t>(row) * job.k_in + column;
  float previous[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // all reads come first, so that they wait for memory together
    const int down = i / 2 % 2 * 8, right = i / 4 * 8 + i % 2 * 4;
    const bool inside = add && row + down < job.k_out && column + right < job.k_in;
    previous[i / 4][i % 4] = inside ? at[static_cast<int64_t>(down) * job.k_in + right] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int down = i / 2 % 2 * 8, right = i / 4 * 8 + i % 2 * 4;
    if (row + down < job.k_out && column + right < job.k_in) {
      const float sum = total[i / 4][i % 4];
      at[static_cast<int64_t>(down) * job.k_in + right] =
          add ? fmaf(job.scale, sum, previous[i / 4][i % 4]) : sum;
    }
  }
}

// out[b] += scale Q_b^T P_b for every example of the tile; a warp owns 16 rows x 32 columns at a
// time. Sums of 64 tokens are added to the result in order, so the bits do not depend on where a
// tile begins.
__device__ inline void add_products(const Job& job, const Tile& tile, const float* p,
                                    const float* q) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  // Lane group n takes column 4 (n % 2) + n / 2 of P instead of n. Each lane then holds columns t
  // and t + 4 of the result, so that four neighbouring lanes write neighbouring numbers.
  const int shuffled = lane / 4 % 2 * 4 + lane / 8;
  for (int item = warp; item < 8 * tile.examples; item += warps) {
    const int e = item / 8, row = item / 2 % 4 * 16, column = item % 2 * 32;
    const int64_t b = tile.example + e;
    const int left = static_cast<int>(job.lengths.of(b)) - tile.token;
    const int count = left < job.span ? left : job.span;
    if (count <= 0) continue;
    for (int begin = 0; begin < count; begin += kSumTokens) {
      float total[4][4] = {};
      for (int token = begin; token < count && token < begin + kSumTokens; token += kWarpTokens) {
        const int64_t at = static_cast<int64_t>(e * job.span + token) * kPitch;
        multiply_tokens(q + at + row + lane / 4, p + at + column + shuffled, count - token, total);
      }
      const bool add = job.sums == nullptr;
      float* to = add ? job.out + b * job.stride : job.sums_of(b, tile.token + begin);
      add_to_rows(job, total, tile.first_out + row, tile.first_in + column, to, add);
    }
  }
}

// The pass of a block over all slices of a tile: first those of x, then those of every g.
template <class T, Kind kind>
class Walk {
 public:
  __device__ Walk(const Job& job, const Loader<T>& loader, Signs<kind> (&signs)[2])
      : job_(job), loader_(loader), signs_(signs) {
    active_ = loader_.warp_has_tokens();
    if (!active_) return;
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) loader_.load(stage);
  }

  // total += the tokens of the warp in sources [begin, end) times R^T, for the 64 rows of R (of k)
  // from `first` on. Called by the whole block.
  __device__ void project(int begin, int end, int first, int k, float (&total)[8][4]) {
    constexpr int kWidth = kSliceBytes / static_cast<int>(sizeof(T));
    for (int i = begin; i < end; ++i) {
      const Source& source = job_.sources[i];
      for (int column = 0; column < source.size; column += kWidth) {
        const int at = column % kSignColumns;
        if (at == 0) {
          // Slow warps may still read the current set of signs. The other set was last read 256
          // columns ago, before the previous barrier, so it can be overwritten without another one.
          half_ ^= 1;
          make_signs<T, kind>(source, column, first, k, signs_[half_]);
          __syncthreads();
        }
        if (active_) next_slice(at / 16, total);
      }
    }
  }

 private:
  __device__ void next_slice(int step, float (&total)[8][4]) {
    wait_copies<kStages - 2>();
    __syncwarp();  // all lanes see all copies of this slice, and have read the previous one
    loader_.load((stage_ + kStages - 1) % kStages);
    const unsigned char* slice = loader_.ring() + stage_ * kStageBytes;
    multiply_signs<T, kind>(slice, signs_[half_], step, total);
    stage_ = (stage_ + 1) % kStages;
  }

  const Job& job_;
  Loader<T> loader_;
  Signs<kind> (&signs_)[2];
  bool active_;
  int stage_ = 0, half_ = 0;
};

// Computes P, then Q (stored where the rings were), then adds their product to out.
template <class T, Kind kind>
__device__ void project_tile(const Job& job, const Tile& tile, const Loader<T>& loader,
                             Signs<kind> (&signs)[2], float* p, unsigned char* rings) {
  Walk<T, kind> walk(job, loader, signs);
  {
    float total[8][4] = {};
    walk.project(0, 1, tile.first_in, job.k_in, total);
    if (job.bias) add_ones<kind>(job, tile.first_in, total);
    store_tokens(total, p);
  }
  float total[8][4] = {};
  walk.project(1, job.count, tile.first_out, job.k_out, total);
  __syncthreads();  // all warps have read their rings, which Q overwrites
  auto* q = reinterpret_cast<float*>(rings);
  store_tokens(total, q);
  __syncthreads();
  add_products(job, tile, p, q);
}

// Writes NaN to the features of examples with an invalid length.
__device__ inline void mark_invalid(const Job& job, const Tile& tile) {
  for (int e = 0; e < tile.examples; ++e) {
    if (!job.lengths.invalid(tile.example + e)) continue;
    float* out = job.out + static_cast<int64_t>(tile.example + e) * job.stride;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kRows;
         i += static_cast<int>(blockDim.x)) {
      const int r = tile.first_out + i / kRows, c = tile.first_in + i % kRows;
      if (r < job.k_out && c < job.k_in)
        out[static_cast<int64_t>(r) * job.k_in + c] = not_a_number();
    }
  }
}

// A block owns 64 x 64 features of one tile, or of all tiles of a long example in turn.
template <class T, Kind kind>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    project_tiles(const __grid_constant__ Job job) {
  auto& signs = *reinterpret_cast<Signs<kind>(*)[2]>(dynamic_shared());
  auto* p = reinterpret_cast<float*>(dynamic_shared() + sizeof signs);
  const int tokens = static_cast<int>(blockDim.x) / 32 * kWarpTokens;
  auto* rings = reinterpret_cast<unsigned char*>(p + tokens * kPitch);
  unsigned char* ring = rings + static_cast<int>(threadIdx.x) / 32 * kStages * kStageBytes;
  Tile tile(job, blockIdx.x);
  mark_invalid(job, tile);
  for (; tile.token < job.lengths.tokens; tile.token += job.span) {
    const Loader<T> loader(job, tile, ring);
    // This barrier also protects P and Q of the previous tile until all warps have read them.
    if (!__syncthreads_or(loader.has_tokens())) return;
    project_tile<T, kind>(job, tile, loader, signs, p, rings);
    if (job.tiles > 1) return;
  }
}

}  // namespace tracmod::cuda::fused

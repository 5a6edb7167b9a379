// The fused kernel of project_gradients for a linear layer; what a block owns is told there.
//
// Depth (columns of x or g) is walked in slices of 128 bytes a token. A warp owns 16 tokens and all
// 64 rows of R: its tokens come through a ring of slices of its own, kStages ahead, so that warps
// wait for each other only when the signs of the next 256 columns are made.
//
// Of a product m16 n8 k16 the lane 4 g + t holds, of two tokens and of row g of eight, the depths
// 2t, 2t + 1, 2t + 8, 2t + 9. Row n of the j-th eight is row 8 n + j of R: a lane's results are 16
// neighbours, and what lane group n needs of a column's 64 sign bits is byte n. So the signs of a
// step of 16 columns, 2 bits for each of 16 registers, are one word a lane.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/mma.cuh"
#include "random.h"

namespace tracmod::cuda::fused {

constexpr int kRows = 64;  // of R_in and of R_out, a block
constexpr int kWarpTokens = 16;
constexpr int kMaxWarps = 8;
constexpr int kTileTokens = kWarpTokens * kMaxWarps;
constexpr int kSumTokens = 64;  // tokens whose products are summed before they are added to out
constexpr int kSliceBytes = 128;
constexpr int kStages = 4;
constexpr int kStageBytes = kWarpTokens * kSliceBytes;
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
  int batch;
  int span;                   // tokens of one example in a tile
  int examples;               // of a tile; with more than one, `span` is S
  int tiles;                  // of an example that are blocks of their own
  int out_blocks, in_blocks;  // of 64 rows and of 64 columns of the grid
  int k_out, k_in;
  float scale;
  float* out;
  int64_t stride;
  float* sums;  // (B, S / 64, k_out, k_in): where tiles > 1, sums of 64 tokens go here, not to out

  __device__ float* sums_of(int64_t example, int64_t token) const {
    const int64_t number = example * ceil_div(lengths.tokens, kSumTokens) + token / kSumTokens;
    return sums + number * k_out * k_in;
  }
};

// Row i of a tile is token `token + i % span` of example `example + i / span`.
struct Tile {
  int example, examples, token;
  int first_out, first_in;  // of its 64 rows of R_out and of R_in

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

// The two sign bits of `a` over `rest`, in one instruction: of two constants and two operators the
// compiler makes two.
__device__ inline uint32_t with_signs(uint32_t a, uint32_t rest) {
#ifdef TRACMOD_EMULATE
  return (a & 0x80008000u) | rest;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, 0x80008000, %2, 0xea;" : "=r"(result) : "r"(a), "r"(rest));
  return result;
#endif
}

// Bits i and i + 16 of a word of signs as two bfloat16 entries.
template <Kind kind>
__device__ uint32_t entry_pair(const uint32_t (&word)[kPlanes<kind>], int i) {
  const uint32_t negative = word[0] << (15 - i);
  if (kind == Kind::rademacher) return with_signs(negative, 0x3f803f80u);  // +-1
  const uint32_t set = word[kPlanes<kind> - 1];
  const uint32_t exponent = (i < 15 ? set << (14 - i) : set >> 1) & 0x40004000u;
  return with_signs(negative, exponent);  // +-2, 0
}

// The signs of 256 columns: a word a lane and step of 16.
template <Kind kind>
using Signs = uint32_t[kPlanes<kind>][kSignColumns / 16 * 32];

// A block's shared memory: signs, of which one half is read while the other is made; P; the warps'
// rings of slices, where Q goes later.
template <Kind kind>
size_t shared_bytes(int warps) {
  const size_t rows = kPitch * sizeof(float), slices = kStages * kSliceBytes;  // a token
  return sizeof(Signs<kind>[2]) + warps * kWarpTokens * (rows + std::max(rows, slices));
}

// The signs of 256 columns from `begin` on.
template <class T, Kind kind>
__device__ void make_signs(const Source& source, int begin, int first, int k, Signs<kind>& words) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kSignColumns; i += static_cast<int>(blockDim.x)) {
    Entries entries{0, 0};
    if (begin + i < source.size) {
      entries = entries_of<kind>(source.stream, source.number(begin + i), first, k);
    }
    // A lane's depths are a chunk of float32 and two pairs of bfloat16.
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

// Where a chunk of 16 bytes of a row lies in a warp's slice: every read below meets all banks.
__device__ inline int place_of(int row, int chunk) {
  return row * kSliceBytes + (chunk ^ ((row & 1) << 2 | (row >> 1 & 3))) * 16;
}

// Brings a warp's 16 tokens to its ring, slice after slice of every source; a lane copies a chunk
// of four rows. What has no token, and columns past the end, become zeros without being read.
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
    unsigned any = bytes_;  // of other lanes' rows too
    for (int lanes = 8; lanes < 32; lanes *= 2) any |= __shfl_xor_sync(~0u, any, lanes);
    return any != 0;
  }
  __device__ const unsigned char* ring() const { return ring_; }

  __device__ void load(int stage) {
    while (left_ <= 0 && source_ < job_.count) open(source_++);
    if (left_ > 0) {
      const int mine = left_ - static_cast<int>(threadIdx.x) % 8 * kWidth;
      const Source& of = job_.sources[source_ - 1];
      const int64_t four_rows = 4 * static_cast<int64_t>(sizeof(T)) * of.size;
      if (of.aligned) {
        copy(stage, four_rows, mine > 0 ? bytes_ : 0);
      } else {
        copy_values(stage, four_rows, mine);
      }
      from_ += kSliceBytes;
      left_ -= 8 * kWidth;
    }
    commit_copies();  // an empty group too, so that they can be counted
  }

 private:
  static constexpr int kWidth = 16 / sizeof(T);

  // This lane's first row of the tile; the others are 4, 8 and 12 below.
  __device__ static int row() {
    return static_cast<int>(threadIdx.x) / 32 * kWarpTokens +
           static_cast<int>(threadIdx.x) % 32 / 8;
  }
  __device__ void open(int source) {
    const Source& of = job_.sources[source];
    left_ = of.size;
    const int64_t at =
        (tile_.first_row(job_) + row()) * of.size + static_cast<int>(threadIdx.x) % 8 * kWidth;
    from_ = static_cast<const char*>(of.rows) + at * static_cast<int64_t>(sizeof(T));
  }
  __device__ unsigned char* place(int stage, int pass) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return ring_ + stage * kStageBytes + place_of(lane / 8 + 4 * pass, lane % 8);
  }
  __device__ void copy(int stage, int64_t four_rows, unsigned bytes) const {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      copy_16_later(place(stage, pass), from_ + pass * four_rows, bytes >> 8 * pass & 0xff);
    }
  }
  __device__ void copy_values(int stage, int64_t four_rows, int left) const {
#pragma unroll 1
    for (int pass = 0; pass < 4; ++pass) {
      const T* values = reinterpret_cast<const T*>(from_ + pass * four_rows);
      alignas(16) T chunk[kWidth] = {};
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if ((bytes_ >> 8 * pass & 16) != 0 && e < left) chunk[e] = values[e];
      }
      *reinterpret_cast<uint4*>(place(stage, pass)) = *reinterpret_cast<const uint4*>(chunk);
    }
  }

  const Job& job_;
  const Tile& tile_;
  unsigned char* ring_;
  int source_ = 0, left_ = 0;
  unsigned bytes_ = 0;  // of each pass, 0 or 16
  const char* from_ = nullptr;
};

// A warp's tokens as first operands, `kSteps` steps of 16 depths, as many as registers have room
// for: all four of a bfloat16 slice (two beside sjlt's two words of signs), one of a float32
// slice's two. A value is the sum of its bfloat16 parts, the largest first: three parts hold a
// float32 exactly.
template <class T, Kind kind>
struct Tokens {
  static constexpr int kParts = sizeof(T) == 4 ? 3 : 1;
  static constexpr int kSteps = sizeof(T) == 4 ? 1 : kind == Kind::sjlt ? 2 : 4;
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

// Steps of a slice: a bfloat16 pair is a register as it lies.
template <Kind kind>
__device__ void read_tokens(const unsigned char* slice, int group,
                            Tokens<__nv_bfloat16, kind>& to) {
  constexpr int kSteps = Tokens<__nv_bfloat16, kind>::kSteps;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = 2 * (group * kSteps + step) + lane / 16;
    load_matrices(to.a[step][0], slice + place_of(lane % 16, chunk));
  }
}

template <Kind kind>
__device__ void read_tokens(const unsigned char* slice, int group, Tokens<float, kind>& to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const float4 chunk = *reinterpret_cast<const float4*>(
        slice + place_of(lane / 4 + 8 * below, group * 4 + lane % 4));
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

// total (16 tokens x 64 rows of R, a warp) += a slice's tokens R^T; `step` is the slice's first of
// the signs. The matrix units drop low bits each time they add: they sum a few steps alone, and
// float32 additions do the rest.
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
          float4{total[j][i], total[j + 1][i], total[j + 2][i], total[j + 3][i]};
    }
  }
}

// value = high + low, high rounded to tf32; of low the matrix units read the leading 11 bits. Three
// instructions, a third of mma.cuh's split: here they would take as long as the products.
__device__ inline void split_here(float value, uint32_t& high, uint32_t& low) {
  high = (__float_as_uint(value) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(value - __uint_as_float(high));
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
    split_here(token < count ? q[token * kPitch + i % 2 * 8] : 0.0f, a_high[i / 4][i % 4],
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
        split_here(token < count ? p[token * kPitch + 8 * j] : 0.0f, b_high[i], b_low[i]);
      }
      multiply_tf32(sum, a_low[step], b_high);
      multiply_tf32(sum, a_high[step], b_low);
      multiply_tf32(sum, a_high[step], b_high);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) total[j][i] += sum[i];
  }
}

// Adds 16 rows x 32 columns that a warp has multiplied to an example's row of out, or stores them.
__device__ inline void add_to_rows(const Job& job, const float (&total)[4][4], int row, int column,
                                   float* to, bool add) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  row += lane / 4;
  column += lane % 4;
  float* at = to + static_cast<int64_t>(row) * job.k_in + column;
  float before[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // all reads first: they wait for memory together
    const int down = i / 2 % 2 * 8, right = i / 4 * 8 + i % 2 * 4;
    const bool inside = add && row + down < job.k_out && column + right < job.k_in;
    before[i / 4][i % 4] = inside ? at[static_cast<int64_t>(down) * job.k_in + right] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int down = i / 2 % 2 * 8, right = i / 4 * 8 + i % 2 * 4;
    if (row + down < job.k_out && column + right < job.k_in) {
      const float sum = total[i / 4][i % 4];
      at[static_cast<int64_t>(down) * job.k_in + right] =
          add ? fmaf(job.scale, sum, before[i / 4][i % 4]) : sum;
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

// One walk of a block along all slices of a tile.
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

  // total += the warp's tokens of sources [begin, end) times their R^T, rows from `first` of k.
  __device__ void project(int begin, int end, int first, int k, float (&total)[8][4]) {
    constexpr int kWidth = kSliceBytes / static_cast<int>(sizeof(T));
    for (int i = begin; i < end; ++i) {
      const Source& source = job_.sources[i];
      for (int column = 0; column < source.size; column += kWidth) {
        const int at = column % kSignColumns;
        if (at == 0) {  // the half that was read 256 columns ago, before the last barrier
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
    __syncwarp();  // every lane's copies are there, and the slice before has been read
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

// P of the warps' tokens, then Q where the rings were, then their product.
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
  __syncthreads();  // every ring has been read
  auto* q = reinterpret_cast<float*>(rings);
  store_tokens(total, q);
  __syncthreads();
  add_products(job, tile, p, q);
}

// A wrong length is seen as NaN.
__device__ inline void mark_bad(const Job& job, const Tile& tile) {
  for (int e = 0; e < tile.examples; ++e) {
    if (!job.lengths.bad(tile.example + e)) continue;
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

template <class T, Kind kind>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    project_tiles(const __grid_constant__ Job job) {
  auto& signs = *reinterpret_cast<Signs<kind>(*)[2]>(dynamic_shared());
  auto* p = reinterpret_cast<float*>(dynamic_shared() + sizeof signs);
  const int tokens = static_cast<int>(blockDim.x) / 32 * kWarpTokens;
  auto* rings = reinterpret_cast<unsigned char*>(p + tokens * kPitch);
  unsigned char* ring = rings + static_cast<int>(threadIdx.x) / 32 * kStages * kStageBytes;
  Tile tile(job, blockIdx.x);
  mark_bad(job, tile);
  for (; tile.token < job.lengths.tokens; tile.token += job.span) {
    const Loader<T> loader(job, tile, ring);
    // The barrier is for P and Q of the tile before, too.
    if (!__syncthreads_or(loader.has_tokens())) return;
    project_tile<T, kind>(job, tile, loader, signs, p, rings);
    if (job.tiles > 1) return;
  }
}

}  // namespace tracmod::cuda::fused

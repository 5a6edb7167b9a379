// The sketch of a linear layer's gradient G (rows, I + bias), which is formed: for each element
//
//   out[b][bucket] += sign G_b[row][column],   G_b = sum_s q_bs [x_bs, 1]^T
//
// with the buckets and signs of random.h. q is g itself, or Q = sum_j g_j R_out_j^T.
//
// Runs. 16 neighbouring columns of a row go to 16 neighbouring buckets, so they are added together:
// a run is the part of 16 columns that shares a hash.
//
// Who adds what. The buckets of an example are divided among the half-warps of a block, and among
// blocks where an example has several. A half-warp owns its buckets: it adds all runs that reach
// them to sums in shared memory, one lane per number. No two threads ever add to the same bucket,
// and a bucket's numbers are added in the order of the gradient's parts, however many owners the
// buckets have. Neither the division nor the batch changes a bit. make_lists hashes every run and
// lists the runs of every owner, once per call for all examples.
//
// Where the numbers come from. With one token they are products of a row of g and a column of x
// (sketch_products): four examples share the work of reading the lists. With more, a block forms
// 64 x 64 numbers of one example on the tensor cores in shared memory, in sums of 16 tokens, and
// adds them before it forms the next (sketch_tiles); G never reaches device memory.
//
//   Bytes: x and g (or Q), which are read once per block of an example, and the features. The lists
//   have 4 bytes for a run of 16 numbers and are read for every example, from the caches.
//   Limit on an H200: issuing instructions (bench/predict.py has the counts). More than
//   half of those of sketch_tiles add, and a third load and form.
#pragma once

#include <algorithm>

#include "cuda/project.cuh"

namespace tracmod::cuda::formed {

using fused::kPitch;

constexpr int kThreads = 256;
constexpr int kOwners = kThreads / 16;  // half-warps of a block
constexpr int kTogether = 4;            // examples of sketch_products
constexpr int kSide = 64;               // of a tile of sketch_tiles, in rows, columns and tokens

// Lists of runs. A part of the gradient is 256 pairs of a row and 16 columns: 64 rows x 64 columns
// for sketch_tiles, 256 rows x 16 columns for sketch_products. Each has a list for every owner. An
// entry, from its low bits:
//
//   14  where the run's first number is: in the tile, or row + 256 column
//    4  its length - 1
//    1  its sign
//   13  the first number's bucket, counted from 15 before the owner's first
struct Lists {
  int rows, columns, part_rows, part_columns, slots;  // slots: runs of 16 columns, at most
  int size, share, owners;  // K, of the slot; buckets of an owner; owners of all of them
  int capacity;             // entries of a part
  float* signs;             // of the columns, and 0 for those behind them in the last part
  int* starts;              // (parts, owners + 1) in the entries of the part
  uint32_t* entries;        // (parts, capacity)

  __host__ __device__ int row_parts() const { return (rows + part_rows - 1) / part_rows; }
  __host__ __device__ int column_parts() const {
    return (columns + part_columns - 1) / part_columns;
  }
  // Buckets of an owner.
  __device__ int count(int owner) const {
    const int left = size - owner * share;
    return left < 0 ? 0 : left < share ? left : share;
  }
};

constexpr int kPlaceBits = 14, kLengthBits = 4, kBefore = 15;
constexpr uint32_t kNothing = ~0u;  // an entry whose bucket no owner has
constexpr int kMaxShare = (1 << 13) - 2 * kBefore;

__device__ inline int64_t number_of(const int64_t* numbers, int64_t i) {
  return numbers == nullptr ? i : numbers[i];
}

// A run of at most 16 columns from `column` on, of those before `end`.
__device__ inline int run_length(const int64_t* numbers, int column, int end, int size) {
  const int64_t number = number_of(numbers, column);
  int length = 1;
  while (size >= kSparseGroup && column + length < end && (number + length) % kSparseGroup != 0 &&
         number_of(numbers, column + length) == number + length) {
    ++length;
  }
  return length;
}

// A block makes the lists of one part. A thread hashes the runs of a row in 16 columns, one after
// the other. A warp makes the lists of every eighth owner: first it counts their entries; when all
// lists have a place, it writes them.
__global__ void __launch_bounds__(kThreads)
    make_lists(Lists lists, const int64_t* row_numbers, uint64_t stream,
               const int64_t* column_numbers, uint64_t column_stream) {
  __shared__ int buckets[kThreads];    // of the first number of a run; -1 for no run
  __shared__ uint32_t runs[kThreads];  // the rest of the entry
  // (owners,) counts, then the end of each list so far.
  auto* next = reinterpret_cast<int*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int part = static_cast<int>(blockIdx.x), across = lists.column_parts();
  const int in_row = thread % lists.part_rows, in_column = thread / lists.part_rows * 16;
  const int row = part / across * lists.part_rows + in_row;
  const int begin = part % across * lists.part_columns + in_column;
  const int end = begin + 16 < lists.columns ? begin + 16 : lists.columns;
  if (row == 0) {
    for (int column = begin; column < begin + 16; ++column) {
      lists.signs[column] =
          column < end ? sign_of(step(column_stream, number_of(column_numbers, column))) : 0.0f;
    }
  }
  const uint64_t state = row < lists.rows ? step(stream, number_of(row_numbers, row)) : 0;
  uint32_t* entries = lists.entries + static_cast<int64_t>(part) * lists.capacity;
  for (int owner = thread; owner < lists.owners; owner += kThreads) next[owner] = 0;
  for (int pass = 0; pass < 2; ++pass) {
    int column = begin;
    for (int slot = 0; slot < lists.slots; ++slot) {
      __syncthreads();  // all warps have listed the previous runs
      buckets[thread] = -1;
      if (row < lists.rows && column < end) {
        const int length = run_length(column_numbers, column, end, lists.size);
        const int64_t number = number_of(column_numbers, column);
        const uint64_t hash = step(state, formed_hash_number(number, lists.size));
        const int64_t bucket = position_of(hash, lists.size) + formed_lane(number, lists.size);
        const int at = column - begin + in_column;
        const int place = lists.part_rows == kSide ? in_row * kPitch + at : in_row + 256 * at;
        buckets[thread] = static_cast<int>(bucket < lists.size ? bucket : bucket - lists.size);
        runs[thread] = place | (length - 1) << kPlaceBits |
                       static_cast<uint32_t>(hash & 1) << (kPlaceBits + kLengthBits);
        column += length;
      }
      __syncthreads();
      for (int owner = warp; owner < lists.owners; owner += kThreads / 32) {
        const int count = lists.count(owner);
        int at = next[owner];
        for (int first = 0; first < kThreads; first += 32) {
          const int bucket = buckets[first + lane];
          const uint32_t run = bucket < 0 ? 0 : runs[first + lane];
          const int length = static_cast<int>(run >> kPlaceBits) % 16 + 1;
          int ahead = bucket - owner * lists.share;
          if (ahead + length > lists.size) ahead -= lists.size;  // goes on at the first bucket
          const bool listed = bucket >= 0 && ahead < count && ahead + length > 0;
          const unsigned votes = __ballot_sync(~0u, listed);
          if (pass == 1 && listed) {
            entries[at + __popc(votes & ((1u << lane) - 1))] =
                run | static_cast<uint32_t>(ahead + kBefore) << (kPlaceBits + kLengthBits + 1);
          }
          at += __popc(votes);
        }
        __syncwarp();
        if (lane == 0) next[owner] = at;
      }
    }
    __syncthreads();
    if (pass == 1) break;
    if (thread == 0) {
      int* starts = lists.starts + static_cast<int64_t>(part) * (lists.owners + 1);
      int start = 0;
      for (int owner = 0; owner < lists.owners; ++owner) {
        const int count = next[owner];
        starts[owner] = next[owner] = start;
        start += count;
      }
      starts[lists.owners] = start;
    }
  }
}

// Calls add(entry, bucket) for all numbers of a part that go to this half-warp's buckets, of which
// there are `count`, with one lane per number of a run. Called by a whole warp. Numbers of other
// runs may reach a bucket through other lanes, so lanes wait for each other.
template <class Add>
__device__ void add_part(const Lists& lists, int part, int owner, const Add& add) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int* starts = lists.starts + static_cast<int64_t>(part) * (lists.owners + 1) + owner;
  const uint32_t* list =
      lists.entries + static_cast<int64_t>(part) * lists.capacity + starts[0] + lane % 16;
  const int count = starts[1] - starts[0];
  for (int first = 0;; first += 16) {
    // That the number of steps comes from a vote tells the compiler that lanes stay together.
    const unsigned votes = __ballot_sync(~0u, first + lane % 16 < count);
    if (votes == 0) break;
    const uint32_t loaded = first + lane % 16 < count ? list[first] : kNothing;
    const int lower = __popc(votes & 0xffffu), upper = __popc(votes >> 16);
    const int steps = lower > upper ? lower : upper;
    for (int i = 0; i < steps; ++i) {
      add(__shfl_sync(~0u, loaded, (lane & 16) + i));
      __syncwarp();
    }
  }
}

__device__ inline unsigned place_of(uint32_t entry) { return entry & ((1u << kPlaceBits) - 1); }
__device__ inline unsigned last_of(uint32_t entry) { return entry >> kPlaceBits & 15; }
// The bucket, counted from the owner's first, of the number `behind` the first of a run.
__device__ inline unsigned bucket_of(uint32_t entry, unsigned behind) {
  return (entry >> (kPlaceBits + kLengthBits + 1)) + (behind - kBefore);
}
__device__ inline uint32_t sign_bit(uint32_t entry) {
  return entry << (31 - kPlaceBits - kLengthBits) & 0x80000000u;
}

__device__ inline float with_sign(float value, uint32_t sign) {
  return __uint_as_float(__float_as_uint(value) ^ sign);
}

// The same column of four examples.
template <class T>
__device__ float4 load_four(const T* values, int64_t width, int64_t column,
                            const bool (&exists)[4]) {
  float4 loaded;
  loaded.x = exists[0] ? to_float(values[column]) : 0.0f;
  loaded.y = exists[1] ? to_float(values[width + column]) : 0.0f;
  loaded.z = exists[2] ? to_float(values[2 * width + column]) : 0.0f;
  loaded.w = exists[3] ? to_float(values[3 * width + column]) : 0.0f;
  return loaded;
}

// Examples of one token: g (B, rows), x (B, width). A block owns some buckets of four examples. 256
// rows of g at a time are in shared memory, 16 columns of x in registers. kWhole says that all runs
// have 16 columns, except the last one of a row, which has those that are left.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    sketch_products(Lists lists, const T* g, const T* x, int width, Lengths lengths, int batch,
                    float* out, int64_t stride) {
  auto* g_rows = reinterpret_cast<float4*>(dynamic_shared());
  const int half = static_cast<int>(threadIdx.x) / 16, lane = static_cast<int>(threadIdx.x) % 16;
  const int owner = static_cast<int>(blockIdx.y) * kOwners + half;
  const int count = lists.count(owner);
  float4* sums = g_rows + kThreads + half * lists.share;
  const int64_t example = static_cast<int64_t>(blockIdx.x) * kTogether;
  bool exists[kTogether];
  for (int e = 0; e < kTogether; ++e) {
    exists[e] = example + e < batch && lengths.of(example + e) > 0;
  }
  for (int i = lane; i < count; i += 16) sums[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
  const int across = lists.column_parts();
  for (int part = 0; part < lists.row_parts() * across; ++part) {
    if (part % across == 0) {
      const int row = part / across * kThreads + static_cast<int>(threadIdx.x);
      __syncthreads();  // all warps have used the previous rows
      if (row < lists.rows) {
        const float4 four = load_four(g + example * lists.rows, lists.rows, row, exists);
        g_rows[threadIdx.x] = four;
      }
      __syncthreads();
    }
    const int column = part % across * 16 + lane;
    float4 at{0.0f, 0.0f, 0.0f, 0.0f};
    if (column < lists.columns) {
      const float sign = lists.signs[column];
      at = float4{sign, sign, sign, sign};
      if (column < width) {
        at = load_four(x + example * width, width, column, exists);
        at = float4{sign * at.x, sign * at.y, sign * at.z, sign * at.w};
      }
    }
    const unsigned limit = column < lists.columns ? count : 0;
    add_part(lists, part, owner, [&](uint32_t entry) {
      const unsigned place = place_of(entry), behind = kWhole ? lane : lane - place / 256;
      const unsigned bucket = bucket_of(entry, behind);
      if ((!kWhole && behind > last_of(entry)) || bucket >= limit) return;
      const uint32_t sign = sign_bit(entry);
      const float4 value = g_rows[place % 256];
      float4 sum = sums[bucket];
      sum.x += with_sign(value.x, sign) * at.x;
      sum.y += with_sign(value.y, sign) * at.y;
      sum.z += with_sign(value.z, sign) * at.z;
      sum.w += with_sign(value.w, sign) * at.w;
      sums[bucket] = sum;
    });
  }
#pragma unroll
  for (int e = 0; e < kTogether; ++e) {
    if (example + e >= batch) break;
    const bool invalid = lengths.invalid(example + e);
    float* features = out + (example + e) * stride + owner * lists.share;
#pragma unroll 1
    for (int i = lane; i < count; i += 16) {
      const float4 sum = sums[i];
      const float value = e == 0 ? sum.x : e == 1 ? sum.y : e == 2 ? sum.z : sum.w;
      features[i] += invalid ? not_a_number() : value;
    }
  }
}

// The operands of 64 x 64 numbers of a gradient, from at most 64 tokens, and their product. Sums
// are those of 16 tokens, and ordinary float32 additions of them: the tensor cores round towards
// zero (mma.cuh).
//
// float32: both operands are in shared memory as they are, and multiply_tokens multiplies them.
template <class Q, class T>
struct Operands {
  static constexpr int kFloats = 2 * kSide * kPitch;  // of shared memory

  float* q;  // (tokens, 64 rows)
  float* x;  // (tokens, 64 columns)

  __device__ explicit Operands(float* memory) : q(memory), x(memory + kSide * kPitch) {}

  // Begins to load rows [first, first + 64) of `count` tokens of q.
  __device__ void load_q(const Q* from, int64_t pitch, int rows, int first, int count) const {
    const int row = first + static_cast<int>(threadIdx.x) % kSide;
    for (int s = static_cast<int>(threadIdx.x) / kSide; s < count; s += kThreads / kSide) {
      q[s * kPitch + row - first] = row < rows ? to_float(from[s * pitch + row]) : 0.0f;
    }
  }
  // The same for columns of [x, 1], of which there are `columns`.
  __device__ void load_x(const T* from, int width, int columns, int first, int count) const {
    const int column = first + static_cast<int>(threadIdx.x) % kSide;
    const float without = column < columns ? 1.0f : 0.0f;
#pragma unroll 1
    for (int s = static_cast<int>(threadIdx.x) / kSide; s < count; s += kThreads / kSide) {
      const int64_t at = static_cast<int64_t>(s) * width + column;
      x[s * kPitch + column - first] = column < width ? to_float(from[at]) : without;
    }
  }
  __device__ void wait() const {}

  // total (16 rows x 32 columns, per warp) += q^T x over tokens [s, s + 16), of which `left` exist.
  __device__ void multiply(int s, int left, float (&total)[4][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int shuffled = lane / 4 % 2 * 4 + lane / 8;  // see add_products
    fused::multiply_tokens(q + s * kPitch + warp / 2 * 16 + lane / 4,
                           x + s * kPitch + warp % 2 * 32 + shuffled, left, total);
  }
  // The column of total[j][i], of the 32.
  __device__ static int column(int j, int i) {
    return 8 * j + i % 2 * 4 + static_cast<int>(threadIdx.x) % 4;
  }
};

// bfloat16: x stays as it is, so that the copy unit copies it and the tensor cores read it. A
// float32 q is split into three bfloat16, which hold its 24 bits, when it is loaded; their products
// with x are exact.
template <class Q>
struct Operands<Q, __nv_bfloat16> {
  using T = __nv_bfloat16;
  static constexpr int kParts = sizeof(Q) == 4 ? 3 : 1;
  static constexpr int kPairs = kSide / 2 * kPitch;  // words of a part: pairs of tokens x 64 rows
  static constexpr int kFloats = kParts * kPairs + kSide * kPitch / 2;

  uint32_t* q;  // (parts, pairs of tokens, rows)
  T* x;         // (tokens, 64 columns)

  __device__ explicit Operands(float* memory)
      : q(reinterpret_cast<uint32_t*>(memory)), x(reinterpret_cast<T*>(memory + kParts * kPairs)) {}

  __device__ void load_q(const Q* from, int64_t pitch, int rows, int first, int count) const {
    const int in_tile = static_cast<int>(threadIdx.x) % kSide, row = first + in_tile;
    const int end = (count + 15) / 16 * 8;  // pairs, of which multiply reads 8 at a time
#pragma unroll 1
    for (int pair = static_cast<int>(threadIdx.x) / kSide; pair < end; pair += kThreads / kSide) {
      const Q* at = from + 2 * pair * pitch + row;
      const bool upper = row < rows && 2 * pair < count, lower = row < rows && 2 * pair + 1 < count;
      float left = upper ? to_float(at[0]) : 0.0f, right = lower ? to_float(at[pitch]) : 0.0f;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        q[part * kPairs + pair * kPitch + in_tile] = fused::take_part(left, right);
      }
    }
  }
  __device__ void load_x(const T* from, int width, int columns, int first, int count) const {
    const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && width % 8 == 0;
    const int end = (count + 15) / 16 * 16;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < end * kSide / 8; i += kThreads) {
      const int s = i / 8, in_tile = i % 8 * 8, column = first + in_tile;
      const T* at = from + static_cast<int64_t>(s) * width + column;
      T* to = x + s * kPitch + in_tile;
      if (aligned && column < width) {
        copy_16_later(to, at, s < count ? 16 : 0);
        continue;
      }
      alignas(16) T values[8];
      for (int e = 0; e < 8; ++e) {
        const bool one = s < count && column + e >= width && column + e < columns;
        values[e] = __float2bfloat16(one ? 1.0f : 0.0f);
        if (s < count && column + e < width) values[e] = at[e];
      }
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
    }
    commit_copies();
  }
  __device__ void wait() const { wait_copies<0>(); }

  __device__ void multiply(int s, int, float (&total)[4][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const uint32_t* words = q + (s / 2 + lane % 4) * kPitch + warp / 2 * 16 + lane / 4;
    const T* rows = x + (s + lane % 16) * kPitch + warp % 2 * 32 + lane / 16 * 8;
    uint32_t a[kParts][4];
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i) {
      a[i / 4][i % 4] = words[i / 4 * kPairs + i / 2 % 2 * 4 * kPitch + i % 2 * 8];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t loaded[4];
      load_matrices_transposed(loaded, rows + 16 * half);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t columns[2] = {loaded[2 * j], loaded[2 * j + 1]};
        float sum[4] = {};
#pragma unroll
        for (int part = kParts - 1; part >= 0; --part) multiply_bf16(sum, a[part], columns);
#pragma unroll
        for (int i = 0; i < 4; ++i) total[2 * half + j][i] += sum[i];
      }
    }
  }
  __device__ static int column(int j, int i) {
    return 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
  }
};

// Examples of any number of tokens: q (B, S, pitch), of which `rows` are used, and x (B, S, width).
// A block owns some buckets of one example. The operands of a tile are loaded while the previous
// tile is added.
template <class Q, class T>
__global__ void __launch_bounds__(kThreads, 3)
    sketch_tiles(Lists lists, const Q* q, int64_t pitch, const T* x, int width, Lengths lengths,
                 float scale, float* out, int64_t stride) {
  auto* tile = reinterpret_cast<float*>(dynamic_shared());
  const Operands<Q, T> operands(tile + kSide * kPitch);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int owner = static_cast<int>(blockIdx.y) * kOwners + thread / 16;
  const int buckets = lists.count(owner);
  float* sums = tile + kSide * kPitch + operands.kFloats + thread / 16 * lists.share;
  const int64_t b = blockIdx.x;
  float* features = out + b * stride + owner * lists.share;
  if (lengths.invalid(b)) {
    for (int i = lane % 16; i < buckets; i += 16) features[i] = not_a_number();
    return;
  }
  const int tokens = static_cast<int>(lengths.of(b));
  if (tokens == 0) return;
  q += b * lengths.tokens * pitch;
  x += b * lengths.tokens * width;
  for (int i = lane % 16; i < buckets; i += 16) sums[i] = 0.0f;
  const int across = lists.column_parts(), parts = lists.row_parts() * across;
  const auto load = [&](int part, int token) {
    const int first = part % across * kSide, left = tokens - token;
    const int count = left < kSide ? left : kSide;
    if (first == 0 || tokens > kSide) {  // otherwise the rows are those of the previous tile
      operands.load_q(q + token * pitch, pitch, lists.rows, part / across * kSide, count);
    }
    operands.load_x(x + static_cast<int64_t>(token) * width, width, lists.columns, first, count);
  };
  load(0, 0);
  for (int part = 0; part < parts; ++part) {
    float total[4][4] = {};
    for (int token = 0; token < tokens; token += kSide) {
      if (token > 0) {
        __syncthreads();  // all warps have multiplied the previous tokens
        load(part, token);
      }
      operands.wait();
      __syncthreads();  // all operands are loaded, and all warps have added the previous tile
      const int count = tokens - token < kSide ? tokens - token : kSide;
#pragma unroll 1
      for (int s = 0; s < count; s += 16) operands.multiply(s, count - s, total);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = warp / 2 * 16 + lane / 4 + i / 2 % 2 * 8;
      const int column = warp % 2 * 32 + operands.column(i / 4, i % 4);
      const float sign = lists.signs[part % across * kSide + column];
      tile[row * kPitch + column] = sign * total[i / 4][i % 4];
    }
    __syncthreads();  // the tile is complete, and all warps have multiplied
    if (part + 1 < parts) load(part + 1, 0);
    const float* values = tile + lane % 16;
    add_part(lists, part, owner, [&](uint32_t entry) {
      const unsigned bucket = bucket_of(entry, lane % 16);
      if (lane % 16 > last_of(entry) || bucket >= static_cast<unsigned>(buckets)) return;
      sums[bucket] += with_sign(values[place_of(entry)], sign_bit(entry));
    });
  }
  for (int i = lane % 16; i < buckets; i += 16) {
    features[i] = fmaf(scale, sums[i], features[i]);
  }
}

// q (B S, pitch) = sum_j g_j R_out_j^T, without the scale: the fused kernel's pass over g. A block
// owns 64 rows of R_out and the tokens of one tile.
template <class T>
__global__ void __launch_bounds__(32 * fused::kMaxWarps, 2)
    reduce_outputs(const __grid_constant__ fused::Job job, int pitch, float* q) {
  using Words = fused::Signs<Kind::rademacher>;
  auto& signs = *reinterpret_cast<Words(*)[2]>(dynamic_shared());
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  auto* ring = reinterpret_cast<unsigned char*>(dynamic_shared() + sizeof signs) +
               warp * fused::kStages * fused::kStageBytes;
  const fused::Tile tile(job, blockIdx.x);
  const fused::Loader<T> loader(job, tile, ring);
  if (!__syncthreads_or(loader.has_tokens())) return;
  fused::Walk<T, Kind::rademacher> walk(job, loader, signs);
  float total[8][4] = {};
  walk.project(0, job.count, tile.first_out, job.k_out, total);
  // Lane 4 g + n holds 16 neighbouring columns, from 16 n on, of tokens g and g + 8.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = warp * fused::kWarpTokens + lane / 4 + i / 2 * 8;
    if (!tile.holds(job, token)) continue;
    float* to = q + (tile.first_row(job) + token) * pitch;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const int column = tile.first_out + lane % 4 * 16 + i % 2 * 8 + j;
      if (column < pitch) {
        *reinterpret_cast<float4*>(to + column) =
            float4{total[j][i], total[j + 1][i], total[j + 2][i], total[j + 3][i]};
      }
    }
  }
}

}  // namespace tracmod::cuda::formed

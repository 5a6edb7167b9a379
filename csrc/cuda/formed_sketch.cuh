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
// them to sums in shared memory, one lane per number. So no two threads ever add to the same bucket,
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
//   Limit on an H200: issuing instructions (bench/predict.py has the counts), of which sketch_tiles
//   spends about half on adding and half on forming.
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
  float* signs;             // (columns,)
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
// the other. A warp makes the lists of every eighth owner: first it counts their entries, then, when
// all lists have a place, it writes them.
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
    for (int column = begin; column < end; ++column) {
      lists.signs[column] = sign_of(step(column_stream, number_of(column_numbers, column)));
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

// Copies rows [begin, begin + 64) of q of `count` <= 64 tokens to shared memory, as float32.
template <class Q>
__device__ void load_q(const Q* q, int64_t pitch, int rows, int begin, int count, float* to) {
  const int row = begin + static_cast<int>(threadIdx.x) % kSide;
  for (int s = static_cast<int>(threadIdx.x) / kSide; s < count; s += kThreads / kSide) {
    to[s * kPitch + row - begin] = row < rows ? to_float(q[s * pitch + row]) : 0.0f;
  }
}

// The same for columns [begin, begin + 64) of [x, 1], with the signs of the columns.
template <class T>
__device__ void load_x(const Lists& lists, const T* x, int width, int begin, int count, float* to) {
  const int column = begin + static_cast<int>(threadIdx.x) % kSide;
  const float sign = column < lists.columns ? lists.signs[column] : 0.0f;
  for (int s = static_cast<int>(threadIdx.x) / kSide; s < count; s += kThreads / kSide) {
    to[s * kPitch + column - begin] =
        column < width ? sign * to_float(x[static_cast<int64_t>(s) * width + column]) : sign;
  }
}

// Examples of any number of tokens: q (B, S, pitch), of which `rows` are used, and x (B, S, width).
// A block owns some buckets of one example.
template <class Q, class T>
__global__ void __launch_bounds__(kThreads, 3)
    sketch_tiles(Lists lists, const Q* q, int64_t pitch, const T* x, int width, Lengths lengths,
                 float scale, float* out, int64_t stride) {
  auto* q_tile = reinterpret_cast<float*>(dynamic_shared());
  float* x_tile = q_tile + kSide * kPitch;  // later the tile that is formed
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int owner = static_cast<int>(blockIdx.y) * kOwners + thread / 16;
  const int buckets = lists.count(owner);
  float* sums = x_tile + kSide * kPitch + thread / 16 * lists.share;
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
  // A warp forms 16 rows x 32 columns of a tile; see add_products for the order of columns.
  const int row = warp / 2 * 16 + lane / 4, column = warp % 2 * 32;
  const int shuffled = lane / 4 % 2 * 4 + lane / 8;
  const int across = lists.column_parts();
  for (int part = 0; part < lists.row_parts() * across; ++part) {
    const int first_row = part / across * kSide, first = part % across * kSide;
    float total[4][4] = {};
    for (int token = 0; token < tokens; token += kSide) {
      const int count = tokens - token < kSide ? tokens - token : kSide;
      __syncthreads();  // all warps have added the previous tile, or multiplied these tokens
      if (first == 0 || tokens > kSide) {
        load_q(q + token * pitch, pitch, lists.rows, first_row, count, q_tile);
      }
      load_x(lists, x + static_cast<int64_t>(token) * width, width, first, count, x_tile);
      __syncthreads();
#pragma unroll 1
      for (int s = 0; s < count; s += fused::kWarpTokens) {
        // A bfloat16 is exact in tf32.
        fused::multiply_tokens<sizeof(T) == 2>(
            q_tile + s * kPitch + row, x_tile + s * kPitch + column + shuffled, count - s, total);
      }
    }
    __syncthreads();  // all warps have read the columns, which the tile overwrites
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int down = i / 2 % 2 * 8, right = i / 4 * 8 + i % 2 * 4;
      x_tile[(row + down) * kPitch + column + right + lane % 4] = total[i / 4][i % 4];
    }
    __syncthreads();
    const float* values = x_tile + lane % 16;
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

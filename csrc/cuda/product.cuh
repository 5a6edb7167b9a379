// A 128 x 128 or 128 x 256 tile of a product on the tensor cores, computed by one block of 256
// threads:
//
//   multiply_rows, add_rows   C[m][n] = sum_d a[m][d] b[n][d]   both operands are rows of a matrix
//   multiply_columns          C[m][n] = sum_s a[s][m] b[s][n]   both operands are columns
//
// Each of the 8 warps owns 64 x 32 or 64 x 64 elements in registers. The operands go through shared
// memory in stages; three stages are in flight, so that the copies of the next two overlap with the
// products of one. A stage of rows is 128 bytes of each row: 64 bfloat16 or 32 float32.
//
// Bytes: a value of an operand is read from L2 once per tile, so one multiply-add costs 2 / 128
// values in a tile of 128 x 128 and 3 / 256 in one of 128 x 256. The .cu files derive their limits
// from that. Larger tiles would read less, but their sums would not fit into registers.
//
// Swizzle: row r of a stage is stored at byte 128 r, and its 16-byte part p in slot p ^ (r % 8) of
// that row. 128 bytes are all 32 banks of shared memory, so without the swizzle the eight rows that
// load_matrices reads at once would start in the same bank and be read one after the other.
//
// Order: an element is summed along the depth in an order that depends on the depth alone. The
// tensor cores round towards zero when they add (mma.cuh), so chains of such additions are kept
// short, and at the end of each chain its sums are handed to the callback `add`.
#pragma once

#include "cuda/mma.cuh"

namespace tracmod::cuda {

constexpr int kSide = 128;  // rows of a tile, and columns unless noted otherwise
constexpr int kProductThreads = 256;
constexpr int kRowBytes = 128;                        // of each row per stage
constexpr int kPart = 16;                             // bytes of a part, the unit of the swizzle
constexpr int kStages = 3;                            // stages in flight
constexpr int kStageBytes = 2 * kSide * kRowBytes;    // of both operands
constexpr int kProductBytes = kStages * kStageBytes;  // dynamic shared memory of multiply_rows
constexpr int kChain = 256;  // values of the depth that the tensor cores add up in one chain

// This thread's elements of a tile with 32 kN columns. sums[m][n][i] is the element at row
// tile_row_of(m, i) and column tile_column_of<kN>(n, i), the layout of d in mma.cuh.
template <int kN = 4>
using TileSums = float[4][kN][4];

__device__ inline int tile_row_of(int m, int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  return warp / 4 * 64 + m * 16 + i / 2 * 8 + lane / 4;
}
template <int kN = 4>
__device__ inline int tile_column_of(int n, int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  return (warp % 4 * kN + n) * 8 + lane % 4 * 2 + i % 2;
}

// Calls visit(m, n, i) for each of this thread's elements.
template <int kN = 4, class Visit>
__device__ inline void for_tile(Visit visit) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(m, n, i);
    }
  }
}

// The number of bytes that can be copied at a time from rows of `width` values: 16 or 4 if all rows
// are aligned to that, else the size of one value.
template <class T>
int copy_unit(int64_t width, std::initializer_list<const void*> rows) {
  uint64_t bits = static_cast<uint64_t>(width) * sizeof(T);
  for (const void* at : rows) bits |= reinterpret_cast<uintptr_t>(at);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : static_cast<int>(sizeof(T));
}

// An operand made of consecutive rows of a matrix. Rows from `count` on read as zeros. `left` is
// the number of rows until the end of the matrix; it is clamped so that it fits an int.
template <class T>
struct MatrixSide {
  const T* first;
  int64_t stride;
  int count;

  __device__ MatrixSide(const T* rows, int64_t width, int64_t left)
      : first(rows), stride(width), count(left < 1024 ? static_cast<int>(left) : 1024) {}
  __device__ const T* base() const { return first; }
  __device__ int rows() const { return count < kSide ? count : kSide; }
  __device__ const T* operator()(int row) const {
    return row < count ? first + row * stride : nullptr;
  }
};

// Address of a 16-byte part of a row in a stage, swizzled.
__device__ inline char* part_of(char* tile, int row, int part) {
  return tile + row * kRowBytes + (part ^ (row % 8)) * kPart;
}

// Starts copying the first `count` values of a 16-byte part, with zeros behind them. Copies of 16
// and 4 bytes are asynchronous; rows that are aligned to neither are copied value by value.
template <class T>
__device__ inline void copy_part(char* to, const T* from, int count, int unit) {
  constexpr int kValues = kPart / static_cast<int>(sizeof(T));
  const int bytes = count * static_cast<int>(sizeof(T));
  if (unit == 16) {
    copy_16_later(to, from, bytes);
  } else if (unit == 4) {
    const char* words = reinterpret_cast<const char*>(from);
#pragma unroll
    for (int at = 0; at < kPart; at += 4) {
      copy_4_later(to + at, at < bytes ? words + at : words, at < bytes ? 4 : 0);
    }
  } else {
#pragma unroll 1
    for (int v = 0; v < kValues; ++v) reinterpret_cast<T*>(to)[v] = v < count ? from[v] : T{};
  }
}

// Starts copying one operand's stage: 128 bytes of every row from value `begin` on, zeros past
// `depth`. A thread copies one 16-byte part of every 32nd row, so that 8 threads read 128
// neighbouring bytes.
template <class T, int kRows = kSide, class Side>
__device__ inline void start_copies(const Side& side, int begin, int depth, int unit, char* to) {
  constexpr int kValues = kPart / static_cast<int>(sizeof(T));
  const int part = static_cast<int>(threadIdx.x) % 8;
  const int d = begin + part * kValues;
  const int left = d >= depth ? 0 : depth - d < kValues ? depth - d : kValues;
#pragma unroll
  for (int i = 0; i < kRows / 32; ++i) {
    const int row = static_cast<int>(threadIdx.x / 8) + 32 * i;
    const T* values = side(row);
    const int count = values == nullptr ? 0 : left;
    copy_part<T>(part_of(to, row, part), count > 0 ? values + d : side.base(), count, unit);
  }
}

// sums += the products of one stage. Rows from row_count on and columns from column_count on are
// zeros; if `bounded`, warps skip them.
template <class T, bool bounded, int kN>
__device__ inline void multiply_stage(char* a, char* b, int row_count, int column_count,
                                      TileSums<kN>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (bounded && warp % 4 * 8 * kN >= column_count) return;
  const int row = warp / 4 * 64 + lane % 16;
  const int column = warp % 4 * 8 * kN + lane / 16 * 8 + lane % 8;
#pragma unroll(sizeof(T) == 2 ? 4 : 1)  // the three products of float32 leave no registers for more
  for (int part = 0; part < kRowBytes / kPart; part += 2) {
    uint32_t columns[kN][2];
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t pair[4];
      load_matrices(pair, part_of(b, column + 8 * n, part + lane / 8 % 2));
      for (int i = 0; i < 4; ++i) columns[n + i / 2][i % 2] = pair[i];
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        if (bounded && warp / 4 * 64 + 16 * m >= row_count) break;
        uint32_t rows[4];
        load_matrices(rows, part_of(a, row + 16 * m, part + lane / 16));
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply_bf16(sums[m][n], rows, columns[n]);
      }
    } else {
      uint32_t high[kN][2], low[kN][2];
#pragma unroll
      for (int n = 0; n < kN; ++n) split(columns[n], high[n], low[n]);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        if (bounded && warp / 4 * 64 + 16 * m >= row_count) break;
        uint32_t rows[4], rows_high[4], rows_low[4];
        load_matrices(rows, part_of(a, row + 16 * m, part + lane / 16));
        split(rows, rows_high, rows_low);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          multiply_float(sums[m][n], rows_high, rows_low, high[n], low[n]);
        }
      }
    }
  }
}

// Runs the stages of a product through shared memory: `start(step, stage)` starts the copies of a
// step, `multiply(step, stage)` uses them. Called by the whole block; afterwards `memory` (kStages
// * stage_bytes) may be used for something else.
//
// Every step commits one group of copies, even if it is empty; so when at most kStages - 2 groups
// are unfinished, the group of the current step is complete. One barrier per step does two things:
// it makes the copies of all threads visible, and it ensures that every thread has finished the
// previous step, whose memory the next copies overwrite.
template <class Start, class Multiply>
__device__ void run_stages(int steps, int stage_bytes, char* memory, Start start,
                           Multiply multiply) {
  const auto start_if = [&](int step) {
    if (step < steps) start(step, memory + step % kStages * stage_bytes);
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) start_if(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    start_if(step + kStages - 1);
    multiply(step, memory + step % kStages * stage_bytes);
  }
  wait_copies<0>();
  __syncthreads();
}

// At the end of a chain, hands the sums to `add` and clears them.
template <class Add>
__device__ inline void end_chain(int step, int steps, int steps_a_chain, TileSums<>& sums,
                                 Add& add) {
  if ((step + 1) % steps_a_chain != 0 && step + 1 != steps) return;
  add(sums);
  for_tile([&](int m, int n, int i) { sums[m][n][i] = 0.0f; });
}

// C[m][n] = sum_d a[m][d] b[n][d] over `depth` values of d (below 2^31). `add(sums)` receives the
// sums of each chain.
template <class T, bool bounded = false, int chain = kChain, class A, class B, class Add>
__device__ void multiply_rows(const A& a, const B& b, int depth, int unit, char* memory, Add add) {
  constexpr int kStep = kRowBytes / sizeof(T);
  const int steps = (depth + kStep - 1) / kStep;
  const int row_count = bounded ? a.rows() : kSide, column_count = bounded ? b.rows() : kSide;
  TileSums<> sums = {};
  run_stages(
      steps, kStageBytes, memory,
      [&](int step, char* stage) {
        start_copies<T>(a, step * kStep, depth, unit, stage);
        start_copies<T>(b, step * kStep, depth, unit, stage + kSide * kRowBytes);
      },
      [&](int step, char* stage) {
        multiply_stage<T, bounded>(stage, stage + kSide * kRowBytes, row_count, column_count, sums);
        end_chain(step, steps, chain / kStep, sums, add);
      });
}

// sums += the same product for 32 kN rows b, in a single chain: the drift (top_k_dot.cu states it)
// is far below the rounding of bfloat16 rows, and a second set of sums would not fit into
// registers.
template <class T, int kN, class A, class B>
__device__ void add_rows(const A& a, const B& b, int depth, int unit, char* memory,
                         TileSums<kN>& sums) {
  constexpr int kStep = kRowBytes / sizeof(T);
  run_stages((depth + kStep - 1) / kStep, (kSide + 32 * kN) * kRowBytes, memory,
             [&](int step, char* stage) {
               start_copies<T>(a, step * kStep, depth, unit, stage);
               start_copies<T, 32 * kN>(b, step * kStep, depth, unit, stage + kSide * kRowBytes);
             },
             [&](int, char* stage) {
               multiply_stage<T, false>(stage, stage + kSide * kRowBytes, kSide, 32 * kN, sums);
             });
}

// Products of columns, C[m][n] = sum_s a[s][m] b[s][n]. A stage is 32 rows s of 128 values. Rows
// are padded by 16 bytes (bfloat16) or 32 bytes (float32) in shared memory, so that reads down a
// column go to different banks.
constexpr int kDeep = 32;
template <class T>
constexpr int kPitch = (kSide + 8) * static_cast<int>(sizeof(T));
template <class T>
constexpr int kColumnBytes = kStages * 2 * kDeep * kPitch<T>;  // dynamic shared memory

// An operand made of 128 columns of a matrix. `first` points at its first element; `width` columns
// and `count` rows remain from there.
template <class T>
struct MatrixColumnsSide {
  const T* first;
  int64_t stride, width, count;
};

// Starts copying one operand's stage, rows [begin, begin + 32).
template <class T>
__device__ inline void start_column_copies(const MatrixColumnsSide<T>& side, int64_t begin,
                                           int unit, char* to) {
  constexpr int kValues = kPart / static_cast<int>(sizeof(T)), kParts = kSide / kValues;
#pragma unroll
  for (int at = 0; at < kDeep * kParts; at += kProductThreads) {
    const int part = at + static_cast<int>(threadIdx.x);
    const int row = part / kParts, column = part % kParts * kValues;
    const int64_t left = begin + row < side.count ? side.width - column : 0;
    const int count = left <= 0 ? 0 : left < kValues ? static_cast<int>(left) : kValues;
    const T* from = count > 0 ? side.first + (begin + row) * side.stride + column : side.first;
    copy_part<T>(to + row * kPitch<T> + column * static_cast<int>(sizeof(T)), from, count, unit);
  }
}

// sums += the products of one stage. bfloat16 operands are transposed by the load instruction;
// float32 has no such instruction, so its values are read one by one.
template <class T>
__device__ inline void multiply_column_stage(char* a, char* b, TileSums<>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp / 4 * 64, column = warp % 4 * 32;
  if constexpr (sizeof(T) == 2) {
    const auto at = [](char* tile, int s, int index) { return tile + s * kPitch<T> + 2 * index; };
#pragma unroll
    for (int s = 0; s < kDeep; s += 16) {
      uint32_t columns[4][2];
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t pair[4];
        load_matrices_transposed(pair, at(b, s + lane % 16, column + 8 * n + lane / 16 * 8));
        for (int i = 0; i < 4; ++i) columns[n + i / 2][i % 2] = pair[i];
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t rows[4];
        load_matrices_transposed(
            rows, at(a, s + lane / 16 * 8 + lane % 8, row + 16 * m + lane / 8 % 2 * 8));
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_bf16(sums[m][n], rows, columns[n]);
      }
    }
  } else {
    const auto at = [](char* tile, int s, int index) {
      return *reinterpret_cast<const float*>(tile + s * kPitch<T> + 4 * index);
    };
#pragma unroll 1  // the three products of float32 leave no registers for more
    for (int s = 0; s < kDeep; s += 8) {
      uint32_t high[4][2], low[4][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          split(at(b, s + lane % 4 + 4 * i, column + 8 * n + lane / 4), high[n][i], low[n][i]);
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t rows_high[4], rows_low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = at(a, s + lane % 4 + i / 2 * 4, row + 16 * m + i % 2 * 8 + lane / 4);
          split(value, rows_high[i], rows_low[i]);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          multiply_float(sums[m][n], rows_high, rows_low, high[n], low[n]);
        }
      }
    }
  }
}

template <class T, int chain, class Add>
__device__ void multiply_columns(const MatrixColumnsSide<T>& a, const MatrixColumnsSide<T>& b,
                                 int64_t depth, int unit, char* memory, Add add) {
  constexpr int kTile = kDeep * kPitch<T>;
  const int steps = static_cast<int>(ceil_div(depth, kDeep));
  TileSums<> sums = {};
  run_stages(
      steps, 2 * kTile, memory,
      [&](int step, char* stage) {
        start_column_copies(a, int64_t{step} * kDeep, unit, stage);
        start_column_copies(b, int64_t{step} * kDeep, unit, stage + kTile);
      },
      [&](int step, char* stage) {
        multiply_column_stage<T>(stage, stage + kTile, sums);
        end_chain(step, steps, chain / kDeep, sums, add);
      });
}

}  // namespace tracmod::cuda

// A 128 x 128 tile of a product of rows, C[m][n] = sum_d a[m][d] b[n][d], by one block of 256
// threads on the tensor cores. 8 warps own 64 x 32 each; 128 bytes of every row (64 bfloat16 or 32
// float32) are a stage, three stages pass through shared memory.
//
// Row r of a stage lies at 128 r; its 16-byte part p at place p ^ (r % 8), so that the eight rows of
// a matrix that load_matrices reads lie in different banks.
//
// An element's sum runs along d in an order that depends on the depth alone; float32 chains end
// after 256 steps and are handed on to `add`.
#pragma once

#include "cuda/mma.cuh"

namespace tracmod::cuda {

constexpr int kSide = 128;
constexpr int kProductThreads = 256;
constexpr int kRowBytes = 128;
constexpr int kPart = 16;
constexpr int kStages = 3;
constexpr int kStageBytes = 2 * kSide * kRowBytes;
constexpr int kProductBytes = kStages * kStageBytes;  // of dynamic shared memory
constexpr int64_t kChain = 256;

// This thread's elements of a tile: sums[m][n][i] belongs to (row, column).
using TileSums = float[4][4][4];

__device__ inline int tile_row_of(int m, int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  return warp / 4 * 64 + m * 16 + i / 2 * 8 + lane / 4;
}
__device__ inline int tile_column_of(int n, int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  return warp % 4 * 32 + n * 8 + lane % 4 * 2 + i % 2;
}

template <class Visit>
__device__ inline void for_tile(Visit visit) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(m, n, i);
    }
  }
}

// How many bytes can be copied at a time from rows of `width` values: 16, 4, or a value.
template <class T>
int copy_unit(int64_t width, std::initializer_list<const void*> rows) {
  uint64_t bits = static_cast<uint64_t>(width) * sizeof(T);
  for (const void* at : rows) bits |= reinterpret_cast<uintptr_t>(at);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : static_cast<int>(sizeof(T));
}

// Rows of a matrix; those from `count` on are zero.
template <class T>
struct MatrixSide {
  const T* first;
  int64_t stride, count;

  __device__ const T* base() const { return first; }
  __device__ const T* operator()(int row) const {
    return row < count ? first + row * stride : nullptr;
  }
};

__device__ inline char* part_of(char* tile, int row, int part) {
  return tile + row * kRowBytes + (part ^ (row % 8)) * kPart;
}

// Copies 16 bytes, of which the first `bytes` are there, in pieces of 4.
__device__ inline void copy_words_later(char* to, const char* from, int bytes) {
#pragma unroll
  for (int at = 0; at < kPart; at += 4) {
    copy_4_later(to + at, at < bytes ? from + at : from, at < bytes ? 4 : 0);
  }
}

// Starts copying a stage of one operand, values [begin, begin + 128 bytes) of every row, zeros past
// `depth`: this thread's part is 16 bytes of 4 rows.
template <class T, class Side>
__device__ inline void start_copies(const Side& side, int64_t begin, int64_t depth, int unit,
                                    char* to) {
  constexpr int kValues = kPart / static_cast<int>(sizeof(T));
  const int part = static_cast<int>(threadIdx.x) % 8;
  const int64_t d = begin + part * kValues;
  const int left = d >= depth ? 0 : depth - d < kValues ? static_cast<int>(depth - d) : kValues;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = static_cast<int>(threadIdx.x) / 8 + 32 * i;
    const T* values = side(row);
    const int count = values == nullptr ? 0 : left;
    const T* from = count > 0 ? values + d : side.base();
    char* place = part_of(to, row, part);
    if (unit == 16) {
      copy_16_later(place, from, count * static_cast<int>(sizeof(T)));
    } else if (unit == 4) {
      copy_words_later(place, reinterpret_cast<const char*>(from),
                       count * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll 1
      for (int v = 0; v < kValues; ++v) reinterpret_cast<T*>(place)[v] = v < count ? from[v] : T{};
    }
  }
}

// sums += the products of one stage.
template <class T>
__device__ inline void multiply_stage(char* a, char* b, TileSums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp / 4 * 64 + lane % 16;
  const int column = warp % 4 * 32 + lane / 16 * 8 + lane % 8;
#pragma unroll(sizeof(T) == 2 ? 4 : 1)  // float32's three products fill the registers as it is
  for (int part = 0; part < kRowBytes / kPart; part += 2) {
    uint32_t columns[4][2];
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t pair[4];
      load_matrices(pair, part_of(b, column + 8 * n, part + lane / 8 % 2));
      for (int i = 0; i < 4; ++i) columns[n + i / 2][i % 2] = pair[i];
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t rows[4];
        load_matrices(rows, part_of(a, row + 16 * m, part + lane / 16));
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_bf16(sums[m][n], rows, columns[n]);
      }
    } else {
      uint32_t high[4][2], low[4][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) split(columns[n], high[n], low[n]);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t rows[4], rows_high[4], rows_low[4];
        load_matrices(rows, part_of(a, row + 16 * m, part + lane / 16));
        split(rows, rows_high, rows_low);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          multiply_float(sums[m][n], rows_high, rows_low, high[n], low[n]);
        }
      }
    }
  }
}

// Hands the product to `add(sums)` in chains of at most 256 steps. Called by the whole block;
// afterwards `memory` (kProductBytes) is free.
template <class T, class A, class B, class Add>
__device__ void multiply_rows(const A& a, const B& b, int64_t depth, int unit, char* memory,
                              Add add) {
  constexpr int64_t kStep = kRowBytes / sizeof(T);
  const int64_t steps = ceil_div(depth, kStep);
  const auto start = [&](int64_t step) {
    if (step < steps) {
      char* stage = memory + step % kStages * kStageBytes;
      start_copies<T>(a, step * kStep, depth, unit, stage);
      start_copies<T>(b, step * kStep, depth, unit, stage + kSide * kRowBytes);
    }
    commit_copies();  // an empty group too, so that the count of groups is the count of steps
  };
  for (int64_t step = 0; step < kStages - 1; ++step) start(step);
  TileSums sums = {};
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // everyone's part of this stage is there; the stage before has been read
    start(step + kStages - 1);
    char* stage = memory + step % kStages * kStageBytes;
    multiply_stage<T>(stage, stage + kSide * kRowBytes, sums);
    if ((step + 1) * kStep % kChain == 0 || step + 1 == steps) {
      add(sums);
      for_tile([&](int m, int n, int i) { sums[m][n][i] = 0.0f; });
    }
  }
  wait_copies<0>();
  __syncthreads();
}

}  // namespace tracmod::cuda

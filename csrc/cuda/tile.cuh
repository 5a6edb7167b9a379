// A 64 x 64 tile of a product in plain float32,
//
//   C[m][n] = sum_d a(m, d) b(n, d),   m, n < 64,
//
// computed by one block of 256 threads without tensor cores. A thread owns 4 x 4 elements; the
// operands go through shared memory, 16 values of d at a time. The gradients of kind identity use
// it (project_gradients.cu).
//
// Bytes and operations: a thread reads 8 floats from shared memory for 16 multiply-adds, and a
// multiprocessor can start fewer reads than multiply-adds, so shared memory is the limit. Device
// memory is read once per tile.
//
// Operands are functions of (row, d) that return 0 outside of their bounds, so that a kernel only
// states where its values come from. Sums are float32 in blocks of 256 values of d, which are added
// up in float32; the order depends on the depth alone.
#pragma once

#include "cuda/common.cuh"

namespace tracmod::cuda {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kTileThreads = 256;
constexpr int kPerThread = 4;

// The extra column puts the elements of a column into different banks of shared memory.
struct TileMemory {
  float a[kDepth][kTile + 1];
  float b[kDepth][kTile + 1];
};

// Row and column, in the tile, of this thread's element (i, j), i and j below 4. Neighbouring
// threads own neighbouring columns.
__device__ inline int tile_row(int i) { return static_cast<int>(threadIdx.x) / 16 + 16 * i; }
__device__ inline int tile_column(int j) { return static_cast<int>(threadIdx.x) % 16 + 16 * j; }

// Copies 64 rows x 16 values of d of an operand to shared memory. Neighbouring threads read
// neighbouring addresses, which for some operands lie along d and for others along the rows.
template <class Operand>
__device__ void load_tile(const Operand& operand, int64_t begin, int64_t depth,
                          float (&to)[kDepth][kTile + 1]) {
  for (int at = static_cast<int>(threadIdx.x); at < kDepth * kTile; at += kTileThreads) {
    const int d = Operand::kAlongDepth ? at % kDepth : at / kTile;
    const int row = Operand::kAlongDepth ? at / kDepth : at % kTile;
    to[d][row] = begin + d < depth ? operand(row, begin + d) : 0.0f;
  }
}

// total = this thread's elements of the tile.
template <class A, class B>
__device__ void multiply_tile(const A& a, const B& b, int64_t depth, TileMemory& memory,
                              float (&total)[kPerThread][kPerThread]) {
  constexpr int64_t kSteps = 256;
  for (int i = 0; i < kPerThread; ++i) {
    for (int j = 0; j < kPerThread; ++j) total[i][j] = 0.0f;
  }
  for (int64_t block = 0; block < depth; block += kSteps) {
    float sum[kPerThread][kPerThread] = {};
    for (int64_t begin = block; begin < block + kSteps && begin < depth; begin += kDepth) {
      __syncthreads();  // all threads have read the values of the previous step
      load_tile(a, begin, depth, memory.a);
      load_tile(b, begin, depth, memory.b);
      __syncthreads();
      for (int d = 0; d < kDepth; ++d) {
        float row[kPerThread], column[kPerThread];
        for (int i = 0; i < kPerThread; ++i) row[i] = memory.a[d][tile_row(i)];
        for (int j = 0; j < kPerThread; ++j) column[j] = memory.b[d][tile_column(j)];
        for (int i = 0; i < kPerThread; ++i) {
          for (int j = 0; j < kPerThread; ++j) sum[i][j] += row[i] * column[j];
        }
      }
    }
    for (int i = 0; i < kPerThread; ++i) {
      for (int j = 0; j < kPerThread; ++j) total[i][j] += sum[i][j];
    }
  }
}

// An operand made of columns of a row-major matrix with `width` values per row, from column `first`
// on: element (row, d) is matrix[d][first + row]. If count > width, column `width` is a column of
// ones, the input of a bias.
template <class T>
struct MatrixColumns {
  static constexpr bool kAlongDepth = false;
  const T* matrix;
  int64_t width, first, count;

  __device__ float operator()(int64_t row, int64_t d) const {
    const int64_t column = first + row;
    if (column < width) return to_float(matrix[d * width + column]);
    return column < count ? 1.0f : 0.0f;
  }
};

}  // namespace tracmod::cuda

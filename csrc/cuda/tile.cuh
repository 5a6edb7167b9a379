// A 64 x 64 tile of a product, C[m][n] = sum_d a(m, d) b(n, d), by one block of 256 threads: each
// thread owns 4 x 4 elements, the operands pass through shared memory 16 steps of d at a time.
//
// Operands are functions of (row, d), so that a kernel says what it reads (memory, a projection's
// entries, a column of ones) and nothing else; they return 0 outside their bounds. Float32 sums of
// 256 steps, added up in float32: the order depends on the depth alone.
#pragma once

#include "cuda/common.cuh"

namespace tracmod::cuda {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kTileThreads = 256;
constexpr int kPerThread = 4;

struct TileMemory {
  float a[kDepth][kTile + 1];
  float b[kDepth][kTile + 1];
};

// The element of a tile that this thread owns at (i, j), both below 4.
__device__ inline int tile_row(int i) { return static_cast<int>(threadIdx.x) / 16 + 16 * i; }
__device__ inline int tile_column(int j) { return static_cast<int>(threadIdx.x) % 16 + 16 * j; }

// Neighbouring threads read neighbouring addresses: along d, or along rows.
template <class Operand>
__device__ void load_tile(const Operand& operand, int64_t begin, int64_t depth,
                          float (&to)[kDepth][kTile + 1]) {
  for (int at = static_cast<int>(threadIdx.x); at < kDepth * kTile; at += kTileThreads) {
    const int d = Operand::kAlongDepth ? at % kDepth : at / kTile;
    const int row = Operand::kAlongDepth ? at / kDepth : at % kTile;
    to[d][row] = begin + d < depth ? operand(row, begin + d) : 0.0f;
  }
}

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
      __syncthreads();  // the tiles of the step before have been read
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

// Columns of a row-major matrix with `width` values a row: element (row, d) is matrix[d][row]. The
// column at `width` itself is one (a bias's input) where count > width.
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

// The two register-blocked products that all CPU ops are made of, for the instruction set that the
// processor has: chosen at run time, never at build time.
#pragma once

#include <cstdint>

#include "cpu/bfloat16.h"

namespace tracmod::cpu {

// Columns of `outer`'s b are padded to a multiple of this.
constexpr int64_t kColumnUnit = 16;

inline int64_t padded(int64_t columns) {
  return (columns + kColumnUnit - 1) / kColumnUnit * kColumnUnit;
}

// Every element of a result is summed in an order that its own depth alone decides: float32 blocks,
// float64 across blocks. Where in a tile it lies, and with which neighbours, changes nothing.
struct Tiles {
  const char* name;

  // c[m * ldc + n] += sum_d a[m][d * a_step] * b[d * ldb + n], n < columns (a multiple of 16)
  void (*outer)(const float* const* a, int64_t a_step, int64_t rows, const float* b, int64_t ldb,
                int64_t columns, int64_t depth, double* c, int64_t ldc);

  // c[m * ldc + n] += sum_d a[m][d] * b[n][d]
  void (*dot)(const float* const* a, int64_t rows, const float* const* b, int64_t columns,
              int64_t depth, double* c, int64_t ldc);
  void (*dot_bfloat16)(const bfloat16* const* a, int64_t rows, const bfloat16* const* b,
                       int64_t columns, int64_t depth, double* c, int64_t ldc);
};

const Tiles& tiles();

inline void dot(const float* const* a, int64_t rows, const float* const* b, int64_t columns,
                int64_t depth, double* c, int64_t ldc) {
  tiles().dot(a, rows, b, columns, depth, c, ldc);
}
inline void dot(const bfloat16* const* a, int64_t rows, const bfloat16* const* b, int64_t columns,
                int64_t depth, double* c, int64_t ldc) {
  tiles().dot_bfloat16(a, rows, b, columns, depth, c, ldc);
}

}  // namespace tracmod::cpu

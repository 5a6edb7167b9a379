// The register-blocked products that all CPU ops are made of, for the instruction set that the
// processor has: chosen at run time, never at build time.
//
// A panel is up to 64 rows of numbers turned for `outer`: (steps of depth, padded rows), 32 bits
// each. A step is one float32; or one pair of bfloat16, where the processor multiplies pairs (`pair`
// is 2); elsewhere bfloat16 are widened to float32 as they are packed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/bfloat16.h"

namespace tracmod::cpu {

// Columns of `outer`'s b are padded to a multiple of this.
constexpr int64_t kColumnUnit = 16;

// Columns of a panel, and the steps of one block of float32 sums.
constexpr int64_t kPanel = 64;
constexpr int64_t kBlockSteps = 256;

inline int64_t padded(int64_t columns) {
  return (columns + kColumnUnit - 1) / kColumnUnit * kColumnUnit;
}

// Every element of a result is summed in an order that its own depth alone decides: float32 blocks
// (256 steps; `inner` and `dot`: 64 vectors), float64 across blocks. Where in a tile it lies, and
// with which neighbours, changes nothing.
struct Tiles {
  const char* name;
  int64_t pair;  // bfloat16 numbers in a step

  // c[m * ldc + n] += sum_d a[m][d * a_step] * b[d * ldb + n], n < columns (a multiple of 16)
  void (*outer)(const float* const* a, int64_t a_step, int64_t rows, const float* b, int64_t ldb,
                int64_t columns, int64_t depth, double* c, int64_t ldc);

  // The same for rows of bfloat16 and a panel of them; `depth` counts numbers.
  void (*outer_bfloat16)(const bfloat16* const* a, int64_t rows, const float* panel,
                         int64_t columns, int64_t depth, double* c, int64_t ldc);

  // panel[s * padded(count) + n] = step s of rows[n]: a missing row is zeros, and so is the second
  // half of a pair of which there is but one.
  void (*pack)(const float* const* rows, int64_t count, int64_t depth, float* panel);
  void (*pack_bfloat16)(const bfloat16* const* rows, int64_t count, int64_t depth, float* panel);

  // to[s * width + n] = step s of from[., n], n < count, from (tokens, size): a token or, in pairs,
  // two tokens, of which the last may be missing
  void (*pack_tokens)(const bfloat16* from, int64_t tokens, int64_t size, int64_t count,
                      int64_t width, float* to);

  // c[m * ldc + n] = sum_s a[s * a_step + m] * panel[s * kPanel + n], in steps of float32 or (form_
  // pairs) of packed bfloat16
  void (*form)(const float* a, int64_t a_step, int64_t rows, const float* panel, int64_t columns,
               int64_t steps, float* c, int64_t ldc);
  void (*form_pairs)(const float* a, int64_t a_step, int64_t rows, const float* panel,
                     int64_t columns, int64_t steps, float* c, int64_t ldc);

  // c[m * ldc + n] += sum_d a[m][d] * b[n][d]
  void (*inner)(const float* const* a, int64_t rows, const float* const* b, int64_t columns,
                int64_t depth, double* c, int64_t ldc);
  void (*inner_bfloat16)(const bfloat16* const* a, int64_t rows, const bfloat16* const* b,
                         int64_t columns, int64_t depth, double* c, int64_t ldc);

  // sum_d a[d] * b[d]
  double (*dot)(const float* a, const float* b, int64_t depth);
  double (*dot_bfloat16)(const bfloat16* a, const bfloat16* b, int64_t depth);

  // c[n] += sum_s panel[s * columns + n]^2
  void (*squares)(const float* panel, int64_t columns, int64_t steps, double* c);
  void (*squares_pairs)(const float* panel, int64_t columns, int64_t steps, double* c);

  // c[n] += factor * a[n] * (b[n] + shift), n < count (a multiple of 16)
  void (*add_products)(int64_t count, double factor, const double* a, const double* b, double shift,
                       double* c);
};

const Tiles& tiles();

// The same by the type of number.
template <class T>
int64_t numbers_per_step() {
  return std::is_same_v<T, bfloat16> ? tiles().pair : 1;
}

// Steps that hold this many numbers.
template <class T>
int64_t steps_of(int64_t numbers) {
  return (numbers + numbers_per_step<T>() - 1) / numbers_per_step<T>();
}

inline void pack(const float* const* rows, int64_t count, int64_t depth, float* panel) {
  tiles().pack(rows, count, depth, panel);
}
inline void pack(const bfloat16* const* rows, int64_t count, int64_t depth, float* panel) {
  tiles().pack_bfloat16(rows, count, depth, panel);
}

inline void outer(const float* const* a, int64_t rows, const float* panel, int64_t columns,
                  int64_t depth, double* c, int64_t ldc) {
  tiles().outer(a, 1, rows, panel, columns, columns, depth, c, ldc);
}
inline void outer(const bfloat16* const* a, int64_t rows, const float* panel, int64_t columns,
                  int64_t depth, double* c, int64_t ldc) {
  tiles().outer_bfloat16(a, rows, panel, columns, depth, c, ldc);
}

template <class T>
void form(const float* a, int64_t a_step, int64_t rows, const float* panel, int64_t columns,
          int64_t steps, float* c, int64_t ldc) {
  const auto op = std::is_same_v<T, bfloat16> ? tiles().form_pairs : tiles().form;
  op(a, a_step, rows, panel, columns, steps, c, ldc);
}

template <class T>
void sum_squares(const float* panel, int64_t columns, int64_t steps, double* c) {
  const auto op = std::is_same_v<T, bfloat16> ? tiles().squares_pairs : tiles().squares;
  op(panel, columns, steps, c);
}

inline void inner(const float* const* a, int64_t rows, const float* const* b, int64_t columns,
                  int64_t depth, double* c, int64_t ldc) {
  tiles().inner(a, rows, b, columns, depth, c, ldc);
}
inline void inner(const bfloat16* const* a, int64_t rows, const bfloat16* const* b, int64_t columns,
                  int64_t depth, double* c, int64_t ldc) {
  tiles().inner_bfloat16(a, rows, b, columns, depth, c, ldc);
}

inline double dot(const float* a, const float* b, int64_t depth) {
  return tiles().dot(a, b, depth);
}
inline double dot(const bfloat16* a, const bfloat16* b, int64_t depth) {
  return tiles().dot_bfloat16(a, b, depth);
}

}  // namespace tracmod::cpu

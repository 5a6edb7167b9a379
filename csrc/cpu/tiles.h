// The register-blocked products that all CPU ops are made of, for the best instruction set that the
// processor has. It is chosen at run time, so one build runs everywhere.
//
// Vocabulary:
//   depth  the dimension that a product sums over
//   step   32 bits of depth: one float32, or a pair of neighbouring bfloat16 where the processor
//          has instructions that multiply pairs (`pair` is 2). Elsewhere `pair` is 1 and bfloat16
//          numbers are widened to float32 when they are packed.
//   panel  up to 64 rows, transposed for `outer`: (steps of depth, rows padded to a multiple of
//          16). All rows' numbers of one step lie side by side, so that they load as vectors.
//   tile   the part of a result whose sums are kept in registers at one time
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/bfloat16.h"

namespace tracmod::cpu {

// Columns of `outer`'s b are padded to a multiple of this.
constexpr int64_t kColumnUnit = 16;

constexpr int64_t kPanel = 64;        // rows of a panel, which are columns of the result
constexpr int64_t kBlockSteps = 256;  // steps that are summed in float32 before float64 takes over

inline int64_t padded(int64_t columns) {
  return (columns + kColumnUnit - 1) / kColumnUnit * kColumnUnit;
}

// Sums are float32 within blocks of depth (256 steps; 64 vectors in `inner` and `dot`) and float64
// across blocks, which bounds the rounding error of long sums. The order of a sum depends on its
// depth alone: where in a tile an element lies, and which neighbours it has, does not change a bit.
struct Tiles {
  const char* name;
  int64_t pair;  // bfloat16 numbers per step

  // c[m * ldc + n] += sum_d a[m][d * a_step] * b[d * ldb + n] for n < columns, a multiple of 16
  void (*outer)(const float* const* a, int64_t a_step, int64_t rows, const float* b, int64_t ldb,
                int64_t columns, int64_t depth, double* c, int64_t ldc);

  // The same for rows of bfloat16 and a panel packed from bfloat16; `depth` counts numbers, not
  // steps.
  void (*outer_bfloat16)(const bfloat16* const* a, int64_t rows, const float* panel,
                         int64_t columns, int64_t depth, double* c, int64_t ldc);

  // panel[s * padded(count) + n] = step s of rows[n]. Rows that pad the panel are zeros, and so is
  // the second number of a pair if depth is odd.
  void (*pack)(const float* const* rows, int64_t count, int64_t depth, float* panel);
  void (*pack_bfloat16)(const bfloat16* const* rows, int64_t count, int64_t depth, float* panel);

  // to[s * width + n] = step s of column n < count of from (tokens, size). Here the depth is the
  // tokens: a step is one token or, in pairs, two, of which the second may be missing at the end.
  void (*pack_tokens)(const bfloat16* from, int64_t tokens, int64_t size, int64_t count,
                      int64_t width, float* to);

  // c[m * ldc + n] = sum_s a[s * a_step + m] * panel[s * kPanel + n] over steps of float32 or, for
  // form_pairs, of packed bfloat16. Overwrites c.
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

  // c[n] += factor * a[n] * (b[n] + shift) for n < count, a multiple of 16
  void (*add_products)(int64_t count, double factor, const double* a, const double* b, double shift,
                       double* c);
};

// The functions for this processor, or for the instruction set that the environment variable
// TRACMOD_INSTRUCTIONS names.
const Tiles& tiles();

// The same functions, chosen by the type of number.
template <class T>
int64_t numbers_per_step() {
  return std::is_same_v<T, bfloat16> ? tiles().pair : 1;
}

// Number of steps that hold this many numbers.
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

// The inner loops of a projection, for the instruction set that the processor has (chosen with
// `tiles()`): rows times dense signs, rows times sparse signs, the product of the two sides, and
// LayerNorm's sums.
#pragma once

#include <cstdint>

#include "cpu/bfloat16.h"
#include "random.h"

namespace tracmod::cpu {

constexpr int64_t kTableColumns = 4;    // columns of one table of sums
constexpr int64_t kDenseColumns = 256;  // columns that are summed in one go
constexpr int64_t kBlockRows = 64;      // rows of R that are made in one go
constexpr int64_t kSparseTokens = 16;   // tokens that pass together over the groups of a sparse R

// Sixteen neighbouring columns of a sparse R and where they go: rows position ... position + 15.
struct SparseGroup {
  uint32_t flip[kSparseGroup];  // the sign bit where the sign is -1
  int32_t column, position;
};

struct Signs {
  // Indices of the tables of columns [begin, end), begin a multiple of 4, of R's rows [row, row +
  // 64), R having `width` rows: 16 rows at a time, `numbers` as Output::columns. Null, and the next
  // two: this instruction set multiplies dense signs as numbers.
  void (*write_indices)(uint64_t stream, const int64_t* numbers, int64_t begin, int64_t end,
                        int64_t row, int64_t width, int32_t* indices);

  // sums[m * ld + r] += sum_i [a[m], 1][i] R[r][i] over `columns` of a and `ones` more, at most
  // kDenseColumns together, and 16 * vectors rows.
  void (*add_dense)(const float* const* a, int64_t rows, int64_t columns, int64_t ones,
                    const int32_t* indices, int64_t vectors, float* sums, int64_t ld);
  void (*add_dense_bfloat16)(const bfloat16* const* a, int64_t rows, int64_t columns, int64_t ones,
                             const int32_t* indices, int64_t vectors, float* sums, int64_t ld);

  // sums[m * ld + position + l] += +-a[m][column + l], l < 16, of every group. `next`: the rows that
  // come after these.
  void (*add_sparse)(const float* const* a, const float* const* next, int64_t rows,
                     const SparseGroup* groups, int64_t count, float* sums, int64_t ld);
  void (*add_sparse_bfloat16)(const bfloat16* const* a, const bfloat16* const* next, int64_t rows,
                              const SparseGroup* groups, int64_t count, float* sums, int64_t ld);

  // weight[d] += sum_s g[s, d] x[s, d] and shift[d] += sum_s g[s, d]; x and g (tokens, size).
  void (*add_elementwise)(const float* x, const float* g, int64_t tokens, int64_t size,
                          float* weight, float* shift);
  void (*add_elementwise_bfloat16)(const bfloat16* x, const bfloat16* g, int64_t tokens,
                                   int64_t size, float* weight, float* shift);

  // out[m * ldo + n] += scale * sum_s q[s * ldq + m] p[s * ldp + n]; p is readable up to the next
  // multiple of 16 columns.
  void (*add_product)(const float* q, int64_t ldq, int64_t rows, const float* p, int64_t ldp,
                      int64_t columns, int64_t tokens, float scale, float* out, int64_t ldo);
};

const Signs& signs();

inline void add_dense(const float* const* a, int64_t rows, int64_t columns, int64_t ones,
                      const int32_t* indices, int64_t vectors, float* sums, int64_t ld) {
  signs().add_dense(a, rows, columns, ones, indices, vectors, sums, ld);
}
inline void add_dense(const bfloat16* const* a, int64_t rows, int64_t columns, int64_t ones,
                      const int32_t* indices, int64_t vectors, float* sums, int64_t ld) {
  signs().add_dense_bfloat16(a, rows, columns, ones, indices, vectors, sums, ld);
}

inline void add_sparse(const float* const* a, const float* const* next, int64_t rows,
                       const SparseGroup* groups, int64_t count, float* sums, int64_t ld) {
  signs().add_sparse(a, next, rows, groups, count, sums, ld);
}
inline void add_sparse(const bfloat16* const* a, const bfloat16* const* next, int64_t rows,
                       const SparseGroup* groups, int64_t count, float* sums, int64_t ld) {
  signs().add_sparse_bfloat16(a, next, rows, groups, count, sums, ld);
}

inline void add_elementwise(const float* x, const float* g, int64_t tokens, int64_t size,
                            float* weight, float* shift) {
  signs().add_elementwise(x, g, tokens, size, weight, shift);
}
inline void add_elementwise(const bfloat16* x, const bfloat16* g, int64_t tokens, int64_t size,
                            float* weight, float* shift) {
  signs().add_elementwise_bfloat16(x, g, tokens, size, weight, shift);
}

}  // namespace tracmod::cpu

// The inner loops of project_gradients, compiled for several instruction sets and chosen at run
// time together with `tiles()`: rows times dense signs, rows times sparse signs, the product of the
// two projected sides, and the sums of LayerNorm's gradient.
#pragma once

#include <cstdint>

#include "cpu/bfloat16.h"
#include "random.h"

namespace tracmod::cpu {

constexpr int64_t kTableColumns = 4;    // columns of R that share one table of sums
constexpr int64_t kDenseColumns = 256;  // columns that are added up in registers
constexpr int64_t kBlockRows = 64;      // rows of R that are computed together: one hash's signs
constexpr int64_t kSparseTokens = 16;   // tokens that go through the groups of a sparse R together

// Sixteen neighbouring columns of a sparse R. They start at `column` of the input, and column l of
// them is added to row position + l, after its sign bit is flipped by flip[l].
struct SparseGroup {
  uint32_t flip[kSparseGroup];  // 0x80000000 where the sign is -1, else 0
  int32_t column, position;
};

// Sixteen neighbouring columns of a formed sketch: they start at `column` of the input, and `number`
// is that of their hash in its row.
struct SketchGroup {
  int32_t column, number;
};

struct Signs {
  // Writes the table indices (signs.cpp) of columns [begin, end) and rows [row, row + 64) of R,
  // which has `width` rows: for each four columns 16 indices for every 16 rows. begin is a multiple
  // of 4; `numbers` are the column numbers as in Output::columns. This pointer and the next two are
  // null for instruction sets that multiply dense signs as numbers instead.
  void (*write_indices)(uint64_t stream, const int64_t* numbers, int64_t begin, int64_t end,
                        int64_t row, int64_t width, int32_t* indices);

  // sums[m * ld + r] += sum_i [a[m], 1][i] R[r][i] for r < 16 * vectors, over `columns` columns of
  // a and `ones` ones, at most kDenseColumns in total.
  void (*add_dense)(const float* const* a, int64_t rows, int64_t columns, int64_t ones,
                    const int32_t* indices, int64_t vectors, float* sums, int64_t ld);
  void (*add_dense_bfloat16)(const bfloat16* const* a, int64_t rows, int64_t columns, int64_t ones,
                             const int32_t* indices, int64_t vectors, float* sums, int64_t ld);

  // sums[m * ld + position + l] += +-a[m][column + l] for l < 16 and every group. `next` points at
  // the rows of the following call, which are prefetched.
  void (*add_sparse)(const float* const* a, const float* const* next, int64_t rows,
                     const SparseGroup* groups, int64_t count, float* sums, int64_t ld);
  void (*add_sparse_bfloat16)(const bfloat16* const* a, const bfloat16* const* next, int64_t rows,
                              const SparseGroup* groups, int64_t count, float* sums, int64_t ld);

  // sums[bucket + l] += +-scale * values[column + l] for l < 16 and every group; bucket and sign are
  // those of buckets[number], as sketch_buckets writes them.
  void (*add_sketch)(const float* values, const SketchGroup* groups, int64_t count,
                     const uint32_t* buckets, float scale, float* sums);

  // weight[d] += sum_s g[s, d] x[s, d] and shift[d] += sum_s g[s, d] for x and g (tokens, size).
  void (*add_elementwise)(const float* x, const float* g, int64_t tokens, int64_t size,
                          float* weight, float* shift);
  void (*add_elementwise_bfloat16)(const bfloat16* x, const bfloat16* g, int64_t tokens,
                                   int64_t size, float* weight, float* shift);

  // out[m * ldo + n] += scale * sum_s q[s * ldq + m] p[s * ldp + n]. Rows of p must be readable up
  // to the next multiple of 16 columns, because whole vectors are loaded.
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

// The inner loops of project_gradients (declared in signs.h). Each call works on one item of the
// calling thread; project_gradients.cpp says which.
//
//   add_dense    sums (rows, 64) += a (rows, 256) R^T (256, 64) for random signs R, with AVX-512.
//
//                A row a times four columns of signs has only 16 possible results, +-a0 +-a1 +-a2
//                +-a3. They fill one register: the table. The contributions of four columns to 16
//                rows of R are then one permutation of the table by 16 indices (bit j of an index
//                is the sign of the row in column j) and one addition. For 64 rows of R and four
//                columns this takes 4 multiply-adds for the table (bfloat16: 2 products of pairs),
//                4 permutations and 4 additions, instead of 16 multiply-adds (8 products of pairs).
//                Permutations run on another unit than multiply-adds, so the limit is the number of
//                instructions that start per cycle: bfloat16 pairs take 3.4 cycles where products
//                alone would take 4.
//
//                Rounding: at most 64 additions follow each other in a register, then one per 256
//                columns in memory.
//
//   add_sparse   16 neighbouring columns go to 16 neighbouring rows: one load, one flip of sign
//                bits and one addition in place. Two groups may go to the same rows; therefore 16
//                tokens take turns, so that an addition does not have to wait for the preceding one
//                to reach the cache. The read of a is the limit.
//
//   add_sketch   as add_sparse, but the sign is that of the group and is multiplied with the scale
//
//   add_product  out (rows, columns) += scale * q^T p over the tokens of one example: tiles of 6
//                rows x V vectors in registers, as `outer` in tiles.cpp, but added directly to the
//                feature row, in float32 blocks of 256 tokens.
//
//   add_elementwise  the sums of LayerNorm's gradient; one read of x and g is the limit.
//
// The order in which an element is summed depends on nothing but its own depth, so results do not
// change with the batch around an example or the number of threads.
#include "cpu/signs.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/tiles.h"
#include "cpu/vector.h"
#include "random.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tracmod::cpu {
namespace {

constexpr int64_t kProductDepth = 256;
constexpr int kProductRows = 6;
constexpr int64_t kSparseAhead = 8;  // groups between the prefetch of values and their use

// The read of `a` is the limit and jumps between 16 rows, so it starts early: the values of the
// group kSparseAhead later are prefetched, and near the end the first groups of the next rows.
template <int W, class T>
TRACMOD_INLINE void sparse(const T* const* a, const T* const* next, int64_t rows,
                           const SparseGroup* groups, int64_t count, float* sums, int64_t ld) {
  using Type = typename Vector<W>::Type;
  const int64_t ahead = std::min(kSparseAhead, count);
  for (int64_t g = 0; g < count; ++g) {
    const SparseGroup& group = groups[g];
    const bool wraps = g + ahead >= count;
    const T* const* later_rows = wraps ? next : a;
    const int64_t later_column = groups[wraps ? g + ahead - count : g + ahead].column;
    typename Vector<W>::Bits flip[16 / W];
    std::memcpy(flip, group.flip, sizeof group.flip);
    for (int64_t m = 0; m < rows; ++m) {
      __builtin_prefetch(later_rows[m] + later_column);
      for (int v = 0; v < 16 / W; ++v) {
        float* to = sums + m * ld + group.position + v * W;
        *reinterpret_cast<typename Vector<W>::Loose*>(to) +=
            (Type)(load_bits<W>(a[m] + group.column + v * W) ^ flip[v]);
      }
    }
  }
}

template <int W>
TRACMOD_INLINE void sketch(const float* values, const SketchGroup* groups, int64_t count,
                           const uint32_t* buckets, float scale, float* sums) {
  const float scales[2] = {scale, -scale};  // a branch on a random sign would be mispredicted
  for (int64_t g = 0; g < count; ++g) {
    const uint32_t bucket = buckets[groups[g].number];
    const float* from = values + groups[g].column;
    float* to = sums + (bucket >> 1);
    for (int v = 0; v < 16; v += W) {
      *reinterpret_cast<typename Vector<W>::Loose*>(to + v) += scales[bucket & 1] * load<W>(from + v);
    }
  }
}

// weight and shift += the sums over M tokens.
template <int M, class T>
TRACMOD_INLINE void elementwise_rows(const T* x, const T* g, int64_t size, float* __restrict weight,
                                     float* __restrict shift) {
  for (int64_t d = 0; d < size; ++d) {
    float product = 0.0f, sum = 0.0f;
    for (int m = 0; m < M; ++m) {
      const float value = to_float(g[m * size + d]);
      product += value * to_float(x[m * size + d]);
      sum += value;
    }
    weight[d] += product;
    shift[d] += sum;
  }
}

// Four tokens at a time, so that the sums are read and written once for four tokens.
template <class T>
TRACMOD_INLINE void elementwise(const T* x, const T* g, int64_t tokens, int64_t size, float* weight,
                                float* shift) {
  int64_t s = 0;
  for (; s + 4 <= tokens; s += 4) {
    elementwise_rows<4>(x + s * size, g + s * size, size, weight, shift);
  }
  for (; s < tokens; ++s) elementwise_rows<1>(x + s * size, g + s * size, size, weight, shift);
}

// M rows x V vectors of columns of out += scale * q^T p. The last vector may be cut off by
// `columns`.
template <int W, int M, int V>
TRACMOD_INLINE void product_tile(const float* q, int64_t ldq, const float* p, int64_t ldp,
                                 int64_t columns, int64_t tokens, float scale, float* out,
                                 int64_t ldo) {
  typename Vector<W>::Type sum[M][V] = {};
  for (int64_t s = 0; s < tokens; ++s) {
    typename Vector<W>::Type row[V];
    for (int v = 0; v < V; ++v) {
      row[v] = *reinterpret_cast<const typename Vector<W>::Loose*>(p + s * ldp + v * W);
    }
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) sum[m][v] += q[s * ldq + m] * row[v];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      float* to = out + m * ldo + v * W;
      const int64_t left = columns - v * W;
      if (left >= W) {
        *reinterpret_cast<typename Vector<W>::Loose*>(to) += scale * sum[m][v];
      } else {
        float lanes[W];
        std::memcpy(lanes, &sum[m][v], sizeof lanes);
        for (int64_t n = 0; n < left; ++n) to[n] += scale * lanes[n];
      }
    }
  }
}

// Makes the number of vectors a constant, so that the sums of a tile are registers.
template <int W, int M>
TRACMOD_INLINE void product_columns(int64_t vectors, const float* q, int64_t ldq, const float* p,
                                    int64_t ldp, int64_t columns, int64_t tokens, float scale,
                                    float* out, int64_t ldo) {
  switch (vectors) {
    case 1:
      return product_tile<W, M, 1>(q, ldq, p, ldp, columns, tokens, scale, out, ldo);
    case 2:
      return product_tile<W, M, 2>(q, ldq, p, ldp, columns, tokens, scale, out, ldo);
    case 3:
      return product_tile<W, M, 3>(q, ldq, p, ldp, columns, tokens, scale, out, ldo);
    default:
      return product_tile<W, M, 4>(q, ldq, p, ldp, columns, tokens, scale, out, ldo);
  }
}

// A tile has at most V vectors of columns, and 6 rows or 1.
template <int W, int V>
TRACMOD_INLINE void product(const float* q, int64_t ldq, int64_t rows, const float* p, int64_t ldp,
                            int64_t columns, int64_t tokens, float scale, float* out, int64_t ldo) {
  for (int64_t s = 0; s < tokens; s += kProductDepth) {
    const int64_t depth = std::min(kProductDepth, tokens - s);
    for (int64_t n = 0; n < columns; n += V * W) {
      const int64_t vectors = std::min<int64_t>(V, (columns - n + W - 1) / W);
      const float* right = p + s * ldp + n;
      for (int64_t m = 0; m < rows;) {
        const bool full = rows - m >= kProductRows;
        const float* left = q + s * ldq + m;
        float* to = out + m * ldo + n;
        if (full) {
          product_columns<W, kProductRows>(vectors, left, ldq, right, ldp, columns - n, depth,
                                           scale, to, ldo);
        } else {
          product_columns<W, 1>(vectors, left, ldq, right, ldp, columns - n, depth, scale, to, ldo);
        }
        m += full ? kProductRows : 1;
      }
    }
  }
}

#define TRACMOD_SIGNS(NAME, TARGET, W, V)                                                          \
  TARGET void add_sparse_##NAME(const float* const* a, const float* const* next, int64_t rows,     \
                                const SparseGroup* groups, int64_t count, float* sums,             \
                                int64_t ld) {                                                      \
    sparse<W>(a, next, rows, groups, count, sums, ld);                                             \
  }                                                                                                \
  TARGET void add_sparse_bfloat16_##NAME(const bfloat16* const* a, const bfloat16* const* next,    \
                                         int64_t rows, const SparseGroup* groups, int64_t count,   \
                                         float* sums, int64_t ld) {                                \
    sparse<W>(a, next, rows, groups, count, sums, ld);                                             \
  }                                                                                                \
  TARGET void add_sketch_##NAME(const float* values, const SketchGroup* groups, int64_t count,      \
                                const uint32_t* buckets, float scale, float* sums) {               \
    sketch<W>(values, groups, count, buckets, scale, sums);                                        \
  }                                                                                                \
  TARGET void add_elementwise_##NAME(const float* x, const float* g, int64_t tokens, int64_t size, \
                                     float* weight, float* shift) {                                \
    elementwise(x, g, tokens, size, weight, shift);                                                \
  }                                                                                                \
  TARGET void add_elementwise_bfloat16_##NAME(const bfloat16* x, const bfloat16* g,                \
                                              int64_t tokens, int64_t size, float* weight,         \
                                              float* shift) {                                      \
    elementwise(x, g, tokens, size, weight, shift);                                                \
  }                                                                                                \
  TARGET void add_product_##NAME(const float* q, int64_t ldq, int64_t rows, const float* p,        \
                                 int64_t ldp, int64_t columns, int64_t tokens, float scale,        \
                                 float* out, int64_t ldo) {                                        \
    product<W, V>(q, ldq, rows, p, ldp, columns, tokens, scale, out, ldo);                         \
  }

TRACMOD_SIGNS(baseline, , 4, 2)
constexpr Signs k_baseline = {nullptr,
                              nullptr,
                              nullptr,
                              add_sparse_baseline,
                              add_sparse_bfloat16_baseline,
                              add_sketch_baseline,
                              add_elementwise_baseline,
                              add_elementwise_bfloat16_baseline,
                              add_product_baseline};

#if defined(__x86_64__)
#define TRACMOD_AVX2 __attribute__((target("avx2,fma")))
#define TRACMOD_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

TRACMOD_SIGNS(avx2, TRACMOD_AVX2, 8, 2)
constexpr Signs k_avx2 = {nullptr,
                          nullptr,
                          nullptr,
                          add_sparse_avx2,
                          add_sparse_bfloat16_avx2,
                          add_sketch_avx2,
                          add_elementwise_avx2,
                          add_elementwise_bfloat16_avx2,
                          add_product_avx2};

TRACMOD_SIGNS(avx512, TRACMOD_AVX512, 16, 4)

TRACMOD_AVX512 void write_indices(uint64_t stream, const int64_t* numbers, int64_t begin,
                                  int64_t end, int64_t row, int64_t width, int32_t* indices) {
  constexpr int64_t kColumns = 64;
  uint64_t words[kColumns];
  for (int64_t i = begin; i < end; i += kColumns) {
    const int64_t count = std::min(kColumns, end - i);
    for (int64_t c = 0; c < count; ++c) {
      words[c] = sign_word(stream, numbers == nullptr ? i + c : numbers[i + c], row / kBlockRows);
    }
    for (int64_t c = count; c % kTableColumns != 0; ++c) words[c] = 0;
    for (int64_t c = 0; c < count; c += kTableColumns) {
      for (int64_t r = 0; r < std::min(kBlockRows, width - row); r += 16, indices += 16) {
        __m512i index = _mm512_setzero_si512();
        for (int64_t j = 0; j < kTableColumns; ++j) {
          const auto rows = static_cast<__mmask16>(words[c + j] >> r);
          index = _mm512_mask_or_epi32(index, rows, index, _mm512_set1_epi32(1 << j));
        }
        _mm512_storeu_si512(indices, index);
      }
    }
  }
}

// The lanes (0 to 15) whose number has this bit set: the entries of a table in which column `bit`
// has sign -1.
TRACMOD_AVX512 TRACMOD_INLINE __mmask16 lanes_with(int bit) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_test_epi32_mask(lane, _mm512_set1_epi32(1 << bit));
}

// Computes the table of four columns of a row: lane i is the sum of +-x[j], where bit j of i set
// means minus.
struct FloatTable {
  using Number = float;
  __m512 signs[kTableColumns];

  TRACMOD_AVX512 TRACMOD_INLINE FloatTable() {
    for (int j = 0; j < kTableColumns; ++j) {
      signs[j] = _mm512_mask_blend_ps(lanes_with(j), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
    }
  }

  TRACMOD_AVX512 TRACMOD_INLINE __m512 operator()(const float* x) const {
    __m512 table = _mm512_mul_ps(signs[0], _mm512_set1_ps(x[0]));
    for (int j = 1; j < kTableColumns; ++j) {
      table = _mm512_fmadd_ps(signs[j], _mm512_set1_ps(x[j]), table);
    }
    return table;
  }
};

// The same directly from bfloat16, by two products of pairs. A pair of signs is two bfloat16 +-1 in
// 32 bits, the first in the lower half.
struct PairTable {
  using Number = bfloat16;
  __m512 signs[kTableColumns / 2];

  TRACMOD_AVX512 TRACMOD_INLINE PairTable() {
    for (int j = 0; j < kTableColumns; j += 2) {
      const __m512i ones = _mm512_set1_epi32(0x3f803f80);  // bfloat16 1 is 0x3f80
      const __m512i first = _mm512_maskz_set1_epi32(lanes_with(j), 0x8000);
      const __m512i second = _mm512_maskz_set1_epi32(lanes_with(j + 1), INT32_MIN);
      signs[j / 2] = _mm512_castsi512_ps(_mm512_xor_si512(ones, _mm512_or_si512(first, second)));
    }
  }

  TRACMOD_AVX512 TRACMOD_INLINE __m512 operator()(const bfloat16* x) const {
    __m512 table = _mm512_setzero_ps();
    for (int j = 0; j < kTableColumns; j += 2) {
      int32_t pair;
      std::memcpy(&pair, x + j, sizeof pair);
      add_pairs(table, signs[j / 2], _mm512_castsi512_ps(_mm512_set1_epi32(pair)));
    }
    return table;
  }
};

// Masked intrinsics with this mask do the same as those without a mask, about which GCC 12 warns
// wrongly.
constexpr __mmask16 kAll = 0xffff;

// sums (M, 16 V) += M rows a times 4 * tables columns of signs. `next` points at the rows that come
// after these; they are prefetched one cache line at a time. `bytes` is the size of four numbers of
// them.
template <int M, int V, class Table>
TRACMOD_AVX512 TRACMOD_INLINE void dense_tile(const typename Table::Number* const* a,
                                              const char* const* next, int64_t bytes,
                                              const int32_t* indices, int64_t tables, float* sums,
                                              int64_t ld) {
  const Table table_of;
  __m512 sum[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sum[m][v] = _mm512_setzero_ps();
  }
  for (int64_t t = 0; t < tables; ++t) {
    __m512i index[V];
    for (int v = 0; v < V; ++v) index[v] = _mm512_loadu_si512(indices + (t * V + v) * 16);
    for (int m = 0; m < M; ++m) {
      if (t * bytes % 64 == 0) __builtin_prefetch(next[m] + t * bytes);
      const __m512 table = table_of(a[m] + t * kTableColumns);
      for (int v = 0; v < V; ++v) {
        sum[m][v] = _mm512_add_ps(sum[m][v], _mm512_maskz_permutexvar_ps(kAll, index[v], table));
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      float* to = sums + m * ld + v * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[m][v]));
    }
  }
}

// to[i] = from[i] in the lanes of the mask, 0 in the others; 16 lanes.
TRACMOD_AVX512 TRACMOD_INLINE void copy_part(const float* from, __mmask16 lanes, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(lanes, from));
}

TRACMOD_AVX512 TRACMOD_INLINE void copy_part(const bfloat16* from, __mmask16 lanes, float* to) {
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, from);
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAll, half);
  _mm512_storeu_si512(to, _mm512_maskz_slli_epi32(kAll, wide, 16));
}

TRACMOD_AVX512 TRACMOD_INLINE void copy_part(const bfloat16* from, __mmask16 lanes, bfloat16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(lanes, from));
}

inline void set_one(float* to) { *to = 1.0f; }
inline void set_one(bfloat16* to) { to->bits = 0x3f80; }

// to = [from, ones, zeros up to a whole table]. The first store clears the vector behind the last
// whole one, so that the last table does not read uninitialized numbers.
template <class T, class N>
TRACMOD_AVX512 TRACMOD_INLINE void copy_row(const T* from, int64_t columns, int64_t ones, N* to) {
  copy_part(from, 0, to + columns / 16 * 16);
  for (int64_t i = 0; i < columns; i += 16) {
    const int64_t left = columns - i;
    copy_part(from + i, static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : 0xffff), to + i);
  }
  if (ones != 0) set_one(to + columns);
}

// M rows of T times up to 256 columns. Rows are copied to a buffer if they need widening, a one for
// the bias, or zeros up to a whole table; else they are read where they are.
template <int M, int V, class Table, class T>
TRACMOD_AVX512 TRACMOD_INLINE void dense_rows(const T* const* a, const T* const* next,
                                              int64_t columns, int64_t ones, const int32_t* indices,
                                              float* sums, int64_t ld) {
  using Number = typename Table::Number;
  Number buffer[M][kDenseColumns + 16];
  const Number* rows[M];
  const char* next_rows[M];
  const bool in_place = std::is_same_v<T, Number> && ones == 0 && columns % kTableColumns == 0;
  for (int m = 0; m < M; ++m) {
    if (!in_place) copy_row(a[m], columns, ones, buffer[m]);
    rows[m] = in_place ? reinterpret_cast<const Number*>(a[m]) : buffer[m];
    next_rows[m] = reinterpret_cast<const char*>(next[m]);
  }
  const int64_t tables = (columns + ones + kTableColumns - 1) / kTableColumns;
  dense_tile<M, V, Table>(rows, next_rows, kTableColumns * sizeof(T), indices, tables, sums, ld);
}

// Four rows at a time share the indices that were loaded: at most 4 x 4 sums, 4 vectors of indices
// and 4 of signs are 24 of the 32 registers.
template <int V, class Table, class T>
TRACMOD_AVX512 TRACMOD_INLINE void dense_vectors(const T* const* a, int64_t rows, int64_t columns,
                                                 int64_t ones, const int32_t* indices, float* sums,
                                                 int64_t ld) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    const T* const* next = m + 8 <= rows ? a + m + 4 : a;
    dense_rows<4, V, Table>(a + m, next, columns, ones, indices, sums + m * ld, ld);
  }
  for (; m < rows; ++m) {
    dense_rows<1, V, Table>(a + m, a, columns, ones, indices, sums + m * ld, ld);
  }
}

// Makes the number of vectors a constant, so that the sums are registers.
template <class Table, class T>
TRACMOD_AVX512 TRACMOD_INLINE void dense(const T* const* a, int64_t rows, int64_t columns,
                                         int64_t ones, const int32_t* indices, int64_t vectors,
                                         float* sums, int64_t ld) {
  switch (vectors) {
    case 1:
      return dense_vectors<1, Table>(a, rows, columns, ones, indices, sums, ld);
    case 2:
      return dense_vectors<2, Table>(a, rows, columns, ones, indices, sums, ld);
    case 3:
      return dense_vectors<3, Table>(a, rows, columns, ones, indices, sums, ld);
    default:
      return dense_vectors<4, Table>(a, rows, columns, ones, indices, sums, ld);
  }
}

TRACMOD_AVX512 void add_dense_float32(const float* const* a, int64_t rows, int64_t columns,
                                      int64_t ones, const int32_t* indices, int64_t vectors,
                                      float* sums, int64_t ld) {
  dense<FloatTable>(a, rows, columns, ones, indices, vectors, sums, ld);
}

TRACMOD_AVX512 void add_dense_bfloat16(const bfloat16* const* a, int64_t rows, int64_t columns,
                                       int64_t ones, const int32_t* indices, int64_t vectors,
                                       float* sums, int64_t ld) {
  dense<FloatTable>(a, rows, columns, ones, indices, vectors, sums, ld);
}

TRACMOD_AVX512 void add_dense_pairs(const bfloat16* const* a, int64_t rows, int64_t columns,
                                    int64_t ones, const int32_t* indices, int64_t vectors,
                                    float* sums, int64_t ld) {
  dense<PairTable>(a, rows, columns, ones, indices, vectors, sums, ld);
}

constexpr Signs k_avx512 = {write_indices,
                            add_dense_float32,
                            add_dense_bfloat16,
                            add_sparse_avx512,
                            add_sparse_bfloat16_avx512,
                            add_sketch_avx512,
                            add_elementwise_avx512,
                            add_elementwise_bfloat16_avx512,
                            add_product_avx512};
constexpr Signs k_avx512_bf16 = {write_indices,
                                 add_dense_float32,
                                 add_dense_pairs,
                                 add_sparse_avx512,
                                 add_sparse_bfloat16_avx512,
                                 add_sketch_avx512,
                                 add_elementwise_avx512,
                                 add_elementwise_bfloat16_avx512,
                                 add_product_avx512};
#endif

const Signs& choose() {
#if defined(__x86_64__)
  if (std::strcmp(tiles().name, "avx512_bf16") == 0) return k_avx512_bf16;
  if (std::strcmp(tiles().name, "avx512") == 0) return k_avx512;
  if (std::strcmp(tiles().name, "avx2") == 0) return k_avx2;
#endif
  return k_baseline;
}

}  // namespace

const Signs& signs() {
  static const Signs& chosen = choose();
  return chosen;
}

}  // namespace tracmod::cpu

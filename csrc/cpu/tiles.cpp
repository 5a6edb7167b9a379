// C (M,N) += A (M,D) B (D,N): two loops over D that keep a tile of C in vector registers.
//
//   outer  a tile is 6 rows x 2 or 4 vectors of columns: per step of D it loads the columns of b
//          once and each a as a broadcast operand; 12 or 24 multiply-adds for 2 or 4 loads, so the
//          multiply-add units are the limit. D goes in blocks of 256: a block of b (256 x 64
//          floats, 64 KiB) stays in the second cache while the tiles of rows pass over it.
//   dot    both operands lie along D: a tile is R rows x 4 columns of vector sums, R + 4 loads for
//          4 R multiply-adds; D goes in blocks of 2048, four rows of a (32 KiB) stay in the first
//          cache while the columns pass.
//
// Written once with the compiler's vector types and instantiated per instruction set by functions
// with a `target` attribute into which everything is inlined; no intrinsics, no build flags.
#include "cpu/tiles.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define TRACMOD_INLINE inline __attribute__((always_inline))

namespace tracmod::cpu {
namespace {

constexpr int64_t kOuterDepth = 256;
constexpr int64_t kDotDepth = 2048;
constexpr int kOuterRows = 6;
constexpr int kDotColumns = 4;

// W floats; `Loose` may lie at any address.
template <int W>
struct Vector {
  typedef float Type __attribute__((vector_size(W * 4)));
  typedef float Loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(W * 4)));
  typedef uint16_t Half __attribute__((vector_size(W * 2), aligned(2), may_alias));
};

template <int W>
TRACMOD_INLINE typename Vector<W>::Type load(const float* from) {
  return *reinterpret_cast<const typename Vector<W>::Loose*>(from);
}

template <int W>
TRACMOD_INLINE typename Vector<W>::Type load(const bfloat16* from) {
  const auto half = *reinterpret_cast<const typename Vector<W>::Half*>(from);
  const auto bits = __builtin_convertvector(half, typename Vector<W>::Bits) << 16;
  return (typename Vector<W>::Type)bits;
}

// The first `count` < W values, then zeros.
template <int W, class T>
TRACMOD_INLINE typename Vector<W>::Type load_part(const T* from, int64_t count) {
  T part[W];
  std::memset(part, 0, sizeof part);
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return load<W>(part);
}

// The sum of a vector's lanes, halves first: the same order for every element.
template <int W>
TRACMOD_INLINE float lane_sum(const typename Vector<W>::Type& vector) {
  float lanes[W];
  std::memcpy(lanes, &vector, sizeof lanes);
  for (int width = W / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <int W, int M, int V>
TRACMOD_INLINE void outer_tile(const float* const* a, int64_t a_step, int64_t begin, int64_t end,
                               const float* b, int64_t ldb, double* c, int64_t ldc) {
  typename Vector<W>::Type sum[M][V] = {};
  for (int64_t d = begin; d < end; ++d) {
    typename Vector<W>::Type row[V];
    for (int v = 0; v < V; ++v) row[v] = load<W>(b + d * ldb + v * W);
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) sum[m][v] += a[m][d * a_step] * row[v];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      float lanes[W];
      std::memcpy(lanes, &sum[m][v], sizeof lanes);
      for (int i = 0; i < W; ++i) c[m * ldc + v * W + i] += lanes[i];
    }
  }
}

template <int W, int V>
TRACMOD_INLINE void outer_rows(int64_t rows, const float* const* a, int64_t a_step, int64_t begin,
                               int64_t end, const float* b, int64_t ldb, double* c, int64_t ldc) {
  switch (rows) {
    case 1:
      return outer_tile<W, 1, V>(a, a_step, begin, end, b, ldb, c, ldc);
    case 2:
      return outer_tile<W, 2, V>(a, a_step, begin, end, b, ldb, c, ldc);
    case 3:
      return outer_tile<W, 3, V>(a, a_step, begin, end, b, ldb, c, ldc);
    case 4:
      return outer_tile<W, 4, V>(a, a_step, begin, end, b, ldb, c, ldc);
    case 5:
      return outer_tile<W, 5, V>(a, a_step, begin, end, b, ldb, c, ldc);
    default:
      return outer_tile<W, 6, V>(a, a_step, begin, end, b, ldb, c, ldc);
  }
}

// V vectors a tile where as many columns are left, one vector for the rest.
template <int W, int V>
TRACMOD_INLINE void outer_product(const float* const* a, int64_t a_step, int64_t rows,
                                  const float* b, int64_t ldb, int64_t columns, int64_t depth,
                                  double* c, int64_t ldc) {
  for (int64_t begin = 0; begin < depth; begin += kOuterDepth) {
    const int64_t end = std::min(depth, begin + kOuterDepth);
    for (int64_t n = 0; n < columns;) {
      const bool full = columns - n >= V * W;
      for (int64_t m = 0; m < rows; m += kOuterRows) {
        const int64_t count = std::min<int64_t>(kOuterRows, rows - m);
        double* target = c + m * ldc + n;
        if (full) {
          outer_rows<W, V>(count, a + m, a_step, begin, end, b + n, ldb, target, ldc);
        } else {
          outer_rows<W, 1>(count, a + m, a_step, begin, end, b + n, ldb, target, ldc);
        }
      }
      n += full ? V * W : W;
    }
  }
}

template <int W, int M, int N, class T>
TRACMOD_INLINE void dot_tile(const T* const* a, const T* const* b, int64_t begin, int64_t end,
                             double* c, int64_t ldc) {
  typename Vector<W>::Type sum[M][N] = {};
  int64_t d = begin;
  for (; d + W <= end; d += W) {
    typename Vector<W>::Type column[N];
    for (int n = 0; n < N; ++n) column[n] = load<W>(b[n] + d);
    for (int m = 0; m < M; ++m) {
      const auto row = load<W>(a[m] + d);
      for (int n = 0; n < N; ++n) sum[m][n] += row * column[n];
    }
  }
  if (d < end) {
    typename Vector<W>::Type column[N];
    for (int n = 0; n < N; ++n) column[n] = load_part<W>(b[n] + d, end - d);
    for (int m = 0; m < M; ++m) {
      const auto row = load_part<W>(a[m] + d, end - d);
      for (int n = 0; n < N; ++n) sum[m][n] += row * column[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) c[m * ldc + n] += lane_sum<W>(sum[m][n]);
  }
}

template <int W, int M, class T>
TRACMOD_INLINE void dot_columns(int64_t columns, const T* const* a, const T* const* b,
                                int64_t begin, int64_t end, double* c, int64_t ldc) {
  switch (columns) {
    case 1:
      return dot_tile<W, M, 1>(a, b, begin, end, c, ldc);
    case 2:
      return dot_tile<W, M, 2>(a, b, begin, end, c, ldc);
    case 3:
      return dot_tile<W, M, 3>(a, b, begin, end, c, ldc);
    default:
      return dot_tile<W, M, 4>(a, b, begin, end, c, ldc);
  }
}

// R rows a tile where as many are left, one row for the rest.
template <int W, int R, class T>
TRACMOD_INLINE void dot_product(const T* const* a, int64_t rows, const T* const* b, int64_t columns,
                                int64_t depth, double* c, int64_t ldc) {
  for (int64_t begin = 0; begin < depth; begin += kDotDepth) {
    const int64_t end = std::min(depth, begin + kDotDepth);
    for (int64_t m = 0; m < rows;) {
      const bool full = rows - m >= R;
      for (int64_t n = 0; n < columns; n += kDotColumns) {
        const int64_t count = std::min<int64_t>(kDotColumns, columns - n);
        double* target = c + m * ldc + n;
        if (full) {
          dot_columns<W, R>(count, a + m, b + n, begin, end, target, ldc);
        } else {
          dot_columns<W, 1>(count, a + m, b + n, begin, end, target, ldc);
        }
      }
      m += full ? R : 1;
    }
  }
}

// One instruction set: W floats a vector, V vectors a tile of `outer`, R rows a tile of `dot`.
#define TRACMOD_TILES(NAME, TARGET, W, V, R)                                                      \
  TARGET void outer_##NAME(const float* const* a, int64_t a_step, int64_t rows, const float* b,   \
                           int64_t ldb, int64_t columns, int64_t depth, double* c, int64_t ldc) { \
    outer_product<W, V>(a, a_step, rows, b, ldb, columns, depth, c, ldc);                         \
  }                                                                                               \
  TARGET void dot_##NAME(const float* const* a, int64_t rows, const float* const* b,              \
                         int64_t columns, int64_t depth, double* c, int64_t ldc) {                \
    dot_product<W, R>(a, rows, b, columns, depth, c, ldc);                                        \
  }                                                                                               \
  TARGET void dot_bfloat16_##NAME(const bfloat16* const* a, int64_t rows,                         \
                                  const bfloat16* const* b, int64_t columns, int64_t depth,       \
                                  double* c, int64_t ldc) {                                       \
    dot_product<W, R>(a, rows, b, columns, depth, c, ldc);                                        \
  }                                                                                               \
  constexpr Tiles k_##NAME = {#NAME, outer_##NAME, dot_##NAME, dot_bfloat16_##NAME};

TRACMOD_TILES(baseline, , 4, 2, 2)
#if defined(__x86_64__)
TRACMOD_TILES(avx2, __attribute__((target("avx2,fma"))), 8, 2, 2)
TRACMOD_TILES(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 16, 4, 4)
#endif

bool supported(const Tiles& tiles) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&tiles == &k_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (&tiles == &k_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &tiles == &k_baseline;
}

// The best that the processor has; TRACMOD_INSTRUCTIONS names another, to test it or to repeat the
// bits of an older processor.
const Tiles& choose() {
  constexpr const Tiles* kAll[] = {
#if defined(__x86_64__)
      &k_avx512, &k_avx2,
#endif
      &k_baseline};
  const char* wanted = std::getenv("TRACMOD_INSTRUCTIONS");
  for (const Tiles* tiles : kAll) {
    if (supported(*tiles) && (wanted == nullptr || std::strcmp(wanted, tiles->name) == 0)) {
      return *tiles;
    }
  }
  throw std::invalid_argument(
      std::string("TRACMOD_INSTRUCTIONS: expected baseline, avx2 or avx512, and this processor to "
                  "have it, got ") +
      wanted);
}

}  // namespace

const Tiles& tiles() {
  static const Tiles& chosen = choose();
  return chosen;
}

}  // namespace tracmod::cpu

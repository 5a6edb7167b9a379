// C (M, N) += A (M, D) B (D, N) in registers, and the functions that prepare its operands. A call
// runs in the calling thread; the ops decide which rows and columns are one work item.
//
//   outer  A tile is 6 rows x 2 or 4 vectors of columns. Per step of D it loads the vectors of b
//          once and each number of a as a broadcast: 12 or 24 multiply-adds for 8 or 10 loads, so
//          the multiply-add units are the limit. D is cut into blocks of 256 steps, so that a block
//          of a panel of b (64 KiB) stays in the second-level cache while all tiles of rows pass
//          over it. A step of bfloat16 pairs is the same with two products per lane and
//          instruction.
//   form   The same tiles, summed over the few tokens of one example: the sums go directly to
//          float32 unless there is more than one block of steps.
//   pack   Transposes rows into a panel for `outer`: about 5 cycles for 16 numbers, paid once for
//          all rows of a that are multiplied by the panel.
//   inner  Inner products of rows of both sides where they are, summed in vectors along D. A tile
//          of 6 x 2 or 6 x 4 inner products is 12 or 24 multiply-adds for 8 or 10 loads, plus
//          adding up the lanes once per 64 vectors. Used for few rows, for which `pack` would cost
//          more than it saves.
//   dot    One inner product: two loads per multiply-add, so memory is the limit.
//
// Everything is written once with the compiler's vector types and instantiated for each instruction
// set by functions with a `target` attribute, into which all of it is inlined (vector.h says why).
// That needs no build flags, and inline assembly only for products of bfloat16 pairs. The
// instruction for those, vdpbf16ps, treats denormals as zero and rounds once per product.
#include "cpu/tiles.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/vector.h"

#define TRACMOD_LAMBDA __attribute__((always_inline))

namespace tracmod::cpu {
namespace {

constexpr int64_t kInnerSteps = 64;  // vectors of depth that `inner` and `dot` sum in float32
// Rows of a tile. With 4 vectors of columns: 24 sums, 4 vectors of b and a broadcast number are 29
// of the 32 registers of AVX-512; with 2 vectors, 15 of the 16 of AVX2.
constexpr int kOuterRows = 6;

// The type of a packed step: one float32, or PAIR = 2 bfloat16.
template <int PAIR>
using packed_t = std::conditional_t<PAIR == 2, bfloat16_pair, float>;

// Loads the number (or pair) at this address into every lane.
template <int W, class A>
TRACMOD_INLINE typename Vector<W>::Type broadcast(const A* from) {
  uint32_t bits;
  if constexpr (std::is_same_v<A, bfloat16>) {
    bits = static_cast<uint32_t>(from->bits) << 16;
  } else {
    std::memcpy(&bits, from, sizeof bits);
  }
  return (typename Vector<W>::Type)(typename Vector<W>::Bits{} + bits);
}

// sum += a * b in every lane; for pairs, both products.
template <class A, class V>
TRACMOD_INLINE void multiply_add(V& sum, const V& a, const V& b) {
  if constexpr (std::is_same_v<A, bfloat16_pair>) {
    add_pairs(sum, a, b);
  } else {
    sum += a * b;
  }
}

template <int W, int M, int V>
struct Sums {
  typename Vector<W>::Type at[M][V] = {};
};

// One step of depth: M broadcast numbers of a times V vectors of b. `a_at(m)` is the address of row
// m's number.
template <int W, int M, int V, class A, class At>
TRACMOD_INLINE void outer_step(Sums<W, M, V>& sums, const At& a_at, const float* b) {
  typename Vector<W>::Type row[V];
  for (int v = 0; v < V; ++v) row[v] = load<W>(b + v * W);
  for (int m = 0; m < M; ++m) {
    const auto a = broadcast<W>(a_at(m));
    for (int v = 0; v < V; ++v) multiply_add<A>(sums.at[m][v], a, row[v]);
  }
}

template <int W, int M, int V, class A>
TRACMOD_INLINE void outer_steps(Sums<W, M, V>& sums, const A* const* a, int64_t a_step,
                                int64_t begin, int64_t end, const float* b, int64_t ldb) {
  for (int64_t s = begin; s < end; ++s) {
    outer_step<W, M, V, A>(
        sums, [&](int m) TRACMOD_LAMBDA { return a[m] + s * a_step; }, b + s * ldb);
  }
}

// Ends a block: adds its float32 sums to the float64 result.
template <int W, int M, int V>
TRACMOD_INLINE void add_to(const Sums<W, M, V>& sums, double* c, int64_t ldc) {
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      float lanes[W];
      std::memcpy(lanes, &sums.at[m][v], sizeof lanes);
      for (int i = 0; i < W; ++i) c[m * ldc + v * W + i] += lanes[i];
    }
  }
}

// Number of rows of the next tile when `rows` rows remain. Tiles get about equal heights (8 rows
// are 4 + 4, not 6 + 2), because in a tile of few sums each addition has to wait for the one before
// it.
inline int64_t tile_rows(int64_t rows) {
  const int64_t count = (rows + kOuterRows - 1) / kOuterRows;
  return (rows + count - 1) / count;
}

// Calls run with the number of rows, at most 6, as a compile-time constant.
template <class Run>
TRACMOD_INLINE void with_rows(int64_t rows, const Run& run) {
  switch (rows) {
    case 1:
      return run(std::integral_constant<int, 1>());
    case 2:
      return run(std::integral_constant<int, 2>());
    case 3:
      return run(std::integral_constant<int, 3>());
    case 4:
      return run(std::integral_constant<int, 4>());
    case 5:
      return run(std::integral_constant<int, 5>());
    default:
      return run(std::integral_constant<int, kOuterRows>());
  }
}

// Calls run(first column, number of vectors as a compile-time constant) for all columns: V vectors
// while as many remain, then 2, then 1.
template <int W, int V, class Run>
TRACMOD_INLINE void for_columns(int64_t columns, const Run& run) {
  int64_t n = 0;
  for (; columns - n >= V * W; n += V * W) run(n, std::integral_constant<int, V>());
  if constexpr (V > 2) {
    for (; columns - n >= 2 * W; n += 2 * W) run(n, std::integral_constant<int, 2>());
  }
  for (; n < columns; n += W) run(n, std::integral_constant<int, 1>());
}

// A is float, bfloat16 (widened to float32), or bfloat16_pair.
template <int W, int V, class A>
TRACMOD_INLINE void outer_product(const A* const* a, int64_t a_step, int64_t rows, const float* b,
                                  int64_t ldb, int64_t columns, int64_t steps, double* c,
                                  int64_t ldc) {
  for (int64_t begin = 0; begin < steps; begin += kBlockSteps) {
    const int64_t end = std::min(steps, begin + kBlockSteps);
    for_columns<W, V>(columns, [&](int64_t n, auto vectors) TRACMOD_LAMBDA {
      for (int64_t m = 0; m < rows; m += kOuterRows) {
        with_rows(rows - m, [&](auto count) TRACMOD_LAMBDA {
          Sums<W, count, vectors> sums;
          outer_steps(sums, a + m, a_step, begin, end, b + n, ldb);
          add_to(sums, c + m * ldc + n, ldc);
        });
      }
    });
  }
}

// Adds the products of the last number of an odd depth. Reading it as a pair would read past the
// end of the row, and a case for it inside the tiles would force their sums out of the registers.
TRACMOD_INLINE void add_last(const bfloat16* const* a, int64_t rows, const float* pairs,
                             int64_t columns, int64_t last, double* c, int64_t ldc) {
  for (int64_t n = 0; n < columns; ++n) {
    bfloat16_pair pair;
    std::memcpy(&pair, pairs + n, sizeof pair);
    const double b = to_float(pair.first);
    for (int64_t m = 0; m < rows; ++m) c[m * ldc + n] += to_float(a[m][last]) * b;
  }
}

// The sums of a single block are stored directly; those of several blocks are added up in float64
// first.
template <int W, int V, class A>
TRACMOD_INLINE void form_product(const float* a, int64_t a_step, int64_t rows, const float* panel,
                                 int64_t columns, int64_t steps, float* c, int64_t ldc) {
  for_columns<W, V>(columns, [&](int64_t n, auto vectors) TRACMOD_LAMBDA {
    for (int64_t first = 0, size; first < rows; first += size) {
      size = tile_rows(rows - first);
      with_rows(size, [&](auto count) TRACMOD_LAMBDA {
        constexpr int kWidth = vectors * W;
        const A* from[count];  // row m of a^T starts m numbers later
        for (int m = 0; m < count; ++m) from[m] = reinterpret_cast<const A*>(a + first + m);
        float* to = c + first * ldc + n;
        if (steps <= kBlockSteps) {
          Sums<W, count, vectors> sums;
          outer_steps(sums, from, a_step, 0, steps, panel + n, kPanel);
          for (int m = 0; m < count; ++m) {
            for (int v = 0; v < vectors; ++v) {
              *reinterpret_cast<typename Vector<W>::Loose*>(to + m * ldc + v * W) = sums.at[m][v];
            }
          }
          return;
        }
        double total[count * kWidth] = {};
        for (int64_t begin = 0; begin < steps; begin += kBlockSteps) {
          Sums<W, count, vectors> sums;
          const int64_t end = std::min(steps, begin + kBlockSteps);
          outer_steps(sums, from, a_step, begin, end, panel + n, kPanel);
          add_to(sums, total, kWidth);
        }
        for (int m = 0; m < count; ++m) {
          for (int i = 0; i < kWidth; ++i) {
            to[m * ldc + i] = static_cast<float>(total[m * kWidth + i]);
          }
        }
      });
    }
  });
}

template <int W, int V, class A>
TRACMOD_INLINE void sum_squares(const float* panel, int64_t columns, int64_t steps, double* c) {
  for (int64_t begin = 0; begin < steps; begin += kBlockSteps) {
    for_columns<W, V>(columns, [&](int64_t n, auto vectors) TRACMOD_LAMBDA {
      Sums<W, 1, vectors> sums;
      for (int64_t s = begin; s < std::min(steps, begin + kBlockSteps); ++s) {
        for (int v = 0; v < vectors; ++v) {
          const auto numbers = load<W>(panel + s * columns + n + v * W);
          multiply_add<A>(sums.at[0][v], numbers, numbers);
        }
      }
      add_to(sums, c + n, 0);
    });
  }
}

// c[n] += factor * a[n] * (b[n] + shift) in float64, half as many lanes per vector.
template <int W>
TRACMOD_INLINE void sum_products(int64_t count, double factor, const double* a, const double* b,
                                 double shift, double* c) {
  typedef double Wide __attribute__((vector_size(W * 4), aligned(8), may_alias));
  for (int64_t n = 0; n < count; n += W / 2) {
    const auto at = [n](auto* from)
                        TRACMOD_LAMBDA { return reinterpret_cast<const Wide*>(from + n); };
    *reinterpret_cast<Wide*>(c + n) = *at(c) + factor * *at(a) * (*at(b) + shift);
  }
}

// L steps of a row as 32-bit integers, for moving numbers without interpreting them.
template <int L>
struct Lanes {
  typedef uint32_t Type __attribute__((vector_size(L * 4)));
  typedef uint32_t Loose __attribute__((vector_size(L * 4), aligned(2), may_alias));
};

template <int L>
TRACMOD_INLINE typename Lanes<L>::Type load_steps(const bfloat16* from) {
  return (typename Lanes<L>::Type)load<L>(from);
}
template <int L, class A>
TRACMOD_INLINE typename Lanes<L>::Type load_steps(const A* from) {
  return *reinterpret_cast<const typename Lanes<L>::Loose*>(from);
}

TRACMOD_INLINE uint32_t bits_of(bfloat16 value) { return static_cast<uint32_t>(value.bits) << 16; }
template <class A>
TRACMOD_INLINE uint32_t bits_of(const A& value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

#if defined(__clang__)
#define TRACMOD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TRACMOD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, std::decay_t<decltype(a)>{__VA_ARGS__})
#endif

// Transposes 4 x 4 numbers in each 128 bits of four rows a, b, c, d: first pairs of rows are
// interleaved (a0 b0 a1 b1), then pairs of pairs (a0 b0 c0 d0).
TRACMOD_INLINE void transpose_fours(Lanes<4>::Type* rows) {
  const auto a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  const auto ab0 = TRACMOD_SHUFFLE(a, b, 0, 4, 1, 5), ab1 = TRACMOD_SHUFFLE(a, b, 2, 6, 3, 7);
  const auto cd0 = TRACMOD_SHUFFLE(c, d, 0, 4, 1, 5), cd1 = TRACMOD_SHUFFLE(c, d, 2, 6, 3, 7);
  rows[0] = TRACMOD_SHUFFLE(ab0, cd0, 0, 1, 4, 5);
  rows[1] = TRACMOD_SHUFFLE(ab0, cd0, 2, 3, 6, 7);
  rows[2] = TRACMOD_SHUFFLE(ab1, cd1, 0, 1, 4, 5);
  rows[3] = TRACMOD_SHUFFLE(ab1, cd1, 2, 3, 6, 7);
}

// The even (HALF = 0) or odd (1) 64-bit elements of both vectors, alternating. Written on 64-bit
// numbers, because then the compiler makes one fast instruction of it.
template <int HALF>
TRACMOD_INLINE Lanes<8>::Type interleave(Lanes<8>::Type a, Lanes<8>::Type b) {
  typedef uint64_t Long __attribute__((vector_size(32)));
  const Long first = (Long)a, second = (Long)b;
  return (Lanes<8>::Type)TRACMOD_SHUFFLE(first, second, HALF, 4 + HALF, 2 + HALF, 6 + HALF);
}

TRACMOD_INLINE void transpose_fours(Lanes<8>::Type* rows) {
  const auto a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  const auto ab0 = TRACMOD_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
  const auto ab1 = TRACMOD_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  const auto cd0 = TRACMOD_SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13);
  const auto cd1 = TRACMOD_SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  rows[0] = interleave<0>(ab0, cd0);
  rows[1] = interleave<1>(ab0, cd0);
  rows[2] = interleave<0>(ab1, cd1);
  rows[3] = interleave<1>(ab1, cd1);
}

// Transposes L x L numbers in registers.
TRACMOD_INLINE void transpose(Lanes<4>::Type* rows) { transpose_fours(rows); }
// 8 x 8: the 4 x 4 blocks within 128 bits, then the halves of 128 bits are exchanged.
TRACMOD_INLINE void transpose(Lanes<8>::Type* rows) {
  transpose_fours(rows);
  transpose_fours(rows + 4);
  for (int i = 0; i < 4; ++i) {
    const auto low = rows[i], high = rows[i + 4];
    rows[i] = TRACMOD_SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = TRACMOD_SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// W steps of a row; if only `numbers` numbers remain, those and then zeros.
template <int W, class A, class T>
TRACMOD_INLINE typename Vector<W>::Type load_row(const T* from, int64_t numbers) {
  constexpr int64_t kNumbers = W * static_cast<int64_t>(sizeof(A) / sizeof(T));
  if (numbers >= kNumbers) {
    return (typename Vector<W>::Type)load_steps<W>(reinterpret_cast<const A*>(from));
  }
  T part[kNumbers] = {};
  for (int64_t i = 0; i < numbers; ++i) part[i] = from[i];
  return (typename Vector<W>::Type)load_steps<W>(reinterpret_cast<const A*>(part));
}

// Adds the halves of a vector to each other until four lanes remain.
template <int W>
TRACMOD_INLINE Vector<4>::Type fold(typename Vector<W>::Type sums) {
  if constexpr (W == 4) {
    return sums;
  } else {
    typename Vector<W / 2>::Type half[2];
    std::memcpy(half, &sums, sizeof half);
    return fold<W / 2>(half[0] + half[1]);
  }
}

// c[v] += the sum of the lanes of sums[v]. The four-lane remainders of up to four vectors are
// transposed, so that three vector additions finish all of them.
template <int W, int V>
TRACMOD_INLINE void add_lanes(const typename Vector<W>::Type* sums, double* c) {
  Lanes<4>::Type square[4] = {};
  for (int v = 0; v < V; ++v) square[v] = (Lanes<4>::Type)fold<W>(sums[v]);
  transpose(square);
  Vector<4>::Type row[4];
  std::memcpy(row, square, sizeof row);
  const Vector<4>::Type total = (row[0] + row[1]) + (row[2] + row[3]);
  for (int v = 0; v < V; ++v) c[v] += static_cast<double>(total[v]);
}

// One vector of depth of M x V inner products.
template <int W, int M, int V, class A, class T>
TRACMOD_INLINE void inner_step(Sums<W, M, V>& sums, const T* const* a, const T* const* b, int64_t d,
                               int64_t numbers) {
  typename Vector<W>::Type row[V];
  for (int v = 0; v < V; ++v) row[v] = load_row<W, A>(b[v] + d, numbers);
  for (int m = 0; m < M; ++m) {
    const auto left = load_row<W, A>(a[m] + d, numbers);
    for (int v = 0; v < V; ++v) multiply_add<A>(sums.at[m][v], left, row[v]);
  }
}

// A is float, bfloat16 (widened to float32), or bfloat16_pair; T is the type in memory.
template <int W, int V, class A, class T>
TRACMOD_INLINE void inner_products(const T* const* a, int64_t rows, const T* const* b,
                                   int64_t columns, int64_t depth, double* c, int64_t ldc) {
  constexpr int64_t kNumbers = W * static_cast<int64_t>(sizeof(A) / sizeof(T));
  for (int64_t begin = 0; begin < depth; begin += kInnerSteps * kNumbers) {
    const int64_t end = std::min(depth, begin + kInnerSteps * kNumbers);
    for (int64_t m = 0, size; m < rows; m += size) {
      size = tile_rows(rows - m);
      for_columns<1, V>(columns, [&](int64_t n, auto vectors) TRACMOD_LAMBDA {
        with_rows(size, [&](auto count) TRACMOD_LAMBDA {
          Sums<W, count, vectors> sums;
          int64_t d = begin;
          for (; d + kNumbers <= end; d += kNumbers) {
            inner_step<W, count, vectors, A>(sums, a + m, b + n, d, kNumbers);
          }
          if (d < end) inner_step<W, count, vectors, A>(sums, a + m, b + n, d, end - d);
          for (int i = 0; i < count; ++i) {
            add_lanes<W, vectors>(sums.at[i], c + (m + i) * ldc + n);
          }
        });
      });
    }
  }
}

// One inner product with four vectors of sums, so that four additions can be under way at once.
template <int W, class A, class T>
TRACMOD_INLINE double dot_product(const T* a, const T* b, int64_t depth) {
  constexpr int64_t kNumbers = W * static_cast<int64_t>(sizeof(A) / sizeof(T));
  double total = 0.0;
  for (int64_t begin = 0; begin < depth; begin += kInnerSteps * kNumbers) {
    const int64_t end = std::min(depth, begin + kInnerSteps * kNumbers);
    Sums<W, 1, 4> sums;
    int64_t d = begin;
    for (; d + 4 * kNumbers <= end; d += 4 * kNumbers) {
      for (int v = 0; v < 4; ++v) {
        const int64_t at = d + v * kNumbers;
        multiply_add<A>(sums.at[0][v], load_row<W, A>(a + at, kNumbers),
                        load_row<W, A>(b + at, kNumbers));
      }
    }
    for (; d < end; d += kNumbers) {
      multiply_add<A>(sums.at[0][0], load_row<W, A>(a + d, end - d),
                      load_row<W, A>(b + d, end - d));
    }
    const auto* sum = sums.at[0];
    const typename Vector<W>::Type all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    add_lanes<W, 1>(&all, &total);
  }
  return total;
}

// panel[s * columns + n] = rows[n][s], in squares of L x L steps that are transposed in registers.
// 16 rows are read at a time, a whole cache line of each, so that the hardware prefetchers can
// follow.
template <int L, class A>
TRACMOD_INLINE void pack_steps(const A* const* rows, int64_t count, int64_t steps, float* panel) {
  uint32_t* to = reinterpret_cast<uint32_t*>(panel);
  const int64_t columns = padded(count), full_steps = steps / L * L;
  for (int64_t group = 0; group < columns; group += 16) {
    for (int64_t line = 0; line < full_steps; line += 16) {
      for (int64_t n = group; n < group + 16; n += L) {
        for (int64_t s = line; s < std::min(full_steps, line + 16); s += L) {
          typename Lanes<L>::Type square[L] = {};
          for (int i = 0; i < L; ++i) {
            if (n + i < count) square[i] = load_steps<L>(rows[n + i] + s);
          }
          transpose(square);
          for (int i = 0; i < L; ++i) std::memcpy(to + (s + i) * columns + n, square + i, L * 4);
        }
      }
    }
  }
  for (int64_t s = full_steps; s < steps; ++s) {
    for (int64_t n = 0; n < columns; ++n) {
      to[s * columns + n] = n < count ? bits_of(rows[n][s]) : 0;
    }
  }
}

template <int L>
TRACMOD_INLINE void pack_rows(const float* const* rows, int64_t count, int64_t depth,
                              float* panel) {
  pack_steps<L>(rows, count, depth, panel);
}

// Of an odd depth, the last number makes a pair with zero.
template <int L, int PAIR>
TRACMOD_INLINE void pack_rows(const bfloat16* const* rows, int64_t count, int64_t depth,
                              float* panel) {
  if (PAIR == 1) return pack_steps<L>(rows, count, depth, panel);
  pack_steps<L>(reinterpret_cast<const bfloat16_pair* const*>(rows), count, depth / 2, panel);
  if (depth % 2 == 0) return;
  uint32_t* to = reinterpret_cast<uint32_t*>(panel) + depth / 2 * padded(count);
  for (int64_t n = 0; n < padded(count); ++n) to[n] = n < count ? rows[n][depth - 1].bits : 0;
}

// to[s * width + n] = step s of column n: the value of one token, or the values of two tokens as a
// pair, the first in the lower half.
template <int W, int PAIR>
TRACMOD_INLINE void pack_columns(const bfloat16* from, int64_t tokens, int64_t size, int64_t count,
                                 int64_t width, float* to) {
  for (int64_t s = 0; s < tokens; s += PAIR, from += PAIR * size, to += width) {
    const bool both = PAIR == 2 && s + 1 < tokens;
    int64_t n = 0;
    for (; n + W <= count; n += W) {
      auto bits = load_bits<W>(from + n);
      if (PAIR == 2) bits >>= 16;
      if (both) bits |= load_bits<W>(from + size + n);
      *reinterpret_cast<typename Vector<W>::LooseBits*>(to + n) = bits;
    }
    for (; n < count; ++n) {
      const uint32_t bits = PAIR == 2 ? from[n].bits : bits_of(from[n]);
      const uint32_t second = both ? bits_of(from[size + n]) : 0;
      const uint32_t step = bits | second;
      std::memcpy(to + n, &step, sizeof step);
    }
  }
}

// All functions of Tiles for one instruction set: W floats per vector, V vectors of columns per
// tile, L x L numbers transposed at a time, PAIR bfloat16 per step.
#define TRACMOD_TILES(NAME, TARGET, W, V, L, PAIR, PAIR_TYPE)                                     \
  TARGET void outer_##NAME(const float* const* a, int64_t a_step, int64_t rows, const float* b,   \
                           int64_t ldb, int64_t columns, int64_t depth, double* c, int64_t ldc) { \
    outer_product<W, V>(a, a_step, rows, b, ldb, columns, depth, c, ldc);                         \
  }                                                                                               \
  TARGET void outer_bfloat16_##NAME(const bfloat16* const* a, int64_t rows, const float* panel,   \
                                    int64_t columns, int64_t depth, double* c, int64_t ldc) {     \
    outer_product<W, V>(reinterpret_cast<const PAIR_TYPE* const*>(a), 1, rows, panel, columns,    \
                        columns, depth / PAIR, c, ldc);                                           \
    if (depth % PAIR != 0) {                                                                      \
      add_last(a, rows, panel + depth / PAIR * columns, columns, depth - 1, c, ldc);              \
    }                                                                                             \
  }                                                                                               \
  TARGET void form_##NAME(const float* a, int64_t a_step, int64_t rows, const float* panel,       \
                          int64_t columns, int64_t steps, float* c, int64_t ldc) {                \
    form_product<W, V, float>(a, a_step, rows, panel, columns, steps, c, ldc);                    \
  }                                                                                               \
  TARGET void form_pairs_##NAME(const float* a, int64_t a_step, int64_t rows, const float* panel, \
                                int64_t columns, int64_t steps, float* c, int64_t ldc) {          \
    form_product<W, V, packed_t<PAIR>>(a, a_step, rows, panel, columns, steps, c, ldc);           \
  }                                                                                               \
  TARGET void inner_##NAME(const float* const* a, int64_t rows, const float* const* b,            \
                           int64_t columns, int64_t depth, double* c, int64_t ldc) {              \
    inner_products<W, V, float>(a, rows, b, columns, depth, c, ldc);                              \
  }                                                                                               \
  TARGET void inner_bfloat16_##NAME(const bfloat16* const* a, int64_t rows,                       \
                                    const bfloat16* const* b, int64_t columns, int64_t depth,     \
                                    double* c, int64_t ldc) {                                     \
    inner_products<W, V, PAIR_TYPE>(a, rows, b, columns, depth, c, ldc);                          \
  }                                                                                               \
  TARGET double dot_##NAME(const float* a, const float* b, int64_t depth) {                       \
    return dot_product<W, float>(a, b, depth);                                                    \
  }                                                                                               \
  TARGET double dot_bfloat16_##NAME(const bfloat16* a, const bfloat16* b, int64_t depth) {        \
    return dot_product<W, PAIR_TYPE>(a, b, depth);                                                \
  }                                                                                               \
  TARGET void pack_##NAME(const float* const* rows, int64_t count, int64_t depth, float* panel) { \
    pack_rows<L>(rows, count, depth, panel);                                                      \
  }                                                                                               \
  TARGET void pack_bfloat16_##NAME(const bfloat16* const* rows, int64_t count, int64_t depth,     \
                                   float* panel) {                                                \
    pack_rows<L, PAIR>(rows, count, depth, panel);                                                \
  }                                                                                               \
  TARGET void pack_tokens_##NAME(const bfloat16* from, int64_t tokens, int64_t size,              \
                                 int64_t count, int64_t width, float* to) {                       \
    pack_columns<W, PAIR>(from, tokens, size, count, width, to);                                  \
  }                                                                                               \
  TARGET void squares_##NAME(const float* panel, int64_t columns, int64_t steps, double* c) {     \
    sum_squares<W, V, float>(panel, columns, steps, c);                                           \
  }                                                                                               \
  TARGET void squares_pairs_##NAME(const float* panel, int64_t columns, int64_t steps,            \
                                   double* c) {                                                   \
    sum_squares<W, V, packed_t<PAIR>>(panel, columns, steps, c);                                  \
  }                                                                                               \
  TARGET void add_products_##NAME(int64_t count, double factor, const double* a, const double* b, \
                                  double shift, double* c) {                                      \
    sum_products<W>(count, factor, a, b, shift, c);                                               \
  }                                                                                               \
  constexpr Tiles k_##NAME = {#NAME,                                                              \
                              PAIR,                                                               \
                              outer_##NAME,                                                       \
                              outer_bfloat16_##NAME,                                              \
                              pack_##NAME,                                                        \
                              pack_bfloat16_##NAME,                                               \
                              pack_tokens_##NAME,                                                 \
                              form_##NAME,                                                        \
                              form_pairs_##NAME,                                                  \
                              inner_##NAME,                                                       \
                              inner_bfloat16_##NAME,                                              \
                              dot_##NAME,                                                         \
                              dot_bfloat16_##NAME,                                                \
                              squares_##NAME,                                                     \
                              squares_pairs_##NAME,                                               \
                              add_products_##NAME};

TRACMOD_TILES(baseline, , 4, 2, 4, 1, bfloat16)
#if defined(__x86_64__)
TRACMOD_TILES(avx2, __attribute__((target("avx2,fma"))), 8, 2, 8, 1, bfloat16)
TRACMOD_TILES(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 16, 4, 8,
              1, bfloat16)
TRACMOD_TILES(avx512_bf16,
              __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,fma"))), 16, 4,
              8, 2, bfloat16_pair)
#endif

bool supported(const Tiles& tiles) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&tiles == &k_avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (&tiles == &k_avx512) return avx512;
  if (&tiles == &k_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &tiles == &k_baseline;
}

// The best instruction set that the processor has, or the one that TRACMOD_INSTRUCTIONS names: to
// test it, or to reproduce the bits of a processor without the better ones.
const Tiles& choose() {
  constexpr const Tiles* kAll[] = {
#if defined(__x86_64__)
      &k_avx512_bf16, &k_avx512, &k_avx2,
#endif
      &k_baseline};
  const char* wanted = std::getenv("TRACMOD_INSTRUCTIONS");
  for (const Tiles* tiles : kAll) {
    if (supported(*tiles) && (wanted == nullptr || std::strcmp(wanted, tiles->name) == 0)) {
      return *tiles;
    }
  }
  throw std::invalid_argument(
      std::string("TRACMOD_INSTRUCTIONS: expected one of baseline, avx2, avx512, avx512_bf16 that "
                  "this processor supports, got ") +
      wanted);
}

}  // namespace

const Tiles& tiles() {
  static const Tiles& chosen = choose();
  return chosen;
}

}  // namespace tracmod::cpu

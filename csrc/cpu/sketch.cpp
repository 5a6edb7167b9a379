// Buckets of a count sketch:
//
//   hash[d] = step(row, first + d),  bucket[d] = position of hash[d],  sign[d] = bit 0 of hash[d]
//
// Work: one call computes up to 256 elements of one row in the calling thread. Operations: two
// 64-bit multiplications and a few shifts per element; they are the limit. One hash at a time costs
// about 8 ns per element, several times the addition that it is for. In vectors, which the compiler
// makes from the loop below, it takes 1 ns or less: AVX-512 multiplies 64-bit integers, AVX2 builds
// that product from 32-bit parts.
#include "cpu/sketch.h"

#include <cstring>

#include "cpu/tiles.h"
#include "random.h"

namespace tracmod::cpu {
namespace {

inline __attribute__((always_inline)) void fill(uint64_t row, int64_t first, int64_t columns,
                                                int64_t grid, uint32_t* buckets) {
  for (int64_t d = 0; d < columns; ++d) {
    const uint64_t hash = step(row, first + d);
    buckets[d] = static_cast<uint32_t>(2 * position_of(hash, grid) + (hash & 1));
  }
}

#define TRACMOD_SKETCH(NAME, TARGET)                                                  \
  TARGET void fill_##NAME(uint64_t row, int64_t first, int64_t columns, int64_t grid, \
                          uint32_t* buckets) {                                        \
    fill(row, first, columns, grid, buckets);                                         \
  }

TRACMOD_SKETCH(baseline, )
#if defined(__x86_64__)
TRACMOD_SKETCH(avx2, __attribute__((target("avx2"))))
TRACMOD_SKETCH(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

}  // namespace

void sketch_buckets(uint64_t row, int64_t first, int64_t columns, int64_t grid, uint32_t* buckets) {
#if defined(__x86_64__)
  if (std::strncmp(tiles().name, "avx512", 6) == 0) {  // or avx512_bf16
    return fill_avx512(row, first, columns, grid, buckets);
  }
  if (std::strcmp(tiles().name, "avx2") == 0) return fill_avx2(row, first, columns, grid, buckets);
#endif
  fill_baseline(row, first, columns, grid, buckets);
}

}  // namespace tracmod::cpu

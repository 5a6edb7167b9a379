// Where the elements of a row go in a count sketch (see random.h).
//
// A hash is two 64-bit multiplications and a few shifts. Taken one at a time they cost 8 ns an
// element, several times the addition that they are for; in vectors, which the compiler makes of
// the loop below, 1 ns or less: AVX-512 multiplies 64-bit integers, AVX2 does so by parts.
#include "cpu/sketch.h"

#include <cstring>

#include "cpu/tiles.h"
#include "random.h"

namespace tracmod::cpu {
namespace {

inline __attribute__((always_inline)) void fill(uint64_t row, int64_t first, int64_t columns,
                                                int64_t grid, uint32_t* places) {
  for (int64_t d = 0; d < columns; ++d) {
    const uint64_t hash = step(row, first + d);
    places[d] = static_cast<uint32_t>(2 * position_of(hash, grid) + (hash & 1));
  }
}

#define TRACMOD_SKETCH(NAME, TARGET)                                                  \
  TARGET void fill_##NAME(uint64_t row, int64_t first, int64_t columns, int64_t grid, \
                          uint32_t* places) {                                         \
    fill(row, first, columns, grid, places);                                          \
  }

TRACMOD_SKETCH(baseline, )
#if defined(__x86_64__)
TRACMOD_SKETCH(avx2, __attribute__((target("avx2"))))
TRACMOD_SKETCH(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

}  // namespace

void sketch_places(uint64_t row, int64_t first, int64_t columns, int64_t grid, uint32_t* places) {
#if defined(__x86_64__)
  if (std::strncmp(tiles().name, "avx512", 6) == 0) {  // avx512_bf16 too
    return fill_avx512(row, first, columns, grid, places);
  }
  if (std::strcmp(tiles().name, "avx2") == 0) return fill_avx2(row, first, columns, grid, places);
#endif
  fill_baseline(row, first, columns, grid, places);
}

}  // namespace tracmod::cpu

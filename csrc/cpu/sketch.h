// The buckets of a count sketch to which the elements of a row are added (random.h has the
// definition), computed with the instruction set that the processor has.
#pragma once

#include <cstdint>

namespace tracmod::cpu {

constexpr int64_t kSketchColumns = 256;  // columns whose buckets are computed at a time

// buckets[d] = 2 * (bucket of column first + d) + (1 if its sign is -1, else 0), for d < columns.
// `row` is the hash state of the row, step(stream, row number); `grid` is the number of buckets.
// Bucket and sign share one integer so that the caller's loop reads one array.
void sketch_buckets(uint64_t row, int64_t first, int64_t columns, int64_t grid, uint32_t* buckets);

}  // namespace tracmod::cpu

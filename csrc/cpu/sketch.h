// Where the elements of a row go in a count sketch, for the instruction set that the processor has.
#pragma once

#include <cstdint>

namespace tracmod::cpu {

constexpr int64_t kSketchColumns = 256;  // of a row whose places are made at a time

// places[d] = 2 * position + (1 where the sign is -1), of columns first ... first + columns - 1;
// `row` is the row's state, step(stream, its number).
void sketch_places(uint64_t row, int64_t first, int64_t columns, int64_t grid, uint32_t* places);

}  // namespace tracmod::cpu

// The scale of a quantized row from its largest magnitude, the same bits on the CPU and on every
// GPU.
#pragma once

#include <cfloat>

#include "random.h"

namespace tracmod {

// A code c stands for the number c * scale; the code of x is x * factor, rounded to an integer. If
// factor is 0, all codes of the row are 0.
struct RowScale {
  float scale, factor;
};

// scale = largest / 127 and factor = 127 / largest, each a single correctly rounded division.
//
// Rows whose largest magnitude is below 2^-118 are treated as zeros. At and above that bound scale
// and factor are normal numbers and a denormal x has code 0, so the result does not depend on
// whether the processor flushes denormals to zero. A row with NaN or infinity gets factor 0 and a
// scale that is NaN or infinite, which makes it visible.
TRACMOD_HOST_DEVICE inline RowScale row_scale(float largest) {
  constexpr float kSmallest = 0x1p-118f;
  const bool coded = largest >= kSmallest && largest <= FLT_MAX;
  return {largest < kSmallest ? 0.0f : largest / 127.0f, coded ? 127.0f / largest : 0.0f};
}

}  // namespace tracmod

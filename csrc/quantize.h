// A row's scale and factor from its largest magnitude, the same on the CPU and on every GPU.
#pragma once

#include <cfloat>

#include "random.h"

namespace tracmod {

// A code of 1 stands for `scale`; code = x * factor, rounded. Factor 0: the row's codes are 0.
struct RowScale {
  float scale, factor;
};

// Both are one correctly rounded division. From 2^-118 on they are normal numbers and denormal x
// have code 0: so it does not matter whether a processor takes denormals as zeros. NaN and infinity
// are told by the scale.
TRACMOD_HOST_DEVICE inline RowScale row_scale(float largest) {
  constexpr float kSmallest = 0x1p-118f;
  const bool coded = largest >= kSmallest && largest <= FLT_MAX;
  return {largest < kSmallest ? 0.0f : largest / 127.0f, coded ? 127.0f / largest : 0.0f};
}

}  // namespace tracmod

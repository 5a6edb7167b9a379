// The order of top_k_dot: better scores first, a lower index first among equals, NaN before all
// (in both directions, so that it is seen), a place not yet filled (index -1) after all.
#pragma once

#include <cstdint>

#include "random.h"

namespace tracmod {

TRACMOD_HOST_DEVICE inline bool ranks_before(bool largest, float score1, int64_t index1,
                                             float score2, int64_t index2) {
  if (index1 < 0 || index2 < 0) return index2 < 0 && index1 >= 0;
  const bool nan1 = score1 != score1, nan2 = score2 != score2;
  if (nan1 != nan2) return nan1;
  if (!nan1 && score1 != score2) return largest ? score1 > score2 : score1 < score2;
  return index1 < index2;
}

}  // namespace tracmod

// The total order of top_k_dot's rankings: better scores first, the lower index first among equal
// scores, NaN before every number (in both directions, so that it cannot be overlooked), entries
// that are not filled yet (index -1) last. Because the order is total, a ranking does not depend on
// the order in which scores arrive.
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

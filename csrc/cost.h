// Which of gradient_dot's two forms of a linear layer takes fewer multiply-adds.
//
//   token pairs         sum_{s,t} <g_s, g'_t> <x_s, x'_t>      n n' (I + O)
//   gradients formed    <G_i, G'_j>                            (n + n' + B B') I O
//
// n, n' are the tokens that are read in the two batches, so padding does not move the choice. The
// two forms differ by rounding alone.
#pragma once

#include <cstdint>

namespace tracmod {

inline bool token_pairs_are_cheaper(int64_t tokens1, int64_t tokens2, int64_t batch1,
                                    int64_t batch2, int64_t in, int64_t out) {
  const double pairs =
      static_cast<double>(tokens1) * static_cast<double>(tokens2) * static_cast<double>(in + out);
  const double formed = (static_cast<double>(tokens1 + tokens2) +
                         static_cast<double>(batch1) * static_cast<double>(batch2)) *
                        static_cast<double>(in) * static_cast<double>(out);
  return pairs <= formed;
}

}  // namespace tracmod

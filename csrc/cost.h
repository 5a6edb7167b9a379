// Which of gradient_dot's two forms of a linear layer takes less time, in multiply-adds.
//
//   token pairs         sum_{s,t} <g_s, g'_t> <x_s, x'_t>      n n' (I + O) / p
//   gradients formed    <G_i, G'_j>                            ((n + n') / p + 6 (B + B') + B B') I O
//
// n, n' are the tokens that are read in the two batches, so padding does not move the choice; p is
// 2 where bfloat16 are multiplied in pairs (formed numbers are float32), else 1; to start and store
// a formed number takes as long as 6 multiply-adds. The two forms differ by rounding alone.
#pragma once

#include <cstdint>

namespace tracmod {

inline bool token_pairs_are_cheaper(int64_t tokens1, int64_t tokens2, int64_t batch1,
                                    int64_t batch2, int64_t in, int64_t out, int64_t pair) {
  const auto n1 = static_cast<double>(tokens1), n2 = static_cast<double>(tokens2);
  const auto b1 = static_cast<double>(batch1), b2 = static_cast<double>(batch2);
  const auto i = static_cast<double>(in), o = static_cast<double>(out);
  const auto p = static_cast<double>(pair);
  return n1 * n2 * (i + o) / p <= ((n1 + n2) / p + 6 * (b1 + b2) + b1 * b2) * i * o;
}

}  // namespace tracmod

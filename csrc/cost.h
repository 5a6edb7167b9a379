// Cost model that chooses how gradient_dot computes a linear layer, counted in multiply-adds.
//
//   token pairs        sum_{s,t} <g_s, g'_t> <x_s, x'_t>    n n' (I + O) / p
//   formed gradients   <G_i, G'_j>                          ((n + n') / p + 6 (B + B') + B B') I O
//
// n and n' are the numbers of tokens read in the two batches, so padding does not change the
// choice. p is 2 where bfloat16 numbers are multiplied in pairs and 1 elsewhere; formed gradients
// are float32, so their B B' inner products do not profit from p. The 6 is a measured cost:
// starting and storing one number of a formed gradient takes as long as 6 multiply-adds. The two
// forms give results that differ by rounding only.
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

// Numbering of the tokens that are read. A token is read if its position is below the length of its
// example; read tokens are numbered 0, 1, ... through all examples of a batch, without padding, so
// that blocks of tokens can be cut regardless of where examples begin.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/bfloat16.h"
#include "kernels.h"

namespace tracmod::cpu {

inline int64_t length_of(const Gradients& gradients, int64_t example) {
  return gradients.lengths == nullptr ? gradients.tokens : gradients.lengths[example];
}

// Fills starts (B + 1,): starts[b] is the number of the first read token of example b, and
// starts[B] the total.
inline void count_tokens(const Gradients& gradients, int64_t* starts) {
  starts[0] = 0;
  for (int64_t b = 0; b < gradients.batch; ++b) {
    starts[b + 1] = starts[b] + length_of(gradients, b);
  }
}

inline int64_t total_tokens(const Gradients& gradients) {
  int64_t total = 0;
  for (int64_t b = 0; b < gradients.batch; ++b) total += length_of(gradients, b);
  return total;
}

// Calls use(n, row) for the read tokens n in [begin, end); `row` is the row of the token in the
// padded array (B * S, size).
template <class Use>
void for_tokens(const int64_t* starts, int64_t batch, int64_t tokens, int64_t begin, int64_t end,
                const Use& use) {
  int64_t b = std::upper_bound(starts, starts + batch + 1, begin) - starts - 1;
  for (int64_t n = begin; n < end; ++n) {
    while (n >= starts[b + 1]) ++b;
    use(n, b * tokens + n - starts[b]);
  }
}

// to[0, width) = [from (count), 1 if `ones` is 1, zeros]. The 1 is the input of the bias.
template <class T>
void widen(const T* from, int64_t count, int64_t ones, int64_t width, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
  for (int64_t i = count; i < count + ones; ++i) to[i] = 1.0f;
  for (int64_t i = count + ones; i < width; ++i) to[i] = 0.0f;
}

}  // namespace tracmod::cpu

// The tokens of a batch that are read (position below the example's length), counted through all
// examples, and their rows as padded float32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/bfloat16.h"
#include "kernels.h"

namespace tracmod::cpu {

inline int64_t length_of(const Gradients& gradients, int64_t example) {
  return gradients.lengths == nullptr ? gradients.tokens : gradients.lengths[example];
}

// starts (B+1,): the number of tokens read before each example.
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

// Calls use(n, row) for read tokens n in [begin, end); `row` is the token's place in (B*S, .).
template <class Use>
void for_tokens(const int64_t* starts, int64_t batch, int64_t tokens, int64_t begin, int64_t end,
                const Use& use) {
  int64_t b = std::upper_bound(starts, starts + batch + 1, begin) - starts - 1;
  for (int64_t n = begin; n < end; ++n) {
    while (n >= starts[b + 1]) ++b;
    use(n, b * tokens + n - starts[b]);
  }
}

// to[0, width) = [from, ones..., zeros...]; `ones` is 1 where a bias has its column.
template <class T>
void widen(const T* from, int64_t count, int64_t ones, int64_t width, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
  for (int64_t i = count; i < count + ones; ++i) to[i] = 1.0f;
  for (int64_t i = count + ones; i < width; ++i) to[i] = 0.0f;
}

}  // namespace tracmod::cpu

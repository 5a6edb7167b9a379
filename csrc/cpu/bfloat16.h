// bfloat16 on the CPU. A bfloat16 is the upper half of a float32: the same sign and exponent, and 7
// instead of 23 bits of the significand, so widening is a shift by 16 bits and is exact.
#pragma once

#include <cstdint>
#include <cstring>

namespace tracmod::cpu {

struct bfloat16 {
  uint16_t bits;
};

// Two neighbouring numbers in 32 bits, the operand of the processor's bfloat16 dot product
// (vdpbf16ps).
struct bfloat16_pair {
  bfloat16 first, second;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace tracmod::cpu

// bfloat16 on the CPU: the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace tracmod::cpu {

struct bfloat16 {
  uint16_t bits;
};

// Two neighbours, as the processor's bfloat16 dot products take them.
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

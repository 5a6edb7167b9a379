// The instructions of csrc/cuda/mma.cuh on the CPU. emulator.cpp has their bodies.
#pragma once

#include <cuda_runtime.h>

namespace tracmod::cuda {

inline char* dynamic_shared() { return emu::dynamic_shared(); }

namespace host {

// The operand registers of one lane.
struct Operands {
  const uint32_t *a, *b;
};

inline void multiply(emu::Operation operation, float (&d)[4], const uint32_t* a,
                     const uint32_t* b) {
  const Operands operands{a, b};
  emu::warp_operation(operation, emu::kAllLanes, &operands, d, 0, 0, {"mma.cuh", 0});
}

}  // namespace host

inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply(emu::Operation::multiply_bf16, d, a, b);
}

inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply(emu::Operation::multiply_tf32, d, a, b);
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isfinite(value) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emu::warp_operation(emu::Operation::load, emu::kAllLanes, row, to, 0, 0, {"mma.cuh", 0});
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  emu::warp_operation(emu::Operation::load_transposed, emu::kAllLanes, row, to, 0, 0,
                      {"mma.cuh", 0});
}

inline void copy_16_later(void* to, const void* from, int bytes) {
  emu::copy_later(to, from, bytes, 16);
}
inline void copy_4_later(void* to, const void* from, int bytes) {
  emu::copy_later(to, from, bytes, 4);
}
inline void commit_copies() { emu::commit_copies(); }

template <int groups>
void wait_copies() {
  emu::wait_copies(groups);
}

}  // namespace tracmod::cuda

// The tensor cores' and the copy unit's instructions (compute capability 8.0 and later), a warp at
// a time. Under TRACMOD_EMULATE the same functions run on the host (tests/support/cuda_emulation).
//
// Which element a register of lane l holds, with r = l / 4 and t = l % 4; A is m x k, B is k x n, C
// and D are m x n. A register of bfloat16 holds the two neighbours along k, the lower one first.
//
//             multiply_bf16  m16 n8 k16      multiply_tf32  m16 n8 k8     both
//   a[0]      A[r    ][2t, 2t + 1]           A[r    ][t]                  d[0] D[r    ][2t]
//   a[1]      A[r + 8][2t, 2t + 1]           A[r + 8][t]                  d[1] D[r    ][2t + 1]
//   a[2]      A[r    ][2t + 8, 2t + 9]       A[r    ][t + 4]              d[2] D[r + 8][2t]
//   a[3]      A[r + 8][2t + 8, 2t + 9]       A[r + 8][t + 4]              d[3] D[r + 8][2t + 1]
//   b[0]      B[2t, 2t + 1][r]               B[t    ][r]
//   b[1]      B[2t + 8, 2t + 9][r]           B[t + 4][r]
//
// In bytes the two are alike where k runs along a row: register i of A is word t of 16 bytes of row
// r (+ 8 for odd i), the second 16 bytes for i >= 2; B the same with its columns as rows. So one
// load_matrices serves both.
//
// The sums inside an instruction are float32 and round towards zero: a long chain of them drifts.
// Add them up outside every so often; float32 operands (multiply_float) add up outside each time.
#pragma once

#include "cuda/common.cuh"

#ifdef TRACMOD_EMULATE
#include "mma_host.h"
#endif

namespace tracmod::cuda {

#ifndef TRACMOD_EMULATE

__device__ inline unsigned shared_address(const void* memory) {
  return static_cast<unsigned>(__cvta_generic_to_shared(memory));
}

// The block's dynamic shared memory.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// d += a b
__device__ inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest number with 10 bits behind the leading one.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

// Four 8 x 16-byte matrices: lane l gives the address (16-byte aligned) of row l % 8 of matrix
// l / 8 and gets word l % 4 of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for 8 x 8 matrices of 16-bit values, transposed: lane l gets rows 2 (l % 4) and the next
// of column l / 4.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies `bytes` (0 to 16) to shared memory and fills up with zeros to 16 (4 for the second),
// later: commit_copies closes a group, wait_copies<n> waits until at most n of this thread's groups
// are under way; others see the data after a barrier. Addresses are aligned to 16 (4),
// even at 0 bytes.
__device__ inline void copy_16_later(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ inline void copy_4_later(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int groups>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

#endif

// value = high + low to 22 bits; infinite values become NaN.
__device__ inline void split(float value, uint32_t& high, uint32_t& low) {
  high = to_tf32(value);
  low = to_tf32(value - __uint_as_float(high));
}

template <int count>
__device__ inline void split(const uint32_t (&values)[count], uint32_t (&high)[count],
                             uint32_t (&low)[count]) {
  for (int i = 0; i < count; ++i) split(__uint_as_float(values[i]), high[i], low[i]);
}

// d += a b for float32 a and b that were split: products to 22 bits (low low is left out), float32
// sums rounded to nearest.
__device__ inline void multiply_float(float (&d)[4], const uint32_t (&a_high)[4],
                                      const uint32_t (&a_low)[4], const uint32_t (&b_high)[2],
                                      const uint32_t (&b_low)[2]) {
  float sum[4] = {};
  multiply_tf32(sum, a_low, b_high);
  multiply_tf32(sum, a_high, b_low);
  multiply_tf32(sum, a_high, b_high);
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

}  // namespace tracmod::cuda

// Instructions of the tensor cores and of the asynchronous copy unit (compute capability 8.0 and
// later), each executed by a whole warp. With TRACMOD_EMULATE defined, the same functions run on
// the host (tests/support/cuda_emulation).
//
// The tables show which element each register of lane l holds, with r = l / 4 and t = l % 4; A has
// m x k elements, B k x n, C and D m x n. A register of bfloat16 holds two neighbours along k, the
// first in its lower half.
//
//             multiply_bf16  m16 n8 k16      multiply_tf32  m16 n8 k8     both
//   a[0]      A[r    ][2t, 2t + 1]           A[r    ][t]                  d[0] D[r    ][2t]
//   a[1]      A[r + 8][2t, 2t + 1]           A[r + 8][t]                  d[1] D[r    ][2t + 1]
//   a[2]      A[r    ][2t + 8, 2t + 9]       A[r    ][t + 4]              d[2] D[r + 8][2t]
//   a[3]      A[r + 8][2t + 8, 2t + 9]       A[r + 8][t + 4]              d[3] D[r + 8][2t + 1]
//   b[0]      B[2t, 2t + 1][r]               B[t    ][r]
//   b[1]      B[2t + 8, 2t + 9][r]           B[t + 4][r]
//
// Counted in bytes both layouts are the same if k runs along the rows in memory: register i of A is
// word t of a 16-byte part of row r (r + 8 for odd i), of the second part for i >= 2. B is the same
// with its columns as rows. Therefore load_matrices serves both types.
//
// Trap: the tensor cores add in float32 but round towards zero, so a long chain of additions drifts
// towards zero. Callers must end such chains and add them up with ordinary float32 additions;
// multiply_float does so after every instruction.
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

// The dynamic shared memory of the block.
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

// Rounds to tf32: 8 bits of exponent and 10 bits of significand behind the leading one.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

// Loads four matrices of 8 rows x 16 bytes. Lane l passes the address (16-byte aligned) of row l %
// 8 of matrix l / 8 and receives word l % 4 of row l / 4 of each matrix.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for 8 x 8 matrices of 16-bit values that are transposed: lane l receives rows 2 (l % 4)
// and 2 (l % 4) + 1 of column l / 4.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Asynchronous copies to shared memory (cp.async): `bytes` bytes (0 to 16, or 0 to 4), filled up
// with zeros to 16 (or 4). commit_copies closes a group of copies; wait_copies<n> waits until at
// most n of this thread's groups are unfinished. Other threads see the data only after a barrier as
// well. Both addresses must be aligned to 16 (or 4) even if no byte is copied.
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

// Splits a float32 into two tf32 numbers, value = high + low to 22 bits. An infinite value gives
// NaN (infinity minus infinity).
__device__ inline void split(float value, uint32_t& high, uint32_t& low) {
  high = to_tf32(value);
  low = to_tf32(value - __uint_as_float(high));
}

template <int count>
__device__ inline void split(const uint32_t (&values)[count], uint32_t (&high)[count],
                             uint32_t (&low)[count]) {
  for (int i = 0; i < count; ++i) split(__uint_as_float(values[i]), high[i], low[i]);
}

// d += a b for float32 a and b that were split. Of the four products low * low is left out, which
// is below the 22 bits. The small products are added first; d is added outside of the tensor cores
// and so rounds to nearest.
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

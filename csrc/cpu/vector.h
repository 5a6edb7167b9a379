// Vectors of W floats, written with the vector types of GCC and Clang.
//
// The kernels are compiled several times in one file, once per instruction set, by functions with a
// `target` attribute. Every function here must be inlined into those: a copy that is not inlined
// would be compiled for one instruction set and might be called from code for another.
#pragma once

#include <cstdint>

#include "cpu/bfloat16.h"

#define TRACMOD_INLINE inline __attribute__((always_inline))

namespace tracmod::cpu {

// Type and Bits are values in registers; the Loose types and Half are for memory access at any
// address (aligned to a number, not to a vector) that may alias other types.
template <int W>
struct Vector {
  typedef float Type __attribute__((vector_size(W * 4)));
  typedef float Loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(W * 4)));
  typedef uint32_t LooseBits __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint16_t Half __attribute__((vector_size(W * 2), aligned(2), may_alias));
};

// The bits of W floats, or of W bfloat16 widened to float32.
template <int W>
TRACMOD_INLINE typename Vector<W>::Bits load_bits(const float* from) {
  return *reinterpret_cast<const typename Vector<W>::LooseBits*>(from);
}

template <int W>
TRACMOD_INLINE typename Vector<W>::Bits load_bits(const bfloat16* from) {
  const auto half = *reinterpret_cast<const typename Vector<W>::Half*>(from);
  return __builtin_convertvector(half, typename Vector<W>::Bits) << 16;
}

template <int W, class T>
TRACMOD_INLINE typename Vector<W>::Type load(const T* from) {
  return (typename Vector<W>::Type)load_bits<W>(from);
}

// sum += a.first * b.first + a.second * b.second for the pair of bfloat16 in every lane, on
// processors with AVX512-BF16. This is inline assembly because the compiler's vector types cannot
// express a product of pairs.
template <class V>
TRACMOD_INLINE void add_pairs(V& sum, const V& a, const V& b) {
#if defined(__x86_64__)
  V in_register = sum;  // without this copy the address of `sum` is taken and sums go to memory
  asm("vdpbf16ps %2, %1, %0" : "+v"(in_register) : "v"(a), "v"(b));
  sum = in_register;
#endif
}

}  // namespace tracmod::cpu

// Vectors of W floats in the compiler's own types, for functions that a `target` attribute compiles
// for one instruction set: everything here is inlined into them, so nothing of it crosses over.
#pragma once

#include <cstdint>

#include "cpu/bfloat16.h"

#define TRACMOD_INLINE inline __attribute__((always_inline))

namespace tracmod::cpu {

// W floats; the loose types may lie at any address.
template <int W>
struct Vector {
  typedef float Type __attribute__((vector_size(W * 4)));
  typedef float Loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(W * 4)));
  typedef uint32_t LooseBits __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint16_t Half __attribute__((vector_size(W * 2), aligned(2), may_alias));
};

// W floats as their bits.
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

// sum += both products of a pair of bfloat16 in every lane, for processors that have it. The
// compiler has no vector type for pairs.
template <class V>
TRACMOD_INLINE void add_pairs(V& sum, const V& a, const V& b) {
#if defined(__x86_64__)
  V in_register = sum;  // the address of `sum` is never taken: sums stay in registers
  asm("vdpbf16ps %2, %1, %0" : "+v"(in_register) : "v"(a), "v"(b));
  sum = in_register;
#endif
}

}  // namespace tracmod::cpu

// The entries of every projection: a stateless function of (seed, key, column, row), the same
// integers on the CPU and on every GPU.
//
//   mix(z)            64-bit finaliser, variant 13 of Stafford's mixers (as in splitmix64, public
//                     domain): every output bit depends on every input bit
//   step(h, n)        mix(h + GOLDEN * (n + 1)): n-th output of the generator splitmix64 started
//                     at h; distinct n give distinct results
//   stream            step(mix(seed), key)
//   dense signs       word (column, block) = step(step(stream, column), block); bit r of it is the
//                     sign of row 64 * block + r: set is -1, clear is +1
//   sparse column     h = step(stream, column): row = ((h >> 32) * rows) >> 32, sign = bit 0 of h
//                     (set is -1)
//   sketched element  h = step(step(stream, row), d): position and sign as for a sparse column
//
// Nothing here depends on how many rows or columns a projection has, so a larger dense projection
// has a smaller one as its first rows.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TRACMOD_HOST_DEVICE __host__ __device__
#else
#define TRACMOD_HOST_DEVICE
#endif

namespace tracmod {

TRACMOD_HOST_DEVICE inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

TRACMOD_HOST_DEVICE inline uint64_t step(uint64_t state, int64_t n) {
  return mix(state + 0x9e3779b97f4a7c15ULL * (static_cast<uint64_t>(n) + 1));
}

TRACMOD_HOST_DEVICE inline uint64_t stream_of(uint64_t seed, uint64_t key) {
  return step(mix(seed), static_cast<int64_t>(key));
}

// 64 dense signs: rows 64 * block ... 64 * block + 63 of one column.
TRACMOD_HOST_DEVICE inline uint64_t sign_word(uint64_t stream, int64_t column, int64_t block) {
  return step(step(stream, column), block);
}

TRACMOD_HOST_DEVICE inline float sign_of_bit(uint64_t word, int bit) {
  return (word >> bit) & 1 ? -1.0f : 1.0f;
}

// The hash of which a sketched element's position and sign are taken.
TRACMOD_HOST_DEVICE inline uint64_t element_hash(uint64_t stream, int64_t row, int64_t d) {
  return step(step(stream, row), d);
}

// Position in [0, size) and sign taken from one hash; size < 2^31.
TRACMOD_HOST_DEVICE inline int64_t position_of(uint64_t hash, int64_t size) {
  return static_cast<int64_t>(((hash >> 32) * static_cast<uint64_t>(size)) >> 32);
}

TRACMOD_HOST_DEVICE inline float sign_of(uint64_t hash) { return sign_of_bit(hash, 0); }

// The one entry of a sparse column that is not zero.
struct SparseEntry {
  int64_t row;
  float sign;
};

TRACMOD_HOST_DEVICE inline SparseEntry sparse_entry(uint64_t stream, int64_t column, int64_t k) {
  const uint64_t hash = step(stream, column);
  return {position_of(hash, k), sign_of(hash)};
}

}  // namespace tracmod

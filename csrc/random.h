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
//   position          of a hash h in [0, size): ((h >> 32) * size) >> 32
//   sparse column     16 neighbours share h = step(stream, column / 16); with l = column % 16: row =
//                     (position of h in [0, rows) + l) mod rows, sign = bit l of h (set is -1).
//                     Fewer than 16 rows: h = step(stream, column), row = position, sign = bit 0
//   sketched element  h = step(step(stream, row), d): position, and bit 0 as the sign
//
// No hash depends on how many rows or columns a projection has, so a larger dense projection has a
// smaller one as its first rows.
//
// Sparse columns that share a hash are as good as independent ones. With one entry a column,
//   <R x, R y> - <x, y> = sum over i < j in one row of s_i s_j (x_i y_j + x_j y_i),
// and as the signs of all columns are independent, fair and independent of the rows, its mean is 0
// and its variance sum_{i < j} P(i and j in one row) (x_i y_j + x_j y_i)^2. That probability is
// 1 / rows for columns with hashes of their own and 0 for two of a group (rows >= 16: their rows
// differ), so the variance is at most that of independent columns. With fewer rows two of a group
// might always meet, so there every column has its own hash.
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

// Columns of a sparse projection that share a hash, if it has as many rows.
constexpr int64_t kSparseGroup = 16;

// Hash of the sparse columns 16 * group ... 16 * group + 15.
TRACMOD_HOST_DEVICE inline uint64_t group_hash(uint64_t stream, int64_t group) {
  return step(stream, group);
}

// The one entry of a sparse column that is not zero.
struct SparseEntry {
  int64_t row;
  float sign;
};

TRACMOD_HOST_DEVICE inline SparseEntry sparse_entry(uint64_t stream, int64_t column, int64_t k) {
  if (k < kSparseGroup) {
    const uint64_t hash = step(stream, column);
    return {position_of(hash, k), sign_of(hash)};
  }
  const uint64_t hash = group_hash(stream, column / kSparseGroup);
  const int64_t lane = column % kSparseGroup, row = position_of(hash, k) + lane;
  return {row < k ? row : row - k, sign_of_bit(hash, static_cast<int>(lane))};
}

}  // namespace tracmod

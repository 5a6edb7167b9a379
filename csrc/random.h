// The entries of every random projection as a stateless function of (seed, key, column, row). The
// CPU and every GPU evaluate the same integer operations, so all devices use exactly the same
// matrices, and no matrix needs to be stored or sent.
//
//   mix(z)           64-bit finalizer: variant 13 of Stafford's mixers, as in splitmix64 (public
//                    domain). Every output bit depends on every input bit, and mix is a bijection.
//   step(h, n)       mix(h + GOLDEN * (n + 1)), the n-th output of a splitmix64 generator started
//                    at h. GOLDEN = 2^64 / golden ratio is odd, so distinct n give distinct
//                    results.
//   stream           step(mix(seed), key)
//   dense signs      word (column, block) = step(step(stream, column), block). Bit r of the word is
//                    the sign of row 64 * block + r: a set bit is -1, a clear bit +1. One hash thus
//                    gives the signs of 64 rows.
//   position         maps a hash h to [0, size) without a division: ((h >> 32) * size) >> 32
//   sparse column    16 neighbouring columns share h = step(stream, column / 16). With lane
//                    l = column % 16, the column's only non-zero entry is in row
//                    (position of h in [0, rows) + l) mod rows; bit l of h is its sign. The
//                    position uses the upper 32 bits, the signs the lower ones, so they are
//                    independent. If there are fewer than 16 rows, every column has its own hash,
//                    h = step(stream, column): row = position, sign = bit 0.
//   formed sketch    in the gradient of a linear layer, the elements (o, i) of 16 neighbouring columns
//                    share h = step(step(stream, o), i / 16); the bucket of an element is
//                    (position of h in [0, size) + i % 16) mod size. Its sign is bit 0 of h times
//                    that of column i, bit 0 of step(stream of x, i). If there are fewer than 16
//                    buckets, every element has its own h = step(step(stream, o), i).
//   count sketch     element (row, d) has h = step(step(stream, row), d); its bucket is the
//                    position of h, its sign bit 0
//
// No hash depends on the number of rows or columns of the projection, so the first rows of a large
// dense projection are a smaller one.
//
// Why sparse columns may share a hash: it turns 16 columns into one vector load, one sign flip and
// one vector addition (cpu/signs.cpp), and it does not increase the error. With one entry per
// column,
//
//   <R x, R y> - <x, y> = sum over i < j in the same row of s_i s_j (x_i y_j + x_j y_i).
//
// The signs of all columns are fair, independent of each other and of the rows, so the mean is 0
// and the variance is sum_{i < j} P(i and j share a row) (x_i y_j + x_j y_i)^2. That probability is
// 1 / rows for columns with different hashes, and 0 for two columns of a group, whose rows differ
// if there are at least 16 rows. The variance is therefore at most that of independent columns.
// With fewer than 16 rows two columns of a group could always share a row, so there each column has
// its own hash.
//
// The same holds for the formed sketch with one exception. Two groups of the same columns share
// their columns' signs, so that their 16 pairs of elements with the same column collide together
// (with probability 1 / size) and add up instead of averaging out. All other pairs of elements have
// independent products of signs. The variance of <Sketch G, Sketch G'> is (|G|^2 |G'|^2 +
// <G, G'>^2) / size with independent elements; these pairs add at most the sum over groups c of the
// same of G_c and G'_c, the columns of one group, so at most twice that in total, and about 1 / (the
// number of groups) of it where no group has most of the gradient.
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

// The hash that gives the bucket and the sign of element (row, d) in a count sketch.
TRACMOD_HOST_DEVICE inline uint64_t element_hash(uint64_t stream, int64_t row, int64_t d) {
  return step(step(stream, row), d);
}

// Maps the upper half of a hash to [0, size); size < 2^31.
TRACMOD_HOST_DEVICE inline int64_t position_of(uint64_t hash, int64_t size) {
  return static_cast<int64_t>(((hash >> 32) * static_cast<uint64_t>(size)) >> 32);
}

TRACMOD_HOST_DEVICE inline float sign_of(uint64_t hash) { return sign_of_bit(hash, 0); }

// Number of neighbouring columns that share a hash, of a sparse projection and a formed sketch.
constexpr int64_t kSparseGroup = 16;

// Hash shared by the sparse columns 16 * group ... 16 * group + 15.
TRACMOD_HOST_DEVICE inline uint64_t group_hash(uint64_t stream, int64_t group) {
  return step(stream, group);
}

// The only non-zero entry of a sparse column.
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

// The formed sketch: the number of the hash of a column in its row, and how far behind the position
// of the hash its element goes.
TRACMOD_HOST_DEVICE inline int64_t formed_hash_number(int64_t column, int64_t size) {
  return size < kSparseGroup ? column : column / kSparseGroup;
}

TRACMOD_HOST_DEVICE inline int64_t formed_lane(int64_t column, int64_t size) {
  return size < kSparseGroup ? 0 : column % kSparseGroup;
}

// The key of the hashes of a gradient's rows that R_out has reduced.
TRACMOD_HOST_DEVICE inline uint64_t reduced_key(uint64_t input_key) { return ~input_key; }

}  // namespace tracmod

// Scores of Q queries and N training rows over C checkpoints,
//
//   score[q, n] = sum_c w_c <q_c, n_c>,   cosine: w_c <q_c, n_c> / (|q_c| |n_c|)
//
// and from them, per query, the k largest and the k smallest scores and the sum per group. The
// score matrix (Q, N) is never in device memory. Training rows are taken in waves; for each wave
// run
//
//   row_scales    (cosine only) 1 / |n_c|; a warp owns one row.
//   score_tiles   A block owns 128 queries x 256 training rows (128 for float32) and sums the terms
//                 of all checkpoints in registers. Then the tile goes through shared memory: one
//                 thread per query sums it by group into `partials`, another one appends the scores
//                 that are not worse than the last entry of the query's rankings to the query's
//                 candidates. Nothing else is written to device memory.
//   merge         A block owns one ranking of one query. The ranking is always sorted; candidates
//                 that pass are inserted, up to 256 at a time, each at the position given by its
//                 rank.
//   add_partials  A thread owns the sum of one query and group, and adds the tiles in order.
//
// Repeatability: candidates arrive in any order, but the order of the ranking is total (ranking.h),
// so its result does not depend on theirs. A wave has as many training rows as a query's candidate
// list has entries, so no candidate can be lost. Group sums add float32 scores in float64. A
// float64 has 29 more bits than a float32, so the additions are exact unless the magnitudes of a
// query's scores span more than 2^(29 - log2 N); exact sums are the same however the training rows
// are cut into calls.
//
// Accuracy: float32 rows take three tf32 products with float32 sums. bfloat16 rows take one product
// whose sums stay in the tensor cores and round towards zero there: a score is too small by up to
// about 2^-25 K / 16 of itself, far below the rounding of the rows.
//
// Bytes: the training rows, C N K (4 or 2), once per 24 x 128 queries; candidates, about
// 16 Q k ln(N / wave); through L2 C Q N K / 64 times 4 for float32, 3/4 of that times 2 for
// bfloat16. Operations: 2 C Q N K, in tf32 three times as many. Limits on an H200 (4.8 TB/s, 989
// TFLOP/s of bfloat16, half of that in tf32): the tensor cores, of which mma.sync reaches about
// 60%, and L2, from which tiles of 128 x 256 read a byte per 85 operations. wgmma with copies
// shared by a cluster would raise both limits. This file has not run on a GPU yet.
#include <algorithm>

#include "cuda/product.cuh"
#include "ranking.h"
#include "scratch.h"

namespace tracmod::cuda {
namespace {

constexpr char kOp[] = "top_k_dot";
constexpr int kThreads = kProductThreads;
constexpr int kWarp = 32;
constexpr int64_t kWaveBytes = int64_t{1} << 28;   // scratch for candidates and partials
constexpr int64_t kWaveTrains = int64_t{1} << 17;  // most training rows of a wave
constexpr int64_t kBand = 24;                      // most tiles of queries in a band
constexpr int kMaxColumns = 256;                   // most columns (training rows) of a tile
constexpr int kTermsPerLaunch = 32;

// A tile has 32 kN training rows. Products of bfloat16 need fewer registers than split float32, so
// their tiles can be wider.
template <class T>
constexpr int kN = sizeof(T) == 2 ? 8 : 4;
template <class T>
constexpr int kColumns = 32 * kN<T>;
template <class T>
constexpr int kTileBytes = kStages * (kSide + kColumns<T>)*kRowBytes;
template <class T>
constexpr int kPadded = kColumns<T> + 1;  // puts a column of scores into different banks

// The rows and the weight of one checkpoint.
struct Term {
  const void *queries, *trains;
  float weight;
};

struct Terms {
  Term terms[kTermsPerLaunch];
  int count;
};

struct alignas(8) Candidate {
  float score;
  int row;  // in the wave
};

// Everything that the kernels of a wave read and write.
struct Wave {
  int64_t queries, trains, width, checkpoints;  // `trains` counts the rows of this wave
  int64_t first;                                // number of the wave's first row in this call
  int unit;                                     // of copies, see copy_unit
  unsigned query_tiles, band;                   // tiles of 128 queries; of those, tiles per band
  const Term* terms;                            // (C,)
  const float *query_scales, *train_scales;     // (C, Q), (C, capacity); null unless cosine
  int64_t capacity;                             // most training rows of a wave
  Candidate* candidates;                        // (Q, capacity)
  int* counts;                                  // (Q,) number of candidates
  const int64_t* groups;                        // of the wave's rows, or null
  int64_t num_groups;
  int tile_columns;
  double* partials;  // (tiles, G, Q) group sums of one tile
  Ranking proponents, opponents;
};

// Stores the pointers and weights of the checkpoints on the device. They travel as kernel
// arguments, so no copy from host memory has to be kept alive or waited for.
__global__ void store_terms(Terms terms, Term* to) {
  if (static_cast<int>(threadIdx.x) < terms.count) to[threadIdx.x] = terms.terms[threadIdx.x];
}

// scales[row] = 1 / norm, the factor of the row for cosine; a warp owns one row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_scales(const T* rows, int64_t count, int64_t width, float* scales) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= count) return;
  double square = 0.0;
  for (int64_t d = threadIdx.x % kWarp; d < width; d += kWarp) {
    const double value = to_float(rows[row * width + d]);
    square += value * value;
  }
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, lane);
  }
  if (threadIdx.x % kWarp != 0) return;
  constexpr double kLargest = 3.4028234663852886e38;
  // The products of a row of zeros are 0 already, so any finite factor will do.
  const double scale = square == 0.0 ? 1.0 : 1.0 / sqrt(square);
  scales[row] = static_cast<float>(scale > kLargest ? kLargest : scale);
}

// The tile of a block: its first query, its first row of the wave, and the number of rows.
struct TilePosition {
  int64_t q;
  int n, columns;
};

// Order of the tiles: query tiles are grouped into bands, and in a band all query tiles of the same
// training rows follow each other. Blocks that run at the same time thus share their training rows
// in L2.
template <class T>
__device__ TilePosition tile_position(const Wave& wave) {
  const auto tiles = static_cast<unsigned>(ceil_div(wave.trains, kColumns<T>));
  const unsigned band = blockIdx.x / (wave.band * tiles), at = blockIdx.x % (wave.band * tiles);
  const unsigned left = wave.query_tiles - band * wave.band;
  const unsigned height = left < wave.band ? left : wave.band;
  const int n = static_cast<int>(at / height) * kColumns<T>;
  const int64_t rest = wave.trains - n;
  return {int64_t{band * wave.band + at % height} * kSide, n,
          static_cast<int>(rest < kColumns<T> ? rest : kColumns<T>)};
}

// Factors of a checkpoint's products: that of a row (query) and that of a column (training row,
// times the weight of the checkpoint) of the tile.
struct Scales {
  float row, column;
};

// Those of checkpoint c for the row and the column with the number of this thread.
__device__ Scales scales_of(const Wave& wave, int64_t c, const TilePosition& tile) {
  const int64_t query = tile.q + threadIdx.x;
  const int train = tile.n + static_cast<int>(threadIdx.x);
  const bool row = wave.query_scales != nullptr && threadIdx.x < kSide && query < wave.queries;
  const bool column = wave.train_scales != nullptr && train < wave.trains;
  const float scale = column ? wave.train_scales[c * wave.capacity + train] : 1.0f;
  return {row ? wave.query_scales[c * wave.queries + query] : 1.0f, wave.terms[c].weight * scale};
}

template <class T>
__device__ MatrixSide<T> query_side(const Wave& wave, int64_t c, int64_t q) {
  const T* queries = static_cast<const T*>(wave.terms[c].queries);
  return {queries + q * wave.width, wave.width, wave.queries - q};
}

template <class T>
__device__ MatrixSide<T> train_side(const Wave& wave, int64_t c, int64_t n) {
  const T* trains = static_cast<const T*>(wave.terms[c].trains);
  return {trains + (wave.first + n) * wave.width, wave.width, wave.trains - n};
}

// The factors of all rows and columns of the tile, in shared memory. No barrier is needed before
// they are overwritten, because the product in between ends with one.
struct TileScales {
  float row[kSide], column[kMaxColumns];

  __device__ void set(const Scales& scales) {
    if (threadIdx.x < kSide) row[threadIdx.x] = scales.row;
    column[threadIdx.x] = scales.column;
    __syncthreads();
  }
};

// Computes the scores of the block's tile for float32 rows: each chain of products (product.cuh) is
// scaled and added to the scores.
__device__ void add_terms(const Wave& wave, const TilePosition& tile, char* memory,
                          TileScales& scales, TileSums<4>& scores, float) {
  for (int64_t c = 0; c < wave.checkpoints; ++c) {
    scales.set(scales_of(wave, c, tile));
    multiply_rows<float>(query_side<float>(wave, c, tile.q), train_side<float>(wave, c, tile.n),
                         wave.width, wave.unit, memory, [&](const TileSums<>& sums) {
                           for_tile([&](int m, int n, int i) {
                             scores[m][n][i] += sums[m][n][i] * scales.row[tile_row_of(m, i)] *
                                                scales.column[tile_column_of(n, i)];
                           });
                         });
  }
}

// The same for bfloat16 rows. The registers hold a single tile of sums, so products of the next
// checkpoint must be added directly to the scores. Therefore the scores are kept divided by the
// factors of the checkpoint that is being added: before each checkpoint they are multiplied by the
// quotient of the previous and the new factors, and at the end by the last ones. A checkpoint of
// weight 0, whose factors cannot be divided by, is skipped.
__device__ void add_terms(const Wave& wave, const TilePosition& tile, char* memory,
                          TileScales& scales, TileSums<8>& scores, __nv_bfloat16) {
  const auto scale = [&] {
    for_tile<8>([&](int m, int n, int i) {
      scores[m][n][i] *= scales.row[tile_row_of(m, i)];
      scores[m][n][i] *= scales.column[tile_column_of<8>(n, i)];
    });
  };
  bool has_scores = false;
  Scales previous{1.0f, 1.0f};
  for (int64_t c = 0; c < wave.checkpoints; ++c) {
    if (wave.terms[c].weight == 0.0f) continue;
    const Scales current = scales_of(wave, c, tile);
    if (has_scores) {
      scales.set({previous.row / current.row, previous.column / current.column});
      scale();
    }
    has_scores = true;
    previous = current;
    add_rows<__nv_bfloat16>(query_side<__nv_bfloat16>(wave, c, tile.q),
                            train_side<__nv_bfloat16>(wave, c, tile.n), wave.width, wave.unit,
                            memory, scores);
  }
  scales.set(previous);
  scale();
}

// The score computed without tensor cores. Splitting an infinite float32 for the tensor cores gives
// NaN, so a score that came out as NaN is computed again this way: it may be infinite.
__device__ float plain_score(const Wave& wave, int64_t q, int64_t n) {
  float score = 0.0f;
  for (int64_t c = 0; c < wave.checkpoints; ++c) {
    const float* query = static_cast<const float*>(wave.terms[c].queries) + q * wave.width;
    const float* train =
        static_cast<const float*>(wave.terms[c].trains) + (wave.first + n) * wave.width;
    float sum = 0.0f;
    for (int64_t d = 0; d < wave.width; ++d) sum += query[d] * train[d];
    if (wave.query_scales != nullptr) {
      sum *= wave.query_scales[c * wave.queries + q] * wave.train_scales[c * wave.capacity + n];
    }
    score += wave.terms[c].weight * sum;
  }
  return score;
}

// Replaces the scores of the tile that are NaN by plain_score.
__device__ void recompute_nan_scores(const Wave& wave, int64_t q, int64_t n, int columns,
                                     float* table) {
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kSide * columns; at += kThreads) {
    const int row = at / columns, column = at % columns;
    float& score = table[row * kPadded<float> + column];
    if (score != score && q + row < wave.queries) {
      score = plain_score(wave, q + row, n + column) + 0.0f;
    }
  }
}

// The columns of a tile, sorted by group.
struct GroupOrder {
  int column[kMaxColumns];
  int64_t group[kMaxColumns];
};

// Sorts the columns by group: a thread counts the columns that come before its own, which is its
// rank. Returns true if any group is outside [0, G). Called by the whole block.
__device__ bool sort_by_group(const Wave& wave, int64_t n, int columns, GroupOrder& order) {
  __shared__ int64_t groups[kMaxColumns];
  const int column = static_cast<int>(threadIdx.x);
  if (column < columns) groups[column] = wave.groups[n + column];
  __syncthreads();
  bool invalid = false;
  if (column < columns) {
    const int64_t group = groups[column];
    invalid = group < 0 || group >= wave.num_groups;
    int rank = 0;
    for (int i = 0; i < columns; ++i) {
      rank += groups[i] < group || (groups[i] == group && i < column);
    }
    order.column[rank] = column;
    order.group[rank] = group;
  }
  return __syncthreads_or(invalid) != 0;
}

// Sums one row of the tile by group, in the order of the columns. Because the columns are sorted by
// group, each is visited once, however many groups there are.
__device__ void sum_groups(const Wave& wave, int64_t q, int64_t tile, const float* row, int columns,
                           bool invalid, const GroupOrder& order) {
  int at = 0;
  for (int64_t group = 0; group < wave.num_groups; ++group) {
    double sum = invalid ? static_cast<double>(not_a_number()) : 0.0;
    for (; at < columns && order.group[at] <= group; ++at) {
      sum += static_cast<double>(row[order.column[at]]);
    }
    wave.partials[(tile * wave.num_groups + group) * wave.queries + q] = sum;
  }
}

// Appends the scores that may enter one of the rankings of query q to its candidates. Scores equal
// to the last entry pass too, since `merge` compares indices; comparisons are negated so that NaN
// passes. The thread counts first, so that one atomic addition reserves room for all of them.
__device__ void append_candidates(const Wave& wave, int64_t q, int64_t n, const float* row,
                                  int columns) {
  const float infinity = __int_as_float(0x7f800000);
  const int64_t lowest = (q + 1) * wave.proponents.k - 1, highest = (q + 1) * wave.opponents.k - 1;
  const float low =
      wave.proponents.indices[lowest] < 0 ? -infinity : wave.proponents.scores[lowest];
  const float high =
      wave.opponents.indices[highest] < 0 ? infinity : wave.opponents.scores[highest];
  const auto passes = [&](float score) { return !(score < low) || !(score > high); };
  int count = 0;
  for (int i = 0; i < columns; ++i) count += passes(row[i]);
  if (count == 0) return;
  Candidate* to = wave.candidates + q * wave.capacity + atomicAdd(wave.counts + q, count);
  for (int i = 0; i < columns; ++i) {
    if (passes(row[i])) *to++ = {row[i], static_cast<int>(n) + i};
  }
}

// A block owns one tile of scores. In the second half, the first 128 threads sum the groups of one
// query each, and the other 128 look for candidates of one query each.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) score_tiles(Wave wave) {
  __shared__ TilePosition tile;  // in shared memory, because the scores fill the registers
  __shared__ TileScales scales;
  __shared__ GroupOrder order;
  char* memory = dynamic_shared();
  if (threadIdx.x == 0) tile = tile_position<T>(wave);
  __syncthreads();
  TileSums<kN<T>> scores = {};
  add_terms(wave, tile, memory, scales, scores, T{});
  float* table = reinterpret_cast<float*>(memory);
  for_tile<kN<T>>([&](int m, int k, int i) {
    // + 0.0f turns -0 into +0: the bits of a score must not depend on how it was computed.
    table[tile_row_of(m, i) * kPadded<T> + tile_column_of<kN<T>>(k, i)] = scores[m][k][i] + 0.0f;
  });
  const int64_t q = tile.q;
  const int n = tile.n, columns = tile.columns;
  if constexpr (sizeof(T) == 4) recompute_nan_scores(wave, q, n, columns, table);
  const bool sums = wave.groups != nullptr;
  const bool invalid = sums && sort_by_group(wave, n, columns, order);
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) % kSide;
  if (q + row >= wave.queries) return;
  if (threadIdx.x >= kSide) {
    append_candidates(wave, q + row, n, table + row * kPadded<T>, columns);
  } else if (sums) {
    sum_groups(wave, q + row, n / kColumns<T>, table + row * kPadded<T>, columns, invalid, order);
  }
}

struct alignas(16) Entry {  // so that one instruction copies it
  float score;
  int64_t index;
};

// The number of entries that rank before `entry` among `count` sorted ones; `at(i)` is the i-th.
// Binary search.
template <class At>
__device__ int64_t rank_among(bool largest, const Entry& entry, int64_t count, At at) {
  int64_t begin = 0, end = count;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    const Entry other = at(middle);
    if (ranks_before(largest, other.score, other.index, entry.score, entry.index)) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// One ranking of one query, sorted best first.
struct List {
  float* scores;
  int64_t* indices;
  int64_t k;
  bool largest;

  __device__ Entry at(int64_t position) const { return {scores[position], indices[position]}; }
  __device__ void set(int64_t position, const Entry& entry) const {
    if (position >= k) return;
    scores[position] = entry.score;
    indices[position] = entry.index;
  }

  // Inserts `count` new entries in place. Each belongs to one of the first threads: `entry` and its
  // rank among the new ones; `sorted` holds all of them in order. Called by the whole block.
  //
  // The position of a new entry is the number of old entries that rank before it plus its rank
  // among the new ones; an old entry moves down by the number of new entries that rank before it.
  // Old entries are moved 256 at a time, from the end of the list: each lands at or behind its old
  // position, where everything has been read already and no other entry lands. So one barrier,
  // between reads and writes, is enough.
  __device__ void insert(const Entry& entry, int rank, int count, const Entry* sorted) const {
    const bool has_entry = static_cast<int>(threadIdx.x) < count;
    const int64_t before =
        has_entry ? rank_among(largest, entry, k, [&](int64_t i) { return at(i); }) : 0;
    for (int64_t end = k; end > 0; end -= kThreads) {
      const int64_t position = end - 1 - threadIdx.x;
      Entry moved{};
      int64_t shift = 0;
      if (position >= 0) {
        moved = at(position);
        shift = rank_among(largest, moved, count, [&](int64_t i) { return sorted[i]; });
      }
      __syncthreads();
      if (position >= 0 && shift > 0) set(position + shift, moved);
    }
    if (has_entry) set(before + rank, entry);
  }
};

// Inserts the candidates of one query into one of its rankings; blockIdx.y chooses which. 256
// candidates at a time: those that still rank before the last entry are compacted (in any order),
// ranked by counting, and inserted.
__global__ void __launch_bounds__(kThreads) merge(Wave wave, int64_t first_index) {
  __shared__ Entry passed[kThreads], sorted[kThreads];
  __shared__ int count;
  const int64_t query = blockIdx.x;
  const bool largest = blockIdx.y == 0;
  const Ranking& ranking = largest ? wave.proponents : wave.opponents;
  const List list{ranking.scores + query * ranking.k, ranking.indices + query * ranking.k,
                  ranking.k, largest};
  const Candidate* candidates = wave.candidates + query * wave.capacity;
  const int candidate_count = wave.counts[query], thread = static_cast<int>(threadIdx.x);
  for (int begin = 0; begin < candidate_count; begin += kThreads) {
    __syncthreads();  // the list of the previous round is complete, and its `count` has been read
    if (thread == 0) count = 0;
    const Entry last = list.at(ranking.k - 1);
    __syncthreads();
    if (begin + thread < candidate_count) {
      const Candidate candidate = candidates[begin + thread];
      const Entry entry{candidate.score, first_index + candidate.row};
      if (ranks_before(largest, entry.score, entry.index, last.score, last.index)) {
        passed[atomicAdd(&count, 1)] = entry;
      }
    }
    __syncthreads();
    if (count == 0) continue;
    int rank = 0;
    if (thread < count) {
      for (int i = 0; i < count; ++i) {
        rank += ranks_before(largest, passed[i].score, passed[i].index, passed[thread].score,
                             passed[thread].index);
      }
      sorted[rank] = passed[thread];
    }
    __syncthreads();
    list.insert(passed[thread], rank, count, sorted);
  }
}

// group_sums += partials, the tiles of the wave in order; a thread owns one query and group.
__global__ void add_partials(Wave wave, double* group_sums) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (query >= wave.queries) return;
  for (int64_t group = blockIdx.y; group < wave.num_groups; group += gridDim.y) {
    double sum = group_sums[query * wave.num_groups + group];
    for (int64_t tile = 0; tile < ceil_div(wave.trains, wave.tile_columns); ++tile) {
      sum += wave.partials[(tile * wave.num_groups + group) * wave.queries + query];
    }
    group_sums[query * wave.num_groups + group] = sum;
  }
}

// Launchers.

// Training rows per wave: as many whole tiles as fit into kWaveBytes, at least one. A query needs 8
// bytes per training row for its candidates and 8 per tile and group for its partials.
int64_t wave_trains(const TopK& job, int64_t columns) {
  const int64_t groups = job.group_sums == nullptr ? 0 : job.num_groups;
  const int64_t tile_bytes = std::max<int64_t>(job.queries, 1) * 8 * (columns + groups);
  const int64_t fit = std::min(kWaveBytes / tile_bytes * columns, kWaveTrains);
  return std::min(std::max(fit, columns), ceil_div(job.trains, columns) * columns);
}

// The scratch memory, and a wave that uses it.
struct Plan {
  Wave wave;
  Term* terms;
  float *query_scales, *train_scales;
};

Plan make_plan(Scratch& scratch, const TopK& job) {
  Plan plan{};
  Wave& wave = plan.wave;
  wave.tile_columns = job.dtype == DType::bfloat16 ? kColumns<__nv_bfloat16> : kColumns<float>;
  wave.capacity = wave_trains(job, wave.tile_columns);
  wave.candidates = scratch.take<Candidate>(job.queries * wave.capacity);
  wave.counts = scratch.take<int>(job.queries);
  wave.terms = plan.terms = scratch.take<Term>(job.checkpoints);
  if (job.cosine) {
    wave.query_scales = plan.query_scales = scratch.take<float>(job.checkpoints * job.queries);
    wave.train_scales = plan.train_scales = scratch.take<float>(job.checkpoints * wave.capacity);
  }
  if (job.group_sums != nullptr) {
    wave.num_groups = job.num_groups;
    wave.partials =
        scratch.take<double>(wave.capacity / wave.tile_columns * job.num_groups * job.queries);
  }
  wave.queries = job.queries;
  wave.width = job.width;
  wave.checkpoints = job.checkpoints;
  const int64_t tiles = ceil_div(job.queries, kSide);
  wave.query_tiles = static_cast<unsigned>(tiles);
  wave.band = static_cast<unsigned>(ceil_div(tiles, std::max<int64_t>(ceil_div(tiles, kBand), 1)));
  wave.proponents = job.proponents;
  wave.opponents = job.opponents;
  return plan;
}

void store_all_terms(const TopK& job, Term* to, cudaStream_t stream) {
  for (int64_t c = 0; c < job.checkpoints; c += kTermsPerLaunch) {
    Terms terms{};
    terms.count = static_cast<int>(std::min<int64_t>(kTermsPerLaunch, job.checkpoints - c));
    for (int i = 0; i < terms.count; ++i) {
      terms.terms[i] = {job.query_rows[c + i], job.train_rows[c + i],
                        static_cast<float>(job.weights[c + i])};
    }
    store_terms<<<1, kTermsPerLaunch, 0, stream>>>(terms, to + c);
    check_launch(kOp);
  }
}

template <class T>
void launch_scales(const void* rows, int64_t first, int64_t count, int64_t width, float* scales,
                   cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads / kWarp));
  row_scales<T><<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(rows) + first * width, count,
                                                 width, scales);
  check_launch(kOp);
}

template <class T>
void run_wave(const TopK& job, const Plan& plan, const Wave& wave, cudaStream_t stream) {
  for (int64_t c = 0; job.cosine && c < job.checkpoints; ++c) {
    launch_scales<T>(job.train_rows[c], wave.first, wave.trains, job.width,
                     plan.train_scales + c * wave.capacity, stream);
  }
  check_call(kOp, cudaMemsetAsync(wave.counts, 0, sizeof(int) * job.queries, stream));
  const auto tiles =
      static_cast<unsigned>(wave.query_tiles * ceil_div(wave.trains, wave.tile_columns));
  score_tiles<T><<<tiles, kThreads, kTileBytes<T>, stream>>>(wave);
  check_launch(kOp);
  const dim3 lists(static_cast<unsigned>(job.queries), 2);
  merge<<<lists, kThreads, 0, stream>>>(wave, job.index_offset + wave.first);
  check_launch(kOp);
  if (job.group_sums == nullptr) return;
  const dim3 sums(static_cast<unsigned>(ceil_div(job.queries, kThreads)),
                  static_cast<unsigned>(std::min<int64_t>(job.num_groups, 1 << 10)));
  add_partials<<<sums, kThreads, 0, stream>>>(wave, job.group_sums);
  check_launch(kOp);
}

template <class T>
void run(const TopK& job, const Plan& plan, cudaStream_t stream) {
  check_call(kOp, cudaFuncSetAttribute(score_tiles<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kTileBytes<T>));
  store_all_terms(job, plan.terms, stream);
  Wave wave = plan.wave;
  wave.unit = 16;
  for (int64_t c = 0; c < job.checkpoints; ++c) {
    wave.unit =
        std::min(wave.unit, copy_unit<T>(job.width, {job.query_rows[c], job.train_rows[c]}));
    if (job.cosine) {
      launch_scales<T>(job.query_rows[c], 0, job.queries, job.width,
                       plan.query_scales + c * job.queries, stream);
    }
  }
  for (int64_t train = 0; train < job.trains; train += wave.capacity) {
    wave.first = train;
    wave.trains = std::min(wave.capacity, job.trains - train);
    wave.groups = job.group_sums == nullptr ? nullptr : job.groups + train;
    run_wave<T>(job, plan, wave, stream);
  }
}

}  // namespace

size_t top_k_dot_scratch(const TopK& job) {
  Scratch scratch;
  make_plan(scratch, job);
  return scratch.bytes();
}

void top_k_dot(const TopK& job, void* memory, void* stream) {
  Scratch scratch(memory);
  const Plan plan = make_plan(scratch, job);
  const auto on = static_cast<cudaStream_t>(stream);
  if (job.dtype == DType::bfloat16) {
    run<__nv_bfloat16>(job, plan, on);
  } else {
    run<float>(job, plan, on);
  }
}

}  // namespace tracmod::cuda

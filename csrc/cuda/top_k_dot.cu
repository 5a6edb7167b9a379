// score[q, n] = sum_c w_c <q_c, n_c>  (cosine: each term over |q_c| |n_c|); per query the k largest
// and the k smallest, and the sums per group. Training rows go by in waves; a wave is
//
//   row_scales    cosine only: 1 / |n_c|, a warp per row.
//   score_tiles   a block owns 128 queries x 256 training rows (128 if float32) and adds up all
//                 checkpoints' terms in registers. The tile then passes through shared memory: a
//                 thread per query adds it up by group into `partials`, another notes the scores
//                 that are not worse than the last of the query's lists as candidates. No score
//                 goes to device memory otherwise.
//   merge         a block owns one query's list in one direction, which is kept sorted: the
//                 candidates that pass go in, up to 256 at a time, each to the place its rank says.
//   add_partials  a thread owns one query's sum of one group; tiles in order.
//
// Candidates come in any order, but the order of the ranking is total, so results repeat bitwise. A
// wave is as wide as a query's candidates have places: no score is ever lost. Float32 scores are
// added in float64: exact, and so the same for any cut of the training rows into calls, unless a
// query's scores span more than 2^(29 - log2 N).
//
// Exactness: float32 rows in three tf32 products, float32 sums. bfloat16 rows in one product whose
// sums stay in the tensor cores and round towards zero there: a score is low by up to about
// 2^-25 K / 16 of itself, far below the rounding of the rows.
//
// Bytes: training rows C N K (4 or 2) once per 24 x 128 queries; candidates about 16 Q k ln(N /
// wave); through L2 C Q N K / 64 times 4, or 3/4 of that times 2. Operations 2 C Q N K, three times
// as many in tf32. Limits on an H200 (4.8 TB/s, 989 TFLOP/s of bfloat16, half of it in tf32): the
// tensor cores, of which mma.sync reaches some 60%, and L2, which 128 x 256 tiles ask for a byte in
// 85 operations. wgmma with copies shared by a cluster would lift both. No GPU has run this yet.
#include <algorithm>

#include "cuda/product.cuh"
#include "ranking.h"
#include "scratch.h"

namespace tracmod::cuda {
namespace {

constexpr char kOp[] = "top_k_dot";
constexpr int kThreads = kProductThreads;
constexpr int kWarp = 32;
constexpr int64_t kWaveBytes = int64_t{1} << 28;  // of candidates and partials
constexpr int64_t kWaveTrains = int64_t{1} << 17;
constexpr int64_t kBand = 24;
constexpr int kMostColumns = 256;
constexpr int kTermsPerLaunch = 32;

// A tile's training rows: 32 kN. Sums of bfloat16 leave room for more of them.
template <class T>
constexpr int kN = sizeof(T) == 2 ? 8 : 4;
template <class T>
constexpr int kColumns = 32 * kN<T>;
template <class T>
constexpr int kTileBytes = kStages * (kSide + kColumns<T>)*kRowBytes;
template <class T>
constexpr int kPadded = kColumns<T> + 1;  // a column of scores lies in different banks

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
  int row;  // of the wave
};

// What a wave's kernels read and write.
struct Wave {
  int64_t queries, trains, width, checkpoints;  // trains: of this wave
  int64_t first;                                // training row of the call that is the wave's row 0
  int unit;
  unsigned query_tiles, band;                // 128 queries; tiles a band
  const Term* terms;                         // (C,)
  const float *query_scales, *train_scales;  // (C, Q), (C, capacity); null: no cosine
  int64_t capacity;                          // training rows of the widest wave
  Candidate* candidates;                     // (Q, capacity)
  int* counts;                               // (Q,)
  const int64_t* groups;                     // of the wave's rows, or null
  int64_t num_groups;
  int tile_columns;
  double* partials;  // (tiles, G, Q)
  int64_t k;
  Ranking proponents, opponents;
};

// The pointers of all checkpoints go to the device as arguments, which needs no copy from the host.
__global__ void store_terms(Terms terms, Term* to) {
  if (static_cast<int>(threadIdx.x) < terms.count) to[threadIdx.x] = terms.terms[threadIdx.x];
}

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
  const double scale = square == 0.0 ? 1.0 : 1.0 / sqrt(square);  // its products are 0 as they are
  scales[row] = static_cast<float>(scale > kLargest ? kLargest : scale);
}

// A block's tile: its first query and row of the wave, and how many rows there are.
struct Place {
  int64_t q;
  int n, columns;
};

// Bands of query tiles; in a band the queries first, so that blocks at work share their rows.
template <class T>
__device__ Place place_of(const Wave& wave) {
  const auto tiles = static_cast<unsigned>(ceil_div(wave.trains, kColumns<T>));
  const unsigned band = blockIdx.x / (wave.band * tiles), at = blockIdx.x % (wave.band * tiles);
  const unsigned left = wave.query_tiles - band * wave.band;
  const unsigned height = left < wave.band ? left : wave.band;
  const int n = static_cast<int>(at / height) * kColumns<T>;
  const int64_t rest = wave.trains - n;
  return {int64_t{band * wave.band + at % height} * kSide, n,
          static_cast<int>(rest < kColumns<T> ? rest : kColumns<T>)};
}

// The factors of checkpoint c's products: this thread's row and column of the tile.
struct Scales {
  float row, column;
};

__device__ Scales scales_of(const Wave& wave, int64_t c, const Place& place) {
  const int64_t query = place.q + threadIdx.x;
  const int train = place.n + static_cast<int>(threadIdx.x);
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

// Scales in shared memory; a product ends with a barrier, so the ones before it have been read.
struct TileScales {
  float row[kSide], column[kMostColumns];

  __device__ void set(const Scales& mine) {
    if (threadIdx.x < kSide) row[threadIdx.x] = mine.row;
    column[threadIdx.x] = mine.column;
    __syncthreads();
  }
};

// Scores of this block's tile. Float32: chain by chain onto the sum.
__device__ void add_terms(const Wave& wave, const Place& place, char* memory, TileScales& scales,
                          TileSums<4>& scores, float) {
  for (int64_t c = 0; c < wave.checkpoints; ++c) {
    scales.set(scales_of(wave, c, place));
    multiply_rows<float>(query_side<float>(wave, c, place.q), train_side<float>(wave, c, place.n),
                         wave.width, wave.unit, memory, [&](const TileSums<>& sums) {
                           for_tile([&](int m, int n, int i) {
                             scores[m][n][i] += sums[m][n][i] * scales.row[tile_row_of(m, i)] *
                                                scales.column[tile_column_of(n, i)];
                           });
                         });
  }
}

// bfloat16: registers hold one tile, so the sum is kept in the scale of the checkpoint that is
// being added. A checkpoint of weight 0 is left out.
__device__ void add_terms(const Wave& wave, const Place& place, char* memory, TileScales& scales,
                          TileSums<8>& scores, __nv_bfloat16) {
  const auto scale = [&] {
    for_tile<8>([&](int m, int n, int i) {
      scores[m][n][i] *= scales.row[tile_row_of(m, i)];
      scores[m][n][i] *= scales.column[tile_column_of<8>(n, i)];
    });
  };
  bool some = false;
  Scales before{1.0f, 1.0f};
  for (int64_t c = 0; c < wave.checkpoints; ++c) {
    if (wave.terms[c].weight == 0.0f) continue;
    const Scales now = scales_of(wave, c, place);
    if (some) {
      scales.set({before.row / now.row, before.column / now.column});
      scale();
    }
    some = true;
    before = now;
    add_rows<__nv_bfloat16>(query_side<__nv_bfloat16>(wave, c, place.q),
                            train_side<__nv_bfloat16>(wave, c, place.n), wave.width, wave.unit,
                            memory, scores);
  }
  scales.set(before);
  scale();
}

// Float32 operands of the tensor cores are split, which makes NaN of infinite ones: then the plain
// sum says what the score is.
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

__device__ void say_plainly(const Wave& wave, int64_t q, int64_t n, int columns, float* table) {
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kSide * columns; at += kThreads) {
    const int row = at / columns, column = at % columns;
    float& score = table[row * kPadded<float> + column];
    if (score != score && q + row < wave.queries) {
      score = plain_score(wave, q + row, n + column) + 0.0f;
    }
  }
}

// The tile's columns, sorted by group.
struct GroupOrder {
  int column[kMostColumns];
  int64_t group[kMostColumns];
};

// True if a group is outside [0, G). Called by the whole block.
__device__ bool sort_by_group(const Wave& wave, int64_t n, int columns, GroupOrder& order) {
  __shared__ int64_t groups[kMostColumns];
  const int mine = static_cast<int>(threadIdx.x);
  if (mine < columns) groups[mine] = wave.groups[n + mine];
  __syncthreads();
  bool bad = false;
  if (mine < columns) {
    const int64_t group = groups[mine];
    bad = group < 0 || group >= wave.num_groups;
    int rank = 0;
    for (int i = 0; i < columns; ++i) {
      rank += groups[i] < group || (groups[i] == group && i < mine);
    }
    order.column[rank] = mine;
    order.group[rank] = group;
  }
  return __syncthreads_or(bad) != 0;
}

__device__ void sum_groups(const Wave& wave, int64_t q, int64_t tile, const float* row, int columns,
                           bool bad, const GroupOrder& order) {
  int at = 0;
  for (int64_t group = 0; group < wave.num_groups; ++group) {
    double sum = bad ? static_cast<double>(not_a_number()) : 0.0;
    for (; at < columns && order.group[at] <= group; ++at) {
      sum += static_cast<double>(row[order.column[at]]);
    }
    wave.partials[(tile * wave.num_groups + group) * wave.queries + q] = sum;
  }
}

// Notes what may belong into a list of query q: equal scores too, `merge` looks at the index.
__device__ void note_candidates(const Wave& wave, int64_t q, int64_t n, const float* row,
                                int columns) {
  const int64_t last = q * wave.k + wave.k - 1;
  const float infinity = __int_as_float(0x7f800000);
  const float low = wave.proponents.indices[last] < 0 ? -infinity : wave.proponents.scores[last];
  const float high = wave.opponents.indices[last] < 0 ? infinity : wave.opponents.scores[last];
  const auto passes = [&](float score) { return !(score < low) || !(score > high); };
  int count = 0;
  for (int i = 0; i < columns; ++i) count += passes(row[i]);
  if (count == 0) return;
  Candidate* to = wave.candidates + q * wave.capacity + atomicAdd(wave.counts + q, count);
  for (int i = 0; i < columns; ++i) {
    if (passes(row[i])) *to++ = {row[i], static_cast<int>(n) + i};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) score_tiles(Wave wave) {
  __shared__ Place place;  // not in registers, which the scores fill
  __shared__ TileScales scales;
  __shared__ GroupOrder order;
  char* memory = dynamic_shared();
  if (threadIdx.x == 0) place = place_of<T>(wave);
  __syncthreads();
  TileSums<kN<T>> scores = {};
  add_terms(wave, place, memory, scales, scores, T{});
  float* table = reinterpret_cast<float*>(memory);
  for_tile<kN<T>>([&](int m, int k, int i) {
    // + 0.0f turns -0 into +0, its equal, so that a score's bits do not depend on the path to it.
    table[tile_row_of(m, i) * kPadded<T> + tile_column_of<kN<T>>(k, i)] = scores[m][k][i] + 0.0f;
  });
  const int64_t q = place.q;
  const int n = place.n, columns = place.columns;
  if constexpr (sizeof(T) == 4) say_plainly(wave, q, n, columns, table);
  const bool sums = wave.groups != nullptr;
  const bool bad = sums && sort_by_group(wave, n, columns, order);
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) % kSide;
  if (q + row >= wave.queries) return;
  if (threadIdx.x >= kSide) {
    note_candidates(wave, q + row, n, table + row * kPadded<T>, columns);
  } else if (sums) {
    sum_groups(wave, q + row, n / kColumns<T>, table + row * kPadded<T>, columns, bad, order);
  }
}

struct Entry {
  float score;
  int64_t index;
};

// How many of `count` sorted entries rank before `entry`; `at(i)` gives the i-th.
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

// One query's list in one direction, sorted best first; every method is called by the whole block.
struct List {
  float* scores;
  int64_t* indices;
  int64_t k;
  bool largest;

  __device__ Entry at(int64_t place) const { return {scores[place], indices[place]}; }
  __device__ void set(int64_t place, const Entry& entry) const {
    if (place >= k) return;
    scores[place] = entry.score;
    indices[place] = entry.index;
  }

  // Each entry has a thread; `mine` is this thread's if it has one. `sorted` holds them in order.
  __device__ void insert(const Entry& mine, int rank, int count, const Entry* sorted) const {
    const bool has = static_cast<int>(threadIdx.x) < count;
    const int64_t before = has ? rank_among(largest, mine, k, [&](int64_t i) { return at(i); }) : 0;
    // What is in the list moves towards its end, the last first; the best stay where they are.
    for (int64_t end = k; end > 0; end -= kThreads) {
      const int64_t place = end - 1 - threadIdx.x;
      Entry moved{};
      int64_t shift = 0;
      if (place >= 0) {
        moved = at(place);
        shift = rank_among(largest, moved, count, [&](int64_t i) { return sorted[i]; });
      }
      __syncthreads();
      if (place >= 0 && shift > 0) set(place + shift, moved);
      __syncthreads();
    }
    if (has) set(before + rank, mine);
  }
};

__global__ void __launch_bounds__(kThreads) merge(Wave wave, int64_t first_index) {
  __shared__ Entry passed[kThreads], sorted[kThreads];
  __shared__ int count;
  const int64_t query = blockIdx.x;
  const bool largest = blockIdx.y == 0;
  const Ranking& ranking = largest ? wave.proponents : wave.opponents;
  const List list{ranking.scores + query * wave.k, ranking.indices + query * wave.k, wave.k,
                  largest};
  const Candidate* candidates = wave.candidates + query * wave.capacity;
  const int candidate_count = wave.counts[query], mine = static_cast<int>(threadIdx.x);
  for (int begin = 0; begin < candidate_count; begin += kThreads) {
    __syncthreads();  // the list and `count` are as the round before left them, for all
    if (mine == 0) count = 0;
    const Entry last = list.at(wave.k - 1);
    __syncthreads();
    if (begin + mine < candidate_count) {
      const Candidate candidate = candidates[begin + mine];
      const Entry entry{candidate.score, first_index + candidate.row};
      if (ranks_before(largest, entry.score, entry.index, last.score, last.index)) {
        passed[atomicAdd(&count, 1)] = entry;
      }
    }
    __syncthreads();
    if (count == 0) continue;
    int rank = 0;
    if (mine < count) {
      for (int i = 0; i < count; ++i) {
        rank += ranks_before(largest, passed[i].score, passed[i].index, passed[mine].score,
                             passed[mine].index);
      }
      sorted[rank] = passed[mine];
    }
    __syncthreads();
    list.insert(passed[mine], rank, count, sorted);
  }
}

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

// Training rows a wave: whole tiles, at least one.
int64_t wave_trains(const TopK& job, int64_t columns) {
  const int64_t groups = job.group_sums == nullptr ? 0 : job.num_groups;
  const int64_t tile_bytes = std::max<int64_t>(job.queries, 1) * 8 * (columns + groups);
  const int64_t fit = std::min(kWaveBytes / tile_bytes * columns, kWaveTrains);
  return std::min(std::max(fit, columns), ceil_div(job.trains, columns) * columns);
}

// The scratch, and a wave that reads and writes it.
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
  wave.k = job.k;
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

// score[q, n] = sum_c w_c <q_c, n_c>  (cosine: each term over |q_c| |n_c|); per query the k largest
// and the k smallest, and the sums per group, in blocks of training rows:
//
//   row_norms     cosine only: a warp per row.
//   add_scores    one checkpoint's term of the block's scores into scratch: a block owns 64 queries
//                 x 64 training rows; the scores of one block of training rows exist at a time.
//   rank          a block owns one query's list in one direction, which is kept sorted: 256 scores
//                 at a time are held against the list's last; the few that pass go in one by one,
//                 all threads finding the place and moving the rest.
//   sum_groups    a thread owns one query's sum of one group and adds its scores in order, so
//                 blocks streamed in several calls give the bits of one call.
//
// Bytes: training rows C N K (4 or 2) per 64 queries (cache), scores 8 Q N per checkpoint.
// Operations 2 C Q N K, float32: the float32 units are the limit.
#include <algorithm>

#include "cuda/tile.cuh"
#include "ranking.h"
#include "scratch.h"

namespace tracmod::cuda {
namespace {

constexpr char kOp[] = "top_k_dot";
constexpr int kThreads = kTileThreads;
constexpr int kWarp = 32;
constexpr int64_t kScratchScores = int64_t{1} << 24;  // 64 MiB

// Training rows a block: a multiple of 64, at least 64.
int64_t block_trains(const TopK& job) {
  const int64_t fit = kScratchScores / std::max<int64_t>(job.queries, 1) / kTile * kTile;
  return std::min(std::max<int64_t>(fit, kTile), ceil_div(job.trains, kTile) * kTile);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    row_norms(const T* rows, int64_t count, int64_t width, float* norms) {
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
  if (threadIdx.x % kWarp == 0) norms[row] = static_cast<float>(sqrt(square));
}

struct Term {
  int64_t queries, trains, width;
  float weight;
  const float *query_norms, *train_norms;  // null: no cosine
  bool first;  // of the checkpoints: the scores are written, not added to
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_scores(const T* query_rows, const T* train_rows, Term term, float* scores) {
  __shared__ TileMemory memory;
  const int64_t q = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kTile;
  const MatrixRows<T> queries{query_rows + q * term.width, term.width, term.queries - q};
  const MatrixRows<T> trains{train_rows + n * term.width, term.width, term.trains - n};
  float sum[kPerThread][kPerThread];
  multiply_tile(queries, trains, term.width, memory, sum);
  for (int i = 0; i < kPerThread; ++i) {
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t query = q + tile_row(i), train = n + tile_column(j);
      if (query >= term.queries || train >= term.trains) continue;
      float value = sum[i][j];
      if (term.query_norms != nullptr) {
        const float norm1 = term.query_norms[query], norm2 = term.train_norms[train];
        value = norm1 == 0.0f || norm2 == 0.0f ? 0.0f : value / norm1 / norm2;
      }
      float* score = scores + query * term.trains + train;
      // + 0.0f turns -0 into +0, its equal, so that a score's bits do not depend on the path to it.
      *score = (term.first ? 0.0f : *score) + term.weight * value + 0.0f;
    }
  }
}

// One query's list in one direction, sorted best first; every method is called by the whole block.
struct List {
  float* scores;
  int64_t* indices;
  int64_t k;
  bool largest;

  __device__ bool takes(float score, int64_t index) const {
    return ranks_before(largest, score, index, scores[k - 1], indices[k - 1]);
  }

  __device__ void insert(float score, int64_t index) {
    int64_t place = 0;  // how many stay before it
    for (int64_t begin = 0; begin < k; begin += kThreads) {
      const int64_t at = begin + threadIdx.x;
      const bool before = at < k && ranks_before(largest, scores[at], indices[at], score, index);
      place += __syncthreads_count(before);
    }
    if (place >= k) return;
    for (int64_t last = k - 1; last > place; last -= kThreads) {
      const int64_t at = last - threadIdx.x;
      float moved_score = 0.0f;
      int64_t moved_index = 0;
      if (at > place) {
        moved_score = scores[at - 1];
        moved_index = indices[at - 1];
      }
      __syncthreads();
      if (at > place) {
        scores[at] = moved_score;
        indices[at] = moved_index;
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      scores[place] = score;
      indices[place] = index;
    }
    __syncthreads();
  }
};

__global__ void __launch_bounds__(kThreads)
    rank(const float* scores, int64_t trains, int64_t first_index, int64_t k, Ranking proponents,
         Ranking opponents) {
  __shared__ bool passes[kThreads];
  const int64_t query = blockIdx.x;
  const bool largest = blockIdx.y == 0;
  const Ranking& ranking = largest ? proponents : opponents;
  List list{ranking.scores + query * k, ranking.indices + query * k, k, largest};
  const float* row = scores + query * trains;
  for (int64_t begin = 0; begin < trains; begin += kThreads) {
    const int64_t at = begin + threadIdx.x;
    const bool pass = at < trains && list.takes(row[at], first_index + at);
    passes[threadIdx.x] = pass;
    if (!__syncthreads_or(pass)) continue;
    for (int i = 0; i < kThreads; ++i) {
      if (passes[i]) list.insert(row[begin + i], first_index + begin + i);
    }
    __syncthreads();  // `passes` and the list's last are read before they change
  }
}

__global__ void sum_groups(const float* scores, int64_t trains, const int64_t* groups,
                           int64_t num_groups, double* group_sums) {
  const int64_t query = blockIdx.x;
  const int64_t group = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (group >= num_groups) return;
  const float* row = scores + query * trains;
  double sum = group_sums[query * num_groups + group];
  for (int64_t n = 0; n < trains; ++n) {
    const int64_t of = groups[n];
    if (of == group) sum += static_cast<double>(row[n]);
    if (of < 0 || of >= num_groups) sum = static_cast<double>(not_a_number());
  }
  group_sums[query * num_groups + group] = sum;
}

struct Plan {
  int64_t trains;                    // of a block
  float* scores;                     // (Q, trains)
  float *query_norms, *train_norms;  // (Q,), (trains,) if cosine
};

Plan make_plan(Scratch& scratch, const TopK& job) {
  Plan plan{};
  plan.trains = block_trains(job);
  plan.scores = scratch.take<float>(job.queries * plan.trains);
  if (job.cosine) {
    plan.query_norms = scratch.take<float>(job.queries);
    plan.train_norms = scratch.take<float>(plan.trains);
  }
  return plan;
}

template <class T>
void launch_norms(const T* rows, int64_t count, int64_t width, float* norms, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads / kWarp));
  row_norms<T><<<blocks, kThreads, 0, stream>>>(rows, count, width, norms);
  check_launch(kOp);
}

template <class T>
void score_block(const TopK& job, const Plan& plan, int64_t train, int64_t count,
                 cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(count, kTile)),
                    static_cast<unsigned>(ceil_div(job.queries, kTile)));
  for (int64_t c = 0; c < job.checkpoints; ++c) {
    const T* queries = static_cast<const T*>(job.query_rows[c]);
    const T* trains = static_cast<const T*>(job.train_rows[c]) + train * job.width;
    if (job.cosine) {
      launch_norms<T>(queries, job.queries, job.width, plan.query_norms, stream);
      launch_norms<T>(trains, count, job.width, plan.train_norms, stream);
    }
    const Term term{
        job.queries,      count, job.width, static_cast<float>(job.weights[c]), plan.query_norms,
        plan.train_norms, c == 0};
    add_scores<T><<<blocks, kThreads, 0, stream>>>(queries, trains, term, plan.scores);
    check_launch(kOp);
  }
}

template <class T>
void run(const TopK& job, const Plan& plan, cudaStream_t stream) {
  const auto queries = static_cast<unsigned>(job.queries);
  for (int64_t train = 0; train < job.trains; train += plan.trains) {
    const int64_t count = std::min(plan.trains, job.trains - train);
    score_block<T>(job, plan, train, count, stream);
    rank<<<dim3(queries, 2), kThreads, 0, stream>>>(plan.scores, count, job.index_offset + train,
                                                    job.k, job.proponents, job.opponents);
    check_launch(kOp);
    if (job.group_sums == nullptr) continue;
    const dim3 blocks(queries, static_cast<unsigned>(ceil_div(job.num_groups, kWarp)));
    sum_groups<<<blocks, kWarp, 0, stream>>>(plan.scores, count, job.groups + train, job.num_groups,
                                             job.group_sums);
    check_launch(kOp);
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

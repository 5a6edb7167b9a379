// score[q, n] = sum_c w_c <q_c, n_c>  (cosine: each term over |q_c| |n_c|); per query the k largest
// and the k smallest, and the sums per group. The score matrix is never whole in memory.
//
// Blocks of 256 queries x 2048 training rows, one after the other. First 32 training rows an item:
// their inner products with the block's queries as `dot` tiles, all checkpoints summed in float64,
// written as float32 scores. Then a query an item: its scores pass through two heaps that live in
// the result's own rows, and into its group sums, in the order of the training rows; so blocks
// streamed in several calls give the bits of one call. A last pass sorts the heaps.
//
// Bytes: the training rows once per 256 queries, C N K (4 or 2). Operations: 2 C Q N K, so the
// multiply-add units are the limit from about 32 queries on, memory below.
#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/parallel.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "ranking.h"
#include "scratch.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kQueries = 256;
constexpr int64_t kTrains = 2048;
constexpr int64_t kItemTrains = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  float* scores;        // (kQueries, kTrains)
  double* dots;         // (threads, 2, kQueries, kItemTrains): one checkpoint, and all so far
  double* query_norms;  // (C, Q) if cosine
};

Plan make_plan(Scratch& scratch, const TopK& job, int threads) {
  Plan plan{};
  const int64_t queries = std::min(kQueries, job.queries);
  plan.scores = scratch.take<float>(queries * std::min(kTrains, job.trains));
  plan.dots = scratch.take<double>(threads * 2 * queries * kItemTrains);
  plan.query_norms = scratch.take<double>(job.cosine ? job.checkpoints * job.queries : 0);
  return plan;
}

template <class T>
double norm_of(const T* row, int64_t width) {
  double square = 0.0;
  dot(&row, 1, &row, 1, width, &square, 1);
  return std::sqrt(square);
}

struct Block {
  int64_t query, queries, train, trains;
};

// Scores of training rows [n, n + count) of the block with its queries.
template <class T>
void score_item(const TopK& job, const Plan& plan, const Block& block, int64_t n, int64_t count,
                int slot) {
  const T* queries[kQueries];
  const T* trains[kItemTrains];
  double norms[kItemTrains];
  const int64_t size = std::min(kQueries, job.queries) * kItemTrains;
  double* dots = plan.dots + slot * 2 * size;
  double* total = dots + size;
  std::fill(total, total + size, 0.0);
  for (int64_t c = 0; c < job.checkpoints; ++c) {
    const T* query_rows = static_cast<const T*>(job.query_rows[c]) + block.query * job.width;
    const T* train_rows = static_cast<const T*>(job.train_rows[c]) + (block.train + n) * job.width;
    for (int64_t q = 0; q < block.queries; ++q) queries[q] = query_rows + q * job.width;
    for (int64_t i = 0; i < count; ++i) {
      trains[i] = train_rows + i * job.width;
      if (job.cosine) norms[i] = norm_of(trains[i], job.width);
    }
    std::fill(dots, dots + size, 0.0);
    dot(queries, block.queries, trains, count, job.width, dots, kItemTrains);
    for (int64_t q = 0; q < block.queries; ++q) {
      for (int64_t i = 0; i < count; ++i) {
        double value = dots[q * kItemTrains + i];
        if (job.cosine) {
          const double norm = plan.query_norms[c * job.queries + block.query + q] * norms[i];
          value = norm == 0.0 ? 0.0 : value / norm;
        }
        total[q * kItemTrains + i] += job.weights[c] * value;
      }
    }
  }
  for (int64_t q = 0; q < block.queries; ++q) {
    float* scores = plan.scores + q * block.trains + n;
    // + 0.0f turns -0 into +0, its equal, so that a score's bits do not depend on the path to it.
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = static_cast<float>(total[q * kItemTrains + i]) + 0.0f;
    }
  }
}

// A query's k best so far: a heap with the worst on top, laid from the row's end to its beginning,
// so that a row sorted best first is a heap as it is.
class Heap {
 public:
  Heap(const Ranking& ranking, int64_t query, int64_t k, bool largest)
      : scores_(ranking.scores + query * k),
        indices_(ranking.indices + query * k),
        k_(k),
        largest_(largest) {}

  void offer(float score, int64_t index) {
    const float worst = scores_[k_ - 1];
    if (largest_ ? score < worst : score > worst) return;  // most scores end here
    if (!ranks_before(largest_, score, index, worst, indices_[k_ - 1])) return;
    scores_[k_ - 1] = score;
    indices_[k_ - 1] = index;
    sink(k_);
  }

  // Best first. The heap's worst go to its end one after the other; then the row is turned round.
  void sort() {
    for (int64_t size = k_ - 1; size > 0; --size) {
      swap(0, size);
      sink(size);
    }
    std::reverse(scores_, scores_ + k_);
    std::reverse(indices_, indices_ + k_);
  }

 private:
  int64_t place(int64_t node) const { return k_ - 1 - node; }

  void swap(int64_t a, int64_t b) {
    std::swap(scores_[place(a)], scores_[place(b)]);
    std::swap(indices_[place(a)], indices_[place(b)]);
  }

  bool worse(int64_t a, int64_t b) const {
    return ranks_before(largest_, scores_[place(b)], indices_[place(b)], scores_[place(a)],
                        indices_[place(a)]);
  }

  // Moves the top down among the first `size` nodes until no child is worse.
  void sink(int64_t size) {
    for (int64_t node = 0; 2 * node + 1 < size;) {
      int64_t child = 2 * node + 1;
      if (child + 1 < size && worse(child + 1, child)) ++child;
      if (!worse(child, node)) return;
      swap(node, child);
      node = child;
    }
  }

  float* scores_;
  int64_t* indices_;
  int64_t k_;
  bool largest_;
};

void reduce_query(const TopK& job, const float* scores, const Block& block, int64_t query) {
  Heap proponents(job.proponents, query, job.k, true);
  Heap opponents(job.opponents, query, job.k, false);
  for (int64_t i = 0; i < block.trains; ++i) {
    const int64_t index = job.index_offset + block.train + i;
    proponents.offer(scores[i], index);
    opponents.offer(scores[i], index);
  }
  if (job.group_sums == nullptr) return;
  double* sums = job.group_sums + query * job.num_groups;
  for (int64_t i = 0; i < block.trains; ++i) {
    sums[job.groups[block.train + i]] += static_cast<double>(scores[i]);
  }
}

template <class T>
void run(const TopK& job, const Plan& plan, int threads) {
  if (job.cosine) {
    parallel_for(threads, job.checkpoints * job.queries, [&](int64_t item, int) {
      const T* rows = static_cast<const T*>(job.query_rows[item / job.queries]);
      plan.query_norms[item] = norm_of(rows + item % job.queries * job.width, job.width);
    });
  }
  for (int64_t query = 0; query < job.queries; query += kQueries) {
    for (int64_t train = 0; train < job.trains; train += kTrains) {
      const Block block{query, std::min(kQueries, job.queries - query), train,
                        std::min(kTrains, job.trains - train)};
      parallel_for(threads, ceil_div(block.trains, kItemTrains), [&](int64_t item, int slot) {
        const int64_t n = item * kItemTrains;
        score_item<T>(job, plan, block, n, std::min(kItemTrains, block.trains - n), slot);
      });
      parallel_for(threads, block.queries, [&](int64_t q, int) {
        reduce_query(job, plan.scores + q * block.trains, block, query + q);
      });
    }
  }
  parallel_for(threads, job.queries, [&](int64_t query, int) {
    Heap(job.proponents, query, job.k, true).sort();
    Heap(job.opponents, query, job.k, false).sort();
  });
}

}  // namespace

size_t top_k_dot_scratch(const TopK& job, int threads) {
  Scratch scratch;
  make_plan(scratch, job, threads);
  return scratch.bytes();
}

void top_k_dot(const TopK& job, void* memory, int threads) {
  Scratch scratch(memory);
  const Plan plan = make_plan(scratch, job, threads);
  if (job.dtype == DType::bfloat16) {
    run<bfloat16>(job, plan, threads);
  } else {
    run<float>(job, plan, threads);
  }
}

}  // namespace tracmod::cpu

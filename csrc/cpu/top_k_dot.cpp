// Scores of Q queries and N training rows over C checkpoints,
//
//   score[q, n] = sum_c w_c <q_c, n_c>,   cosine: w_c <q_c, n_c> / (|q_c| |n_c|)
//
// and from them, per query, the k largest and the k smallest scores and the sum per group. The
// score matrix (Q, N) is never in memory as a whole.
//
// Work: blocks of 256 queries x 2048 training rows, one after the other. For each block:
//   1. An item is 64 training rows (16 if there are 9 to 31 queries). They are packed 256 steps of
//      depth at a time and multiplied with all queries of the block as `outer` tiles. Sums are
//      float64 across blocks of depth and across checkpoints; the finished scores are float32.
//   2. An item is one query. The few scores that may enter its rankings are selected, sorted and
//      merged in; the group sums are added in the order of the training rows. This order makes
//      training rows streamed in several calls give the bits of one call.
//
// Up to 8 queries take `inner` products of the rows where they are, because packing rows for so few
// would cost more than it saves. Those sums have another order: a query in such a call and the same
// query in a larger call may differ by rounding. Apart from that, the result of a query does not
// depend on which other queries are in the call.
//
// Bytes: the training rows once per 256 queries, C N K (4 or 2). Operations: 2 C Q N K, plus 2 Q N
// comparisons for the rankings. Memory is the limit below about 30 queries, the multiply-add units
// above.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "ranking.h"
#include "scratch.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kQueries = 256;  // queries of a block
constexpr int64_t kTrains = 2048;  // training rows of a block
constexpr int64_t kScan = 16;      // scores that are compared with the worst ranked one at a time
// Up to this many queries take `inner` products. The streaming search of the Python package makes
// its blocks of queries larger than this, so that its results have one order of summation.
constexpr int64_t kFewQueries = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory of one thread.
struct Slot {
  float* panel;      // (kBlockSteps, kPanel) of training rows
  double* dots;      // (kQueries, kPanel) inner products of one checkpoint
  double* total;     // (kQueries, kPanel) scores, summed over checkpoints
  uint64_t* keys;    // (kTrains + kScan,) candidates: key of the score << 32 | position
  float* scores;     // (k,) copy of a ranking while it is merged, the longer of the two
  int64_t* indices;  // (k,)
};

struct Plan {
  float* scores;           // (kQueries, kTrains)
  double* query_inverses;  // (C, Q) 1 / |q_c|, for cosine only
  std::byte* slots;        // (threads, slot_bytes)
  size_t slot_bytes;
};

Slot make_slot(Scratch& scratch, const TopK& job) {
  Slot slot{};
  const int64_t queries = std::min(kQueries, job.queries);
  slot.panel = scratch.take<float>(kBlockSteps * kPanel);
  slot.dots = scratch.take<double>(queries * kPanel);
  slot.total = scratch.take<double>(queries * kPanel);
  slot.keys = scratch.take<uint64_t>(std::min(kTrains, job.trains) + kScan);
  const int64_t longest = std::max(job.proponents.k, job.opponents.k);
  slot.scores = scratch.take<float>(longest);
  slot.indices = scratch.take<int64_t>(longest);
  return slot;
}

Slot slot_of(const TopK& job, const Plan& plan, int number) {
  Scratch scratch(plan.slots + static_cast<size_t>(number) * plan.slot_bytes);
  return make_slot(scratch, job);
}

Plan make_plan(Scratch& scratch, const TopK& job, int threads) {
  Plan plan{};
  plan.scores =
      scratch.take<float>(std::min(kQueries, job.queries) * std::min(kTrains, job.trains));
  plan.query_inverses = scratch.take<double>(job.cosine ? job.checkpoints * job.queries : 0);
  Scratch slot_size;
  make_slot(slot_size, job);
  plan.slot_bytes = (slot_size.bytes() + 255) / 256 * 256;  // keeps every slot aligned
  plan.slots = scratch.take<std::byte>(threads * static_cast<int64_t>(plan.slot_bytes));
  return plan;
}

// 1 / norm from the squared norm. A row of zeros gets 0, so its cosine with everything is 0.
double inverse_norm(double square) { return square == 0.0 ? 0.0 : 1.0 / std::sqrt(square); }

// Queries [query, query + queries) and training rows [train, train + trains).
struct Block {
  int64_t query, queries, train, trains;
};

// dots (queries, kPanel) = inner products, for checkpoint c, of the block's queries with the
// `count` training rows from `train` on; squares (kPanel) = squared norms of these rows (cosine
// only).
template <class T>
void dot_panel(const TopK& job, int64_t c, const Block& block, int64_t train, int64_t count,
               float* panel, double* dots, double* squares) {
  const T *queries[kQueries], *trains[kPanel];
  const T* query_rows = static_cast<const T*>(job.query_rows[c]) + block.query * job.width;
  const T* train_rows = static_cast<const T*>(job.train_rows[c]) + train * job.width;
  std::fill(dots, dots + block.queries * kPanel, 0.0);
  std::fill(squares, squares + kPanel, 0.0);
  if (job.queries <= kFewQueries) {
    for (int64_t i = 0; i < count; ++i) trains[i] = train_rows + i * job.width;
    for (int64_t q = 0; q < block.queries; ++q) queries[q] = query_rows + q * job.width;
    inner(queries, block.queries, trains, count, job.width, dots, kPanel);
    for (int64_t i = 0; job.cosine && i < count; ++i) {
      squares[i] = dot(trains[i], trains[i], job.width);
    }
    return;
  }
  const int64_t step = kBlockSteps * numbers_per_step<T>();
  for (int64_t d = 0; d < job.width; d += step) {
    const int64_t depth = std::min(step, job.width - d);
    for (int64_t i = 0; i < count; ++i) trains[i] = train_rows + i * job.width + d;
    for (int64_t q = 0; q < block.queries; ++q) queries[q] = query_rows + q * job.width + d;
    pack(trains, count, depth, panel);
    if (job.cosine) sum_squares<T>(panel, padded(count), steps_of<T>(depth), squares);
    outer(queries, block.queries, panel, padded(count), depth, dots, kPanel);
  }
}

// Writes the scores of the block's queries with the training rows [n, n + count) of the block.
template <class T>
void score_panel(const TopK& job, const Plan& plan, const Block& block, int64_t n, int64_t count,
                 const Slot& slot) {
  double factors[kPanel] = {};
  std::fill(slot.total, slot.total + block.queries * kPanel, 0.0);
  for (int64_t c = 0; c < job.checkpoints; ++c) {
    dot_panel<T>(job, c, block, block.train + n, count, slot.panel, slot.dots, factors);
    for (double& factor : factors) factor = job.cosine ? inverse_norm(factor) : 1.0;
    const double* inverses = plan.query_inverses + c * job.queries + block.query;
    for (int64_t q = 0; q < block.queries; ++q) {
      tiles().add_products(padded(count), job.weights[c] * (job.cosine ? inverses[q] : 1.0),
                           slot.dots + q * kPanel, factors, 0.0, slot.total + q * kPanel);
    }
  }
  for (int64_t q = 0; q < block.queries; ++q) {
    float* scores = plan.scores + q * block.trains + n;
    // + 0.0f turns -0 into +0. The two compare equal, but ranking keys are made from the bits, and
    // the bits of a score must not depend on how it was computed.
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = static_cast<float>(slot.total[q * kPanel + i]) + 0.0f;
    }
  }
}

// An integer that is smaller for a better score, in the order of ranks_before; NaN has key 0. Bits
// of positive floats order like the floats; flipping the sign bit of positive and all bits of
// negative ones extends that to all numbers. With the position in the lower half of a 64-bit key,
// sorting integers breaks ties by the lower index.
uint32_t key_of(bool largest, float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const uint32_t ascending = bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
  return score != score ? 0 : largest ? ~ascending : ascending;
}

// Writes the keys of the scores that are not worse than `worst`, the last score of a full ranking,
// and returns their number. Most groups of kScan scores hold none, which one vector comparison
// shows. Comparisons are negated so that NaN passes. Inside a group every key is written and the
// count advances by 0 or 1: a branch would be mispredicted often.
int64_t find_candidates(bool largest, float worst, const float* scores, int64_t count,
                        uint64_t* keys) {
  int64_t candidates = 0;
  for (int64_t begin = 0; begin < count; begin += kScan) {
    const int64_t end = std::min(count, begin + kScan);
    int any = 0;
    for (int64_t i = begin; i < end; ++i) any |= !(largest ? scores[i] < worst : scores[i] > worst);
    if (any == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      keys[candidates] = static_cast<uint64_t>(key_of(largest, scores[i])) << 32 | i;
      candidates += !(largest ? scores[i] < worst : scores[i] > worst);
    }
  }
  return candidates;
}

// The same for a ranking that is not full, which has no worst score to compare with yet. Take the
// best score of each group of kScan and of those the k-th best: k groups have a score at least as
// good, so a worse score cannot be among the k best.
int64_t find_first_candidates(bool largest, int64_t k, const float* scores, int64_t count,
                              uint64_t* keys) {
  constexpr uint64_t kNone = ~uint64_t{0};
  uint64_t best[kTrains / kScan + 1];
  int64_t groups = 0, candidates = 0;
  for (int64_t begin = 0; begin < count; begin += kScan, ++groups) {
    best[groups] = kNone;
    for (int64_t i = begin; i < std::min(count, begin + kScan); ++i) {
      keys[i] = static_cast<uint64_t>(key_of(largest, scores[i])) << 32 | i;
      best[groups] = std::min(best[groups], keys[i]);
    }
  }
  if (groups > k) std::nth_element(best, best + k - 1, best + groups);
  const uint64_t bound = groups > k ? best[k - 1] : kNone;
  for (int64_t i = 0; i < count; ++i) {
    keys[candidates] = keys[i];
    candidates += keys[i] <= bound;
  }
  return candidates;
}

// Merges the block's scores of one query into its ranking, which is sorted before and after.
void rank_scores(const Ranking& ranking, int64_t query, bool largest, const float* scores,
                 int64_t count, int64_t first_index, const Slot& slot) {
  const int64_t k = ranking.k;
  float* best = ranking.scores + query * k;
  int64_t* indices = ranking.indices + query * k;
  int64_t candidates = indices[k - 1] < 0
                           ? find_first_candidates(largest, k, scores, count, slot.keys)
                           : find_candidates(largest, best[k - 1], scores, count, slot.keys);
  if (candidates > k) {
    std::nth_element(slot.keys, slot.keys + k, slot.keys + candidates);
    candidates = k;
  }
  if (candidates == 0) return;
  std::sort(slot.keys, slot.keys + candidates);
  std::copy(best, best + k, slot.scores);
  std::copy(indices, indices + k, slot.indices);
  for (int64_t rank = 0, old = 0, next = 0; rank < k; ++rank) {
    const int64_t position =
        static_cast<int64_t>(slot.keys[std::min(next, candidates - 1)] & 0xffffffff);
    const bool take_new =
        next < candidates && ranks_before(largest, scores[position], first_index + position,
                                          slot.scores[old], slot.indices[old]);
    best[rank] = take_new ? scores[position] : slot.scores[old];
    indices[rank] = take_new ? first_index + position : slot.indices[old];
    ++(take_new ? next : old);
  }
}

// Updates both rankings and the group sums of one query.
void reduce_query(const TopK& job, const float* scores, const Block& block, int64_t query,
                  const Slot& slot) {
  const int64_t first_index = job.index_offset + block.train;
  rank_scores(job.proponents, query, true, scores, block.trains, first_index, slot);
  rank_scores(job.opponents, query, false, scores, block.trains, first_index, slot);
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
      const T* row = rows + item % job.queries * job.width;
      plan.query_inverses[item] = inverse_norm(dot(row, row, job.width));
    });
  }
  for (int64_t query = 0; query < job.queries; query += kQueries) {
    for (int64_t train = 0; train < job.trains; train += kTrains) {
      const Block block{query, std::min(kQueries, job.queries - query), train,
                        std::min(kTrains, job.trains - train)};
      // With few queries memory is the limit. Then fewer rows are packed at a time, so that reading
      // returns to each row sooner.
      const bool few_packed = job.queries > kFewQueries && job.queries < kPanel / 2;
      const int64_t rows = few_packed ? kColumnUnit : kPanel;
      parallel_for(threads, ceil_div(block.trains, rows), [&](int64_t item, int number) {
        const int64_t n = item * rows;
        score_panel<T>(job, plan, block, n, std::min(rows, block.trains - n),
                       slot_of(job, plan, number));
      });
      parallel_for(threads, block.queries, [&](int64_t q, int number) {
        reduce_query(job, plan.scores + q * block.trains, block, query + q,
                     slot_of(job, plan, number));
      });
    }
  }
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

// score[q, n] = sum_c w_c <q_c, n_c>  (cosine: each term over |q_c| |n_c|); per query the k largest
// and the k smallest, and the sums per group. The score matrix is never whole in memory.
//
// Blocks of 256 queries x 2048 training rows, one after the other. First 64 training rows an item
// (16 beside 9 to 31 queries): packed 256 steps of depth at a time and multiplied with all queries as
// `outer` tiles; float64 across blocks of depth and checkpoints, written as float32 scores. Up to 8
// queries take `inner` products of the rows as they lie: a query asked in such a call and the same
// query among many may differ by rounding; otherwise it does not matter which are asked together.
// Then a query an item: the few scores that may enter a ranking are selected, sorted and merged into
// it; and its group sums, in the order of the training rows; so blocks streamed in several calls give
// the bits of one call.
//
// Bytes: the training rows once per 256 queries, C N K (4 or 2). Operations: 2 C Q N K, and 2 N for
// the rankings: memory is the limit below some 30 queries, the multiply-add units above.
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

constexpr int64_t kQueries = 256;
constexpr int64_t kTrains = 2048;
constexpr int64_t kScan = 16;
constexpr int64_t kFew = 8;  // tracmod/streaming.py cuts no block so small

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a thread works in.
struct Slot {
  float* panel;      // (kBlockSteps, kPanel) of training rows
  double* dots;      // (kQueries, kPanel) of one checkpoint
  double* total;     // (kQueries, kPanel) of all checkpoints
  uint64_t* keys;    // (kTrains,)
  float* scores;     // (k,)
  int64_t* indices;  // (k,)
};

struct Plan {
  float* scores;           // (kQueries, kTrains)
  double* query_inverses;  // (C, Q) 1 / |q_c| if cosine
  std::byte* slots;        // (threads,) of slot_bytes
  size_t slot_bytes;
};

Slot make_slot(Scratch& scratch, const TopK& job) {
  Slot slot{};
  const int64_t queries = std::min(kQueries, job.queries);
  slot.panel = scratch.take<float>(kBlockSteps * kPanel);
  slot.dots = scratch.take<double>(queries * kPanel);
  slot.total = scratch.take<double>(queries * kPanel);
  slot.keys = scratch.take<uint64_t>(std::min(kTrains, job.trains) + kScan);
  slot.scores = scratch.take<float>(job.k);
  slot.indices = scratch.take<int64_t>(job.k);
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
  Scratch one;
  make_slot(one, job);
  plan.slot_bytes = (one.bytes() + 255) / 256 * 256;
  plan.slots = scratch.take<std::byte>(threads * static_cast<int64_t>(plan.slot_bytes));
  return plan;
}

// 1 / norm, and 0 for a row of zeros: its cosine with everything is 0.
double inverse_norm(double square) { return square == 0.0 ? 0.0 : 1.0 / std::sqrt(square); }

struct Block {
  int64_t query, queries, train, trains;
};

// dots (queries, kPanel) = inner products of one checkpoint's `count` training rows from `train` on
// with the block's queries; squares (kPanel) = those rows' with themselves. A few queries read the
// rows as they lie; more share a panel of them.
template <class T>
void dot_panel(const TopK& job, int64_t c, const Block& block, int64_t train, int64_t count,
               float* panel, double* dots, double* squares) {
  const T *queries[kQueries], *trains[kPanel];
  const T* query_rows = static_cast<const T*>(job.query_rows[c]) + block.query * job.width;
  const T* train_rows = static_cast<const T*>(job.train_rows[c]) + train * job.width;
  std::fill(dots, dots + block.queries * kPanel, 0.0);
  std::fill(squares, squares + kPanel, 0.0);
  if (job.queries <= kFew) {
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

// Scores of training rows [n, n + count) of the block with its queries.
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
    // + 0.0f turns -0 into +0, its equal, so that a score's bits do not depend on the path to it.
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = static_cast<float>(slot.total[q * kPanel + i]) + 0.0f;
    }
  }
}

// Smaller for a better score: an integer in the order of ranks_before.
uint32_t key_of(bool largest, float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const uint32_t ascending = bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
  return score != score ? 0 : largest ? ~ascending : ascending;
}

// The positions of the scores that may rank before `worst`, behind their keys; how many. Most
// groups of kScan scores hold none.
int64_t find_candidates(bool largest, float worst, const float* scores, int64_t count,
                        uint64_t* keys) {
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += kScan) {
    const int64_t end = std::min(count, begin + kScan);
    int any = 0;
    for (int64_t i = begin; i < end; ++i) any |= !(largest ? scores[i] < worst : scores[i] > worst);
    if (any == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      keys[found] = static_cast<uint64_t>(key_of(largest, scores[i])) << 32 | i;
      found += !(largest ? scores[i] < worst : scores[i] > worst);
    }
  }
  return found;
}

// The same for a ranking that is not full and so has no worst score yet: k groups have a score as good
// as the k-th best of the groups' best, so what is worse than that cannot rank.
int64_t find_first_candidates(bool largest, int64_t k, const float* scores, int64_t count,
                              uint64_t* keys) {
  constexpr uint64_t kNone = ~uint64_t{0};
  uint64_t best[kTrains / kScan + 1];
  int64_t groups = 0, found = 0;
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
    keys[found] = keys[i];
    found += keys[i] <= bound;
  }
  return found;
}

// Puts the block's scores of a query into its ranking, which is sorted before and after.
void rank_scores(const Ranking& ranking, int64_t query, int64_t k, bool largest,
                 const float* scores, int64_t count, int64_t first_index, const Slot& slot) {
  float* best = ranking.scores + query * k;
  int64_t* indices = ranking.indices + query * k;
  int64_t found = indices[k - 1] < 0
                      ? find_first_candidates(largest, k, scores, count, slot.keys)
                      : find_candidates(largest, best[k - 1], scores, count, slot.keys);
  if (found > k) {
    std::nth_element(slot.keys, slot.keys + k, slot.keys + found);
    found = k;
  }
  if (found == 0) return;
  std::sort(slot.keys, slot.keys + found);
  std::copy(best, best + k, slot.scores);
  std::copy(indices, indices + k, slot.indices);
  for (int64_t at = 0, old = 0, next = 0; at < k; ++at) {
    const int64_t position =
        static_cast<int64_t>(slot.keys[std::min(next, found - 1)] & 0xffffffff);
    const bool take_new =
        next < found && ranks_before(largest, scores[position], first_index + position,
                                     slot.scores[old], slot.indices[old]);
    best[at] = take_new ? scores[position] : slot.scores[old];
    indices[at] = take_new ? first_index + position : slot.indices[old];
    ++(take_new ? next : old);
  }
}

void reduce_query(const TopK& job, const float* scores, const Block& block, int64_t query,
                  const Slot& slot) {
  const int64_t first_index = job.index_offset + block.train;
  rank_scores(job.proponents, query, job.k, true, scores, block.trains, first_index, slot);
  rank_scores(job.opponents, query, job.k, false, scores, block.trains, first_index, slot);
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
      // To pack beside few queries, memory is the limit: fewer rows at once, so that each is read on.
      const bool few_packed = job.queries > kFew && job.queries < kPanel / 2;
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

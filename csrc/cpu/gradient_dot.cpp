// out (B1, B2) += inner products of the gradients of two batches for one layer:
// out[i, j] += <G_i, G'_j>.
//
// linear: G_i (O, I + bias) = sum_s g_is [x_is, 1]^T. Two forms give the same result; the cheaper
// one is taken (cost.h counts both).
//
//   token pairs   <G_i, G'_j> = sum_{s,t} <g_is, g'_jt> (<x_is, x'_jt> + 1)
//                 The tokens of the second batch are packed into panels of 64, regardless of where
//                 its examples begin. An item is one panel and a few whole examples of the first
//                 batch: both Gram matrices are computed as `outer` tiles of 96 x 64 tokens, and
//                 while these are in the cache they are multiplied and summed over s. The sums over
//                 t for each pair of examples come last. Gradients are never formed, so this is
//                 cheap for short examples and wide layers.
//   formed        48 rows x 64 columns of the gradients of all examples are formed as `form` tiles,
//                 and all `inner` products of these pieces are added to the result before the next
//                 pieces are formed; a gradient is never in memory as a whole. An item is one of 16
//                 fixed shares of the pieces. Each share has its own float64 sums, and these are
//                 added in a fixed order, so the result does not depend on the number of threads.
//                 bfloat16 tokens are multiplied in pairs; formed numbers stay float32, because
//                 rounding them would cost accuracy.
//
// elementwise (LayerNorm): G_i (1 + bias, D) = [sum_s g_is x_is, sum_s g_is] is as small as one
// token. It is formed (an item is one example), then inner products are taken (an item is one
// pair).
//
// embedding: <G_i, G'_j> = sum of <g_is, g'_jt> over the tokens s, t with the same id; an item is
// one pair of examples.
//
// Bytes: token pairs read x and g of the first batch once per 64 tokens of the second; the formed
// path reads g I / 64 times and x O / 48 times, from the last-level cache or memory. Operations are
// counted in cost.h. That is tens to hundreds of operations per byte, so the multiply-add units are
// the limit, and for formed gradients of long examples memory as well.
#include <algorithm>
#include <cstring>
#include <utility>

#include "cost.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "scratch.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kRowTokens = 96;   // tokens of the first batch per tile of a Gram matrix
constexpr int64_t kFormedRows = 48;  // rows of a piece of a formed gradient; columns are kPanel
constexpr int64_t kShares = 16;      // fixed, so that sums do not depend on the number of threads

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// rows[n] = pointer to the row of x or g (width numbers) of read token begin + n, for n < count.
template <class T>
void find_rows(const Gradients& gradients, const int64_t* starts, const void* data, int64_t width,
               int64_t begin, int64_t count, const T** rows) {
  for_tokens(
      starts, gradients.batch, gradients.tokens, begin, begin + count,
      [&](int64_t n, int64_t row) { rows[n - begin] = static_cast<const T*>(data) + row * width; });
}

// Scratch of the token-pairs form.
struct PairsPlan {
  int64_t *starts1, *starts2;
  float *x, *g;  // packed tokens of the second batch: (panels, steps, kPanel)
  double* sums;  // (B1, panels, kPanel): example i with token t, summed over the tokens of i
  double* gram;  // (threads, 2, kRowTokens, kPanel): the Gram matrices of g and of x
};

template <class T>
PairsPlan plan_pairs(Scratch& scratch, const Gradients& first, const Gradients& second,
                     int threads) {
  PairsPlan plan{};
  const int64_t panels = ceil_div(total_tokens(second), kPanel);
  plan.starts1 = scratch.take<int64_t>(first.batch + 1);
  plan.starts2 = scratch.take<int64_t>(second.batch + 1);
  plan.x = scratch.take<float>(panels * kPanel * steps_of<T>(first.in));
  plan.g = scratch.take<float>(panels * kPanel * steps_of<T>(first.out));
  plan.sums = scratch.take<double>(first.batch * panels * kPanel);
  plan.gram = scratch.take<double>(threads * 2 * kRowTokens * kPanel);
  return plan;
}

// Computes sums[i, t] for the tokens t of one panel and the examples i in [begin, end) of the first
// batch. The rows of the Gram matrices are read tokens of all these examples in a row; each is
// added to the sums of its own example.
template <class T>
void sum_panel(const Gradients& first, const PairsPlan& plan, int64_t begin, int64_t end,
               int64_t panel, int64_t tokens2, double bias, double* gram) {
  const int64_t columns = padded(std::min(kPanel, tokens2 - panel * kPanel));
  const int64_t stride = ceil_div(tokens2, kPanel) * kPanel;
  const float* x = plan.x + panel * kPanel * steps_of<T>(first.in);
  const float* g = plan.g + panel * kPanel * steps_of<T>(first.out);
  double* sums = plan.sums + panel * kPanel;
  double *gram_g = gram, *gram_x = gram + kRowTokens * kPanel;
  const T* rows[kRowTokens];
  for (int64_t i = begin; i < end; ++i) {
    std::fill(sums + i * stride, sums + i * stride + columns, 0.0);
  }
  const int64_t stop = plan.starts1[end];
  for (int64_t s = plan.starts1[begin]; s < stop; s += kRowTokens) {
    const int64_t count = std::min(kRowTokens, stop - s);
    std::fill(gram, gram + 2 * kRowTokens * kPanel, 0.0);
    find_rows(first, plan.starts1, first.g, first.out, s, count, rows);
    outer(rows, count, g, columns, first.out, gram_g, kPanel);
    find_rows(first, plan.starts1, first.x, first.in, s, count, rows);
    outer(rows, count, x, columns, first.in, gram_x, kPanel);
    for_tokens(plan.starts1, first.batch, 1, s, s + count, [&](int64_t n, int64_t) {
      const int64_t i = std::upper_bound(plan.starts1, plan.starts1 + end, n) - plan.starts1 - 1;
      const int64_t at = (n - s) * kPanel;
      tiles().add_products(columns, 1.0, gram_g + at, gram_x + at, bias, sums + i * stride);
    });
  }
}

template <class T>
void dot_pairs(const Gradients& first, const Gradients& second, bool bias, const PairsPlan& plan,
               float* out, int threads) {
  count_tokens(first, plan.starts1);
  count_tokens(second, plan.starts2);
  const int64_t tokens2 = plan.starts2[second.batch], panels = ceil_div(tokens2, kPanel);
  parallel_for(threads, panels, [&](int64_t panel, int) {
    const int64_t begin = panel * kPanel, count = std::min(kPanel, tokens2 - begin);
    const T* rows[kPanel];
    find_rows(second, plan.starts2, second.x, second.in, begin, count, rows);
    pack(rows, count, second.in, plan.x + begin * steps_of<T>(second.in));
    find_rows(second, plan.starts2, second.g, second.out, begin, count, rows);
    pack(rows, count, second.out, plan.g + begin * steps_of<T>(second.out));
  });
  // An item has whole examples, so that it owns their sums; about four tiles of rows.
  const int64_t group = ceil_div(4 * kRowTokens, std::max<int64_t>(1, first.tokens));
  const int64_t groups = ceil_div(first.batch, group);
  parallel_for(threads, groups * panels, [&](int64_t item, int slot) {
    const int64_t begin = item / panels * group, end = std::min(first.batch, begin + group);
    sum_panel<T>(first, plan, begin, end, item % panels, tokens2, bias ? 1.0 : 0.0,
                 plan.gram + slot * 2 * kRowTokens * kPanel);
  });
  parallel_for(threads, first.batch, [&](int64_t i, int) {
    const double* sums = plan.sums + i * panels * kPanel;
    for (int64_t j = 0; j < second.batch; ++j) {
      double total = 0.0;
      for (int64_t t = plan.starts2[j]; t < plan.starts2[j + 1]; ++t) total += sums[t];
      out[i * second.batch + j] += static_cast<float>(total);
    }
  });
}

// The read tokens of a batch in steps, laid out as `form` reads them. Each example starts a new
// step, so that a pair of bfloat16 never mixes two examples.
struct Packed {
  int64_t* starts;  // (B + 1,) first step of each example
  float* x;         // per example (panels, steps, kPanel); the bias adds a column of ones
  float* g;         // per example (groups of rows, steps, kFormedRows)
};

// Scratch of the formed path.
struct FormedPlan {
  Packed first, second;
  int64_t columns;           // of a gradient: I + bias
  int64_t x_width, g_width;  // columns in whole panels; rows O in whole groups of kFormedRows
  float* formed;             // (threads, B1 + B2, kFormedRows, kPanel)
  double* products;          // (kShares, B1, B2)
};

template <class T>
int64_t total_steps(const Gradients& gradients) {
  int64_t total = 0;
  for (int64_t b = 0; b < gradients.batch; ++b) total += steps_of<T>(length_of(gradients, b));
  return total;
}

template <class T>
FormedPlan plan_formed(Scratch& scratch, const Gradients& first, const Gradients& second, bool bias,
                       int threads) {
  FormedPlan plan{};
  plan.columns = first.in + (bias ? 1 : 0);
  plan.x_width = ceil_div(plan.columns, kPanel) * kPanel;
  plan.g_width = ceil_div(first.out, kFormedRows) * kFormedRows;
  for (const auto& [gradients, packed] :
       {std::pair(&first, &plan.first), {&second, &plan.second}}) {
    const int64_t steps = total_steps<T>(*gradients);
    packed->starts = scratch.take<int64_t>(gradients->batch + 1);
    packed->x = scratch.take<float>(steps * plan.x_width);
    packed->g = scratch.take<float>(steps * plan.g_width);
  }
  plan.formed = scratch.take<float>(threads * (first.batch + second.batch) * kFormedRows * kPanel);
  plan.products = scratch.take<double>(kShares * first.batch * second.batch);
  return plan;
}

void pack_columns(const float* from, int64_t tokens, int64_t size, int64_t count, int64_t width,
                  float* to) {
  for (int64_t s = 0; s < tokens; ++s) std::copy_n(from + s * size, count, to + s * width);
}
void pack_columns(const bfloat16* from, int64_t tokens, int64_t size, int64_t count, int64_t width,
                  float* to) {
  tiles().pack_tokens(from, tokens, size, count, width, to);
}

// Address of the number 1 in the type of the argument.
const float* address_of_one(const float*) {
  static constexpr float kOne = 1.0f;
  return &kOne;
}
const bfloat16* address_of_one(const bfloat16*) {
  static constexpr bfloat16 kOne = {0x3f80};
  return &kOne;
}

// to (ceil(size / width), steps, width) = the tokens of x or g of one example; behind the last
// column a column of ones if `ones`, then zeros.
template <class T>
void pack_tokens(const T* from, int64_t length, int64_t size, bool ones, int64_t width, float* to) {
  const int64_t steps = steps_of<T>(length);
  for (int64_t begin = 0; begin < size + ones; begin += width, to += steps * width) {
    const int64_t count = std::clamp<int64_t>(size - begin, 0, width);
    pack_columns(from + begin, length, size, count, width, to);
    if (count == width) continue;
    for (int64_t s = 0; s < steps; ++s) {
      std::fill(to + s * width + count, to + (s + 1) * width, 0.0f);
    }
    // A row size of 0 makes every token read the same number 1.
    if (ones) pack_columns(address_of_one(from), length, 0, 1, width, to + count);
  }
}

// formed (B, rows, columns) = rows [o, o + rows) of one panel of columns of every example's
// gradient.
template <class T>
void form_chunk(const FormedPlan& plan, const Packed& packed, int64_t batch, int64_t o,
                int64_t rows, int64_t panel, int64_t columns, float* formed) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = packed.starts[b], steps = packed.starts[b + 1] - start;
    const float* x = packed.x + start * plan.x_width + panel * kPanel * steps;
    const float* g = packed.g + start * plan.g_width + o * steps;
    form<T>(g, kFormedRows, rows, x, columns, steps, formed + b * rows * columns, columns);
  }
}

// products (B1, B2) += inner products of the rows of first (B1, depth) and second (B2, depth).
void add_inner_products(const float* first, int64_t batch1, const float* second, int64_t batch2,
                        int64_t depth, double* products) {
  const float *a[kRowTokens], *b[kPanel];
  for (int64_t j = 0; j < batch2; j += kPanel) {
    const int64_t count = std::min(kPanel, batch2 - j);
    for (int64_t n = 0; n < count; ++n) b[n] = second + (j + n) * depth;
    for (int64_t i = 0; i < batch1; i += kRowTokens) {
      const int64_t rows = std::min(kRowTokens, batch1 - i);
      for (int64_t m = 0; m < rows; ++m) a[m] = first + (i + m) * depth;
      inner(a, rows, b, count, depth, products + i * batch2 + j, batch2);
    }
  }
}

template <class T>
void pack_batch(const Gradients& gradients, bool bias, const FormedPlan& plan, const Packed& packed,
                int threads) {
  packed.starts[0] = 0;
  for (int64_t b = 0; b < gradients.batch; ++b) {
    packed.starts[b + 1] = packed.starts[b] + steps_of<T>(length_of(gradients, b));
  }
  parallel_for(threads, gradients.batch, [&](int64_t b, int) {
    const int64_t length = length_of(gradients, b), row = b * gradients.tokens;
    pack_tokens(static_cast<const T*>(gradients.x) + row * gradients.in, length, gradients.in, bias,
                kPanel, packed.x + packed.starts[b] * plan.x_width);
    pack_tokens(static_cast<const T*>(gradients.g) + row * gradients.out, length, gradients.out,
                false, kFormedRows, packed.g + packed.starts[b] * plan.g_width);
  });
}

template <class T>
void dot_formed(const Gradients& first, const Gradients& second, bool bias, const FormedPlan& plan,
                float* out, int threads) {
  pack_batch<T>(first, bias, plan, plan.first, threads);
  pack_batch<T>(second, bias, plan, plan.second, threads);
  const int64_t pairs = first.batch * second.batch;
  const int64_t panels = plan.x_width / kPanel;
  const int64_t chunks = plan.g_width / kFormedRows * panels;
  parallel_for(threads, kShares, [&](int64_t share, int slot) {
    double* products = plan.products + share * pairs;
    float* formed1 = plan.formed + slot * (first.batch + second.batch) * kFormedRows * kPanel;
    float* formed2 = formed1 + first.batch * kFormedRows * kPanel;
    std::fill(products, products + pairs, 0.0);
    for (int64_t chunk = share; chunk < chunks; chunk += kShares) {
      const int64_t panel = chunk % panels, o = chunk / panels * kFormedRows;
      const int64_t rows = std::min(kFormedRows, first.out - o);
      const int64_t columns = std::min(kPanel, padded(plan.columns) - panel * kPanel);
      form_chunk<T>(plan, plan.first, first.batch, o, rows, panel, columns, formed1);
      form_chunk<T>(plan, plan.second, second.batch, o, rows, panel, columns, formed2);
      add_inner_products(formed1, first.batch, formed2, second.batch, rows * columns, products);
    }
  });
  for (int64_t i = 0; i < first.batch; ++i) {
    for (int64_t j = 0; j < second.batch; ++j) {
      double total = 0.0;
      for (int64_t share = 0; share < kShares; ++share) {
        total += plan.products[share * pairs + i * second.batch + j];
      }
      out[i * second.batch + j] += static_cast<float>(total);
    }
  }
}

template <class T>
double sum_equal_ids(const Gradients& first, int64_t i, const Gradients& second, int64_t j) {
  const int64_t* ids1 = static_cast<const int64_t*>(first.x) + i * first.tokens;
  const int64_t* ids2 = static_cast<const int64_t*>(second.x) + j * second.tokens;
  double total = 0.0;
  for (int64_t s = 0; s < length_of(first, i); ++s) {
    const T* g1 = static_cast<const T*>(first.g) + (i * first.tokens + s) * first.out;
    for (int64_t t = 0; t < length_of(second, j); ++t) {
      if (ids1[s] != ids2[t]) continue;
      const T* g2 = static_cast<const T*>(second.g) + (j * second.tokens + t) * first.out;
      total += dot(g1, g2, first.out);
    }
  }
  return total;
}

template <class T>
void dot_embedding(const Gradients& first, const Gradients& second, float* out, int threads) {
  parallel_for(threads, first.batch * second.batch, [&](int64_t item, int) {
    const int64_t i = item / second.batch, j = item % second.batch;
    out[item] += static_cast<float>(sum_equal_ids<T>(first, i, second, j));
  });
}

// sums (B, rows, D) = the weight gradients and, with a bias, the bias gradients behind them.
template <class T>
void form_elementwise(const Gradients& gradients, bool bias, float* sums, int threads) {
  const int64_t size = gradients.in, rows = bias ? 2 : 1;
  parallel_for(threads, gradients.batch, [&](int64_t b, int) {
    constexpr int64_t kBlock = 256;
    const T* x = static_cast<const T*>(gradients.x) + b * gradients.tokens * size;
    const T* g = static_cast<const T*>(gradients.g) + b * gradients.tokens * size;
    for (int64_t d = 0; d < size; d += kBlock) {
      double weight[kBlock] = {}, shift[kBlock] = {};
      const int64_t count = std::min(kBlock, size - d);
      for (int64_t s = 0; s < length_of(gradients, b); ++s) {
        for (int64_t i = 0; i < count; ++i) {
          const double value = to_float(g[s * size + d + i]);
          weight[i] += value * static_cast<double>(to_float(x[s * size + d + i]));
          shift[i] += value;
        }
      }
      float* to = sums + b * rows * size + d;
      for (int64_t i = 0; i < count; ++i) {
        to[i] = static_cast<float>(weight[i]);
        if (bias) to[size + i] = static_cast<float>(shift[i]);
      }
    }
  });
}

template <class T>
void dot_elementwise(const Gradients& first, const Gradients& second, bool bias, float* memory,
                     float* out, int threads) {
  const int64_t depth = first.in * (bias ? 2 : 1);
  float *sums1 = memory, *sums2 = memory + first.batch * depth;
  form_elementwise<T>(first, bias, sums1, threads);
  form_elementwise<T>(second, bias, sums2, threads);
  parallel_for(threads, first.batch * second.batch, [&](int64_t item, int) {
    const float* a = sums1 + item / second.batch * depth;
    const float* b = sums2 + item % second.batch * depth;
    out[item] += static_cast<float>(dot(a, b, depth));
  });
}

template <class T>
bool uses_token_pairs(const Gradients& first, const Gradients& second) {
  return token_pairs_are_cheaper(total_tokens(first), total_tokens(second), first.batch,
                                 second.batch, first.in, first.out, numbers_per_step<T>());
}

// Computes the result and returns the size of the scratch memory. With out = nullptr and without
// memory it only computes the size.
template <class T>
size_t dispatch(const Gradients& first, const Gradients& second, Layer layer, bool bias, float* out,
                void* memory, int threads) {
  Scratch scratch(memory);
  if (layer == Layer::elementwise) {
    float* sums = scratch.take<float>((first.batch + second.batch) * first.in * 2);
    if (out != nullptr) dot_elementwise<T>(first, second, bias, sums, out, threads);
  } else if (layer == Layer::embedding) {
    if (out != nullptr) dot_embedding<T>(first, second, out, threads);
  } else if (uses_token_pairs<T>(first, second)) {
    const PairsPlan plan = plan_pairs<T>(scratch, first, second, threads);
    if (out != nullptr) dot_pairs<T>(first, second, bias, plan, out, threads);
  } else {
    const FormedPlan plan = plan_formed<T>(scratch, first, second, bias, threads);
    if (out != nullptr) dot_formed<T>(first, second, bias, plan, out, threads);
  }
  return scratch.bytes();
}

size_t dispatch(const Gradients& first, const Gradients& second, Layer layer, bool bias, float* out,
                void* memory, int threads) {
  return first.dtype == DType::bfloat16
             ? dispatch<bfloat16>(first, second, layer, bias, out, memory, threads)
             : dispatch<float>(first, second, layer, bias, out, memory, threads);
}

}  // namespace

size_t gradient_dot_scratch(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                            int threads) {
  return dispatch(first, second, layer, bias, nullptr, nullptr, threads);
}

void gradient_dot(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                  float* out, void* scratch, int threads) {
  dispatch(first, second, layer, bias, out, scratch, threads);
}

}  // namespace tracmod::cpu

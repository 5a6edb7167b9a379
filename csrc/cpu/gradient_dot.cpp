// out[i, j] += <G_i, G'_j>, the gradients of examples i and j of two batches for one layer.
//
// linear, G = sum_s g_s [x_s, 1]^T, in the cheaper of two forms (cost.h):
//   token pairs   sum_{s,t} <g_s, g'_t> (<x_s, x'_t> + 1): one pair of examples an item; both Gram
//                 matrices in tiles of 32 x 64 tokens, multiplied and summed while in cache.
//   formed        6 rows of every G (6, I + 1) as `outer` tiles, then all inner products of them as
//                 `dot` tiles: one of 16 fixed shares of the rows an item, the shares' sums added
//                 up in order. A gradient is never whole in memory.
// elementwise (LayerNorm): G = [sum_s g_s x_s, sum_s g_s] is short: formed, then inner products.
// embedding: sum over pairs of tokens with the same id of <g_s, g'_t>.
//
// Bytes: x and g of both batches are read from cache B or O / 6 times; operations as in cost.h,
// tens to hundreds a byte: the multiply-add units are the limit.
#include <algorithm>

#include "cost.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "scratch.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kRowTokens = 32;
constexpr int64_t kColumnTokens = 64;
constexpr int64_t kFormedRows = 6;
constexpr int64_t kShares = 16;
constexpr int64_t kColumnBlock = 64;

bool by_token_pairs(const Gradients& first, const Gradients& second) {
  return token_pairs_are_cheaper(total_tokens(first), total_tokens(second), first.batch,
                                 second.batch, first.in, first.out);
}

// One example's Gram tile: c[m][n] = <a row s + m, b row t + n>.
template <class T>
void gram_tile(const void* a, int64_t a_row, int64_t rows, const void* b, int64_t b_row,
               int64_t columns, int64_t depth, double* c) {
  const T* a_rows[kRowTokens];
  const T* b_rows[kColumnTokens];
  for (int64_t m = 0; m < rows; ++m) a_rows[m] = static_cast<const T*>(a) + (a_row + m) * depth;
  for (int64_t n = 0; n < columns; ++n) b_rows[n] = static_cast<const T*>(b) + (b_row + n) * depth;
  std::fill(c, c + rows * kColumnTokens, 0.0);
  dot(a_rows, rows, b_rows, columns, depth, c, kColumnTokens);
}

template <class T>
double sum_token_pairs(const Gradients& first, int64_t i, const Gradients& second, int64_t j,
                       double bias) {
  double gram_g[kRowTokens * kColumnTokens], gram_x[kRowTokens * kColumnTokens];
  const int64_t length1 = length_of(first, i), length2 = length_of(second, j);
  double total = 0.0;
  for (int64_t s = 0; s < length1; s += kRowTokens) {
    const int64_t rows = std::min(kRowTokens, length1 - s), row1 = i * first.tokens + s;
    for (int64_t t = 0; t < length2; t += kColumnTokens) {
      const int64_t columns = std::min(kColumnTokens, length2 - t), row2 = j * second.tokens + t;
      gram_tile<T>(first.g, row1, rows, second.g, row2, columns, first.out, gram_g);
      gram_tile<T>(first.x, row1, rows, second.x, row2, columns, first.in, gram_x);
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = 0; n < columns; ++n) {
          const int64_t at = m * kColumnTokens + n;
          total += gram_g[at] * (gram_x[at] + bias);
        }
      }
    }
  }
  return total;
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
      dot(&g1, 1, &g2, 1, first.out, &total, 1);
    }
  }
  return total;
}

// A batch's tokens as padded float32 rows: x with its column of ones, and g.
struct Rows {
  int64_t* starts;
  float *x, *g;
  int64_t x_width, g_width;
};

struct Plan {
  Rows first, second;
  float* formed;     // (threads, B1 + B2, kFormedRows, x_width)
  double* products;  // (kShares, B1, B2)
};

Rows plan_rows(Scratch& scratch, const Gradients& gradients, bool bias) {
  Rows rows{};
  rows.x_width = padded(gradients.in + (bias ? 1 : 0));
  rows.g_width = padded(gradients.out);
  const int64_t tokens = total_tokens(gradients);
  rows.starts = scratch.take<int64_t>(gradients.batch + 1);
  rows.x = scratch.take<float>(tokens * rows.x_width);
  rows.g = scratch.take<float>(tokens * rows.g_width);
  return rows;
}

Plan plan_formed(Scratch& scratch, const Gradients& first, const Gradients& second, bool bias,
                 int threads) {
  Plan plan{};
  plan.first = plan_rows(scratch, first, bias);
  plan.second = plan_rows(scratch, second, bias);
  plan.formed = scratch.take<float>(threads * (first.batch + second.batch) * kFormedRows *
                                    plan.first.x_width);
  plan.products = scratch.take<double>(kShares * first.batch * second.batch);
  return plan;
}

template <class T>
void widen_rows(const Gradients& gradients, const Rows& rows, bool bias, int threads) {
  count_tokens(gradients, rows.starts);
  parallel_for(threads, gradients.batch, [&](int64_t b, int) {
    for (int64_t n = rows.starts[b]; n < rows.starts[b + 1]; ++n) {
      const int64_t row = b * gradients.tokens + n - rows.starts[b];
      widen(static_cast<const T*>(gradients.x) + row * gradients.in, gradients.in, bias ? 1 : 0,
            rows.x_width, rows.x + n * rows.x_width);
      widen(static_cast<const T*>(gradients.g) + row * gradients.out, gradients.out, 0,
            rows.g_width, rows.g + n * rows.g_width);
    }
  });
}

// Rows [o, o + count) of every example's gradient; rows beyond count are zero.
void form_rows(const Rows& rows, int64_t batch, int64_t o, int64_t count, float* formed) {
  double sums[kFormedRows * kColumnBlock];
  const float* a[kFormedRows];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = rows.starts[b], tokens = rows.starts[b + 1] - begin;
    float* to = formed + b * kFormedRows * rows.x_width;
    for (int64_t m = 0; m < count; ++m) a[m] = rows.g + begin * rows.g_width + o + m;
    for (int64_t n = 0; n < rows.x_width; n += kColumnBlock) {
      const int64_t columns = std::min(kColumnBlock, rows.x_width - n);
      std::fill(sums, sums + kFormedRows * kColumnBlock, 0.0);
      tiles().outer(a, rows.g_width, count, rows.x + begin * rows.x_width + n, rows.x_width,
                    columns, tokens, sums, kColumnBlock);
      for (int64_t m = 0; m < kFormedRows; ++m) {
        for (int64_t j = 0; j < columns; ++j) {
          to[m * rows.x_width + n + j] = static_cast<float>(sums[m * kColumnBlock + j]);
        }
      }
    }
  }
}

// products (B1, B2) += inner products of rows of `depth` numbers.
void add_products(const float* first, int64_t batch1, const float* second, int64_t batch2,
                  int64_t depth, double* products) {
  const float *a[kRowTokens], *b[kColumnTokens];
  for (int64_t i = 0; i < batch1; i += kRowTokens) {
    const int64_t rows = std::min(kRowTokens, batch1 - i);
    for (int64_t m = 0; m < rows; ++m) a[m] = first + (i + m) * depth;
    for (int64_t j = 0; j < batch2; j += kColumnTokens) {
      const int64_t columns = std::min(kColumnTokens, batch2 - j);
      for (int64_t n = 0; n < columns; ++n) b[n] = second + (j + n) * depth;
      dot(a, rows, b, columns, depth, products + i * batch2 + j, batch2);
    }
  }
}

template <class T>
void dot_formed(const Gradients& first, const Gradients& second, bool bias, const Plan& plan,
                float* out, int threads) {
  widen_rows<T>(first, plan.first, bias, threads);
  widen_rows<T>(second, plan.second, bias, threads);
  const int64_t pairs = first.batch * second.batch;
  const int64_t row_size = kFormedRows * plan.first.x_width;
  parallel_for(threads, kShares, [&](int64_t share, int slot) {
    double* products = plan.products + share * pairs;
    float* formed1 = plan.formed + slot * (first.batch + second.batch) * row_size;
    float* formed2 = formed1 + first.batch * row_size;
    std::fill(products, products + pairs, 0.0);
    for (int64_t o = share * kFormedRows; o < first.out; o += kShares * kFormedRows) {
      const int64_t count = std::min(kFormedRows, first.out - o);
      form_rows(plan.first, first.batch, o, count, formed1);
      form_rows(plan.second, second.batch, o, count, formed2);
      add_products(formed1, first.batch, formed2, second.batch, row_size, products);
    }
  });
  for (int64_t at = 0; at < pairs; ++at) {
    double total = 0.0;
    for (int64_t share = 0; share < kShares; ++share) total += plan.products[share * pairs + at];
    out[at] += static_cast<float>(total);
  }
}

// sums (B, rows, D): weight gradients, and bias gradients behind them.
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
    double total = 0.0;
    dot(&a, 1, &b, 1, depth, &total, 1);
    out[item] += static_cast<float>(total);
  });
}

template <class T>
void dispatch(const Gradients& first, const Gradients& second, Layer layer, bool bias, float* out,
              void* memory, int threads) {
  Scratch scratch(memory);
  if (layer == Layer::elementwise) {
    const int64_t size = (first.batch + second.batch) * first.in * 2;
    dot_elementwise<T>(first, second, bias, scratch.take<float>(size), out, threads);
    return;
  }
  if (layer == Layer::linear && !by_token_pairs(first, second)) {
    dot_formed<T>(first, second, bias, plan_formed(scratch, first, second, bias, threads), out,
                  threads);
    return;
  }
  parallel_for(threads, first.batch * second.batch, [&](int64_t item, int) {
    const int64_t i = item / second.batch, j = item % second.batch;
    const double total = layer == Layer::linear
                             ? sum_token_pairs<T>(first, i, second, j, bias ? 1.0 : 0.0)
                             : sum_equal_ids<T>(first, i, second, j);
    out[item] += static_cast<float>(total);
  });
}

}  // namespace

size_t gradient_dot_scratch(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                            int threads) {
  Scratch scratch;
  if (layer == Layer::elementwise) {
    scratch.take<float>((first.batch + second.batch) * first.in * 2);
  } else if (layer == Layer::linear && !by_token_pairs(first, second)) {
    plan_formed(scratch, first, second, bias, threads);
  }
  return scratch.bytes();
}

void gradient_dot(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                  float* out, void* scratch, int threads) {
  if (first.dtype == DType::bfloat16) {
    dispatch<bfloat16>(first, second, layer, bias, out, scratch, threads);
  } else {
    dispatch<float>(first, second, layer, bias, out, scratch, threads);
  }
}

}  // namespace tracmod::cpu

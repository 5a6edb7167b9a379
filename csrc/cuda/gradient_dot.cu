// out (B1, B2) += inner products of the gradients of two batches for one layer:
// out[i, j] += <G_i, G'_j>.
//
// linear: G_i (O, I + bias) = sum_s g_is [x_is, 1]^T. Two forms give the same result; the cheaper
// one is taken (cost.h). The host does not know lengths on the GPU, so the choice counts padded
// tokens.
//
//   token pairs  <G_i, G'_j> = sum_{s,t} <g_is, g'_jt> (<x_is, x'_jt> + 1), by sum_token_pairs.
//                A block owns a tile of 128 x 128 tokens: several whole examples of each batch if
//                they are that short, else one pair of examples, tile by tile. The Gram tile of g
//                is kept in shared memory and multiplied by that of x. Then a thread adds up one
//                example's part of a row, and a thread the rows of one pair.
//                Operations per pair: 2 S S' (I + O). Bytes through L2: S S' (I + O) (4 or 2) / 64.
//   formed       Parts of 128 x 128 numbers of all gradients are formed in scratch, as many at a
//                time as stay in L2 (form_tiles: a block owns one part of one example). Their inner
//                products are added up over the parts (dot_shares: a block owns 128 x 128 pairs of
//                examples and a share of the numbers), and add_shares adds the shares in order.
//                Operations: 2 (n + n') I O, and 2 B B' I O in float32, because formed gradients
//                are float32. Bytes through L2: 8 (B + B') I O.
//
// elementwise (LayerNorm): G_i (1 + bias, D) = [sum_s g_is x_is, sum_s g_is] is formed in scratch
// (form_elementwise: a thread owns one feature), then dot_rows takes the inner products (a block
// owns one pair). Memory is the limit: one read of x and g.
//
// embedding: sum_equal_ids adds <g_is, g'_jt> over tokens s, t with the same id. A block owns one
// pair; each of its warps takes a token of the first example and looks through the second.
//
// Limits on an H200 (4.8 TB/s, 989 TFLOP/s of bfloat16, a sixth of that for float32 in three tf32
// products): the tensor cores and L2 for token pairs, L2 and the float32 products for formed
// gradients. This file has not run on a GPU yet. Infinite float32 values give NaN (mma.cuh).
#include <algorithm>

#include "cost.h"
#include "cuda/product.cuh"
#include "scratch.h"

namespace tracmod::cuda {
namespace {

constexpr char kOp[] = "gradient_dot";
constexpr int kThreads = kProductThreads;
constexpr int kPadded = kSide + 1;  // puts a column of a Gram tile into different banks
// The tensor cores round towards zero, so all elements of a Gram tile or of a gradient are slightly
// too small, and the errors of a sum of their products add up instead of cancelling. Hence chains
// are shorter here than for a product that is a result by itself.
constexpr int kShortChain = 64;
constexpr int kPairBytes = kProductBytes + kSide * kPadded * static_cast<int>(sizeof(float));
constexpr int64_t kPart128 = int64_t{kSide} * kSide;  // numbers of a formed part
constexpr int64_t kFormedBytes = int64_t{1} << 25;    // scratch for the parts of all examples
constexpr int64_t kBlocks = 264;                      // enough blocks to fill a GPU

struct Batches {
  const void *x1, *g1, *x2, *g2;
  Lengths lengths1, lengths2;
  int64_t batch1, batch2, in, out;
};

// Thread 0 returns the sum of `value` over the threads of the block, the others 0. The tree of
// additions has a fixed shape, so the sum repeats bit by bit.
__device__ double block_sum(double value) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  for (unsigned width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) values[threadIdx.x] += values[threadIdx.x + width];
  }
  return threadIdx.x == 0 ? values[0] : 0.0;  // no other thread may read it without a barrier
}

// Adds the block's sum to the result of its pair.
__device__ void add_pair(double value, bool invalid, float* out) {
  const double total = block_sum(value);
  if (threadIdx.x == 0) *out += invalid ? not_a_number() : static_cast<float>(total);
}

// How the tokens of a batch fill tiles of 128 rows: `examples` whole examples of `span` tokens
// each; or, if an example has more than 128 tokens, one example that takes several tiles.
struct Layout {
  int span, examples;
  int64_t tiles;
};

Layout layout_of(const Gradients& gradients) {
  const int span = static_cast<int>(std::min<int64_t>(gradients.tokens, kSide));
  const int examples = span == 0 ? kSide : kSide / span;
  return {span, examples, ceil_div(gradients.batch, examples)};
}

// An operand of multiply_rows (product.cuh) whose rows are the tokens of a tile. A row without a
// token reads as zeros.
template <class T>
struct TokenSide {
  const T* first;
  int64_t stride;
  const int64_t* tokens;  // (128,) token of each row, or -1; in shared memory
  int count;

  __device__ const T* base() const { return first; }
  __device__ int rows() const { return count; }
  __device__ const T* operator()(int row) const {
    return tokens[row] < 0 ? nullptr : first + tokens[row] * stride;
  }
};

// Sets tokens[row] of the tile whose first row is token `begin` of example `first_example`.
__device__ void find_tokens(const Lengths& lengths, int64_t batch, const Layout& layout,
                            int64_t first_example, int64_t begin, int row, int64_t* tokens) {
  tokens[row] = -1;
  const int64_t token = begin + (layout.span == 0 ? 0 : row % layout.span);
  const int64_t example = first_example + (layout.span == 0 ? row : row / layout.span);
  if (row >= layout.examples * layout.span || example >= batch) return;
  if (token < lengths.of(example)) tokens[row] = example * lengths.tokens + token;
}

// Computes the products a b^T of a tile of tokens. The first call (for g) stores them in `gram`;
// the second (for x) multiplies gram[row][column] by product + bias.
template <class T>
__device__ void gram_tile(const TokenSide<T>& a, const TokenSide<T>& b, int unit, char* memory,
                          bool first, float bias, float* gram) {
  TileSums<> total = {};
  multiply_rows<T, true, kShortChain>(a, b, a.stride, unit, memory, [&](const TileSums<>& sums) {
    for_tile([&](int m, int n, int i) { total[m][n][i] += sums[m][n][i]; });
  });
  for_tile([&](int m, int n, int i) {
    float& at = gram[tile_row_of(m, i) * kPadded + tile_column_of(n, i)];
    at = first ? total[m][n][i] : at * (total[m][n][i] + bias);
  });
}

// Sums each row over the columns of each example; the sum replaces the example's first column.
__device__ void sum_rows(const Layout& layout1, const Layout& layout2, float* gram) {
  for (int at = static_cast<int>(threadIdx.x); at < kSide * layout2.examples; at += kThreads) {
    if (at % kSide >= layout1.examples * layout1.span) continue;
    float* values = gram + at % kSide * kPadded + at / kSide * layout2.span;
    double sum = 0.0;
    for (int t = 0; t < layout2.span; ++t) sum += static_cast<double>(values[t]);
    values[0] = static_cast<float>(sum);
  }
}

// out[i, j] += sum_{s,t} <g_is, g'_jt> (<x_is, x'_jt> + bias); a block owns one tile or, for long
// examples, all tiles of one pair.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sum_token_pairs(Batches batches, Layout layout1, Layout layout2, int g_unit, int x_unit,
                    float bias, float* out) {
  __shared__ int64_t tokens1[kSide], tokens2[kSide];
  char* memory = dynamic_shared();
  float* gram = reinterpret_cast<float*>(memory + kProductBytes);
  const int64_t i = blockIdx.x / layout2.tiles * layout1.examples;
  const int64_t j = blockIdx.x % layout2.tiles * layout2.examples;
  const int rows = layout1.examples * layout1.span, columns = layout2.examples * layout2.span;
  const auto side1 = [&](const void* values, int64_t size) {
    return TokenSide<T>{static_cast<const T*>(values), size, tokens1, rows};
  };
  const auto side2 = [&](const void* values, int64_t size) {
    return TokenSide<T>{static_cast<const T*>(values), size, tokens2, columns};
  };
  // If either batch has long examples, a block has several tiles and at most 128 pairs, so that one
  // thread per pair can keep its sum in a register.
  const bool long1 = batches.lengths1.tokens > kSide, long2 = batches.lengths2.tokens > kSide;
  const int64_t end1 = long1 ? batches.lengths1.of(i) : layout1.span;
  const int64_t end2 = long2 ? batches.lengths2.of(j) : layout2.span;
  const int pairs = layout1.examples * layout2.examples, thread = static_cast<int>(threadIdx.x);
  const auto pair_sum = [&](int pair) {
    const int row = pair / layout2.examples * layout1.span;
    const int column = pair % layout2.examples * layout2.span;
    double sum = 0.0;
    for (int s = 0; s < layout1.span; ++s) {
      sum += static_cast<double>(gram[(row + s) * kPadded + column]);
    }
    return sum;
  };
  double total = 0.0;
  for (int64_t s = 0; s < end1; s += kSide) {
    for (int64_t t = 0; t < end2; t += kSide) {
      if (thread < kSide) {
        find_tokens(batches.lengths1, batches.batch1, layout1, i, s, thread, tokens1);
      } else {
        find_tokens(batches.lengths2, batches.batch2, layout2, j, t, thread - kSide, tokens2);
      }
      __syncthreads();
      gram_tile(side1(batches.g1, batches.out), side2(batches.g2, batches.out), g_unit, memory,
                true, 0.0f, gram);
      gram_tile(side1(batches.x1, batches.in), side2(batches.x2, batches.in), x_unit, memory, false,
                bias, gram);
      __syncthreads();
      sum_rows(layout1, layout2, gram);
      __syncthreads();
      // The next tile overwrites `gram` only behind its first barrier.
      if ((long1 || long2) && thread < pairs) total += pair_sum(thread);
    }
  }
  for (int pair = thread; pair < pairs; pair += kThreads) {
    const int64_t row = i + pair / layout2.examples, column = j + pair % layout2.examples;
    if (row >= batches.batch1 || column >= batches.batch2) continue;
    const bool has_tokens = end1 > 0 && end2 > 0;  // else `gram` was never written
    const double sum = long1 || long2 ? total : has_tokens ? pair_sum(pair) : 0.0;
    const bool invalid = batches.lengths1.invalid(row) || batches.lengths2.invalid(column);
    out[row * batches.batch2 + column] += invalid ? not_a_number() : static_cast<float>(sum);
  }
}

// formed (B, parts, 128, 128) = parts [part, part + parts) of each example's gradient, zeros past O
// and I. Part p has rows from 128 (p / columns) and columns from 128 (p % columns); a block owns
// one part of one example.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    form_tiles(const T* x, const T* g, Lengths lengths, int64_t in, int64_t out, int unit,
               int64_t part, int64_t parts, float* formed) {
  char* memory = dynamic_shared();
  const int64_t b = blockIdx.x / parts, at = part + blockIdx.x % parts;
  const int64_t columns = ceil_div(in, kSide), length = lengths.of(b);
  const int64_t o = at / columns * kSide, i = at % columns * kSide;
  const MatrixColumnsSide<T> rows_side{g + b * lengths.tokens * out + o, out, out - o, length};
  const MatrixColumnsSide<T> columns_side{x + b * lengths.tokens * in + i, in, in - i, length};
  TileSums<> total = {};
  multiply_columns<T, kShortChain>(
      rows_side, columns_side, length, unit, memory, [&](const TileSums<>& sums) {
        for_tile([&](int m, int n, int k) { total[m][n][k] += sums[m][n][k]; });
      });
  float* to = formed + blockIdx.x * kPart128;
  for_tile([&](int m, int n, int k) {
    to[tile_row_of(m, k) * kSide + tile_column_of(n, k)] = total[m][n][k];
  });
}

// sums (B, O) = the gradients of the bias; a thread owns one number.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_tokens(const T* g, Lengths lengths, int64_t out, float* sums) {
  const int64_t o = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x, b = blockIdx.x;
  if (o >= out) return;
  float sum = 0.0f;
  for (int64_t s = 0; s < lengths.of(b); ++s)
    sum += to_float(g[(b * lengths.tokens + s) * out + o]);
  sums[b * out + o] = sum;
}

// Inner products of the rows of first (B1, depth) and second (B2, depth). The depth is divided into
// shares, so that few pairs can still fill the GPU.
struct Products {
  const float *first, *second;
  int64_t batch1, batch2, depth;
  int unit;
  int64_t shares;
  bool overwrite;  // write the products instead of adding to them
  double* to;      // (shares, B1, B2)
};

// A block owns a tile of 128 x 128 pairs and one share of the depth.
__global__ void __launch_bounds__(kThreads, 1) dot_shares(Products job) {
  char* memory = dynamic_shared();
  const int64_t tiles2 = ceil_div(job.batch2, kSide), share = blockIdx.y;
  const int64_t i = blockIdx.x / tiles2 * kSide, j = blockIdx.x % tiles2 * kSide;
  const int64_t size = ceil_div(ceil_div(job.depth, job.shares), kChain) * kChain;
  const int64_t begin = share * size;
  const int64_t left = job.depth - begin, depth = left < 0 ? 0 : left < size ? left : size;
  const MatrixSide<float> a{job.first + i * job.depth + begin, job.depth, job.batch1 - i};
  const MatrixSide<float> b{job.second + j * job.depth + begin, job.depth, job.batch2 - j};
  TileSums<> total = {};
  multiply_rows<float, true>(a, b, depth, job.unit, memory, [&](const TileSums<>& sums) {
    for_tile([&](int m, int n, int k) { total[m][n][k] += sums[m][n][k]; });
  });
  for_tile([&](int m, int n, int k) {
    const int64_t row = i + tile_row_of(m, k), column = j + tile_column_of(n, k);
    if (row >= job.batch1 || column >= job.batch2) return;
    double& to = job.to[(share * job.batch1 + row) * job.batch2 + column];
    to = (job.overwrite ? 0.0 : to) + static_cast<double>(total[m][n][k]);
  });
}

// out += the sum of the shares, in order; a thread owns one pair.
__global__ void __launch_bounds__(kThreads)
    add_shares(Batches batches, const double* products, int64_t shares, float* out) {
  const int64_t pairs = batches.batch1 * batches.batch2;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= pairs) return;
  double sum = 0.0;
  for (int64_t share = 0; share < shares; ++share) sum += products[share * pairs + pair];
  const bool invalid = batches.lengths1.invalid(pair / batches.batch2) ||
                       batches.lengths2.invalid(pair % batches.batch2);
  out[pair] += invalid ? not_a_number() : static_cast<float>(sum);
}

// sums (B, rows, D) = the weight gradients and, with a bias, the bias gradients behind them; a
// thread owns one feature of one example.
template <class T>
__global__ void form_elementwise(const T* x, const T* g, Lengths lengths, int64_t size, int rows,
                                 float* sums) {
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x, b = blockIdx.x;
  if (d >= size) return;
  float weight = 0.0f, shift = 0.0f;
  for (int64_t s = 0; s < lengths.of(b); ++s) {
    const int64_t at = (b * lengths.tokens + s) * size + d;
    const float value = to_float(g[at]);
    weight += value * to_float(x[at]);
    shift += value;
  }
  sums[b * rows * size + d] = weight;
  if (rows == 2) sums[(b * rows + 1) * size + d] = shift;
}

// out[i, j] += <sums1[i], sums2[j]>; a block owns one pair.
__global__ void __launch_bounds__(kThreads)
    dot_rows(Batches batches, const float* sums1, const float* sums2, int64_t width, float* out) {
  const int64_t i = blockIdx.x / batches.batch2, j = blockIdx.x % batches.batch2;
  double total = 0.0;
  for (int64_t d = threadIdx.x; d < width; d += kThreads) {
    total += static_cast<double>(sums1[i * width + d]) * static_cast<double>(sums2[j * width + d]);
  }
  add_pair(total, batches.lengths1.invalid(i) || batches.lengths2.invalid(j), out + blockIdx.x);
}

// out[i, j] += sum of <g_is, g'_jt> over tokens with the same id; a block owns one pair, a warp
// every eighth token of the first example.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_equal_ids(Batches batches, float* out) {
  constexpr int kWarp = 32;
  const int64_t i = blockIdx.x / batches.batch2, j = blockIdx.x % batches.batch2;
  const int64_t first1 = i * batches.lengths1.tokens, first2 = j * batches.lengths2.tokens;
  const auto* ids1 = static_cast<const int64_t*>(batches.x1) + first1;
  const auto* ids2 = static_cast<const int64_t*>(batches.x2) + first2;
  const T* g1 = static_cast<const T*>(batches.g1) + first1 * batches.out;
  const T* g2 = static_cast<const T*>(batches.g2) + first2 * batches.out;
  double total = 0.0;
  for (int64_t s = threadIdx.x / kWarp; s < batches.lengths1.of(i); s += kThreads / kWarp) {
    for (int64_t t = 0; t < batches.lengths2.of(j); ++t) {
      if (ids1[s] != ids2[t]) continue;
      float sum = 0.0f;
      for (int64_t d = threadIdx.x % kWarp; d < batches.out; d += kWarp) {
        sum += to_float(g1[s * batches.out + d]) * to_float(g2[t * batches.out + d]);
      }
      total += static_cast<double>(sum);
    }
  }
  add_pair(total, batches.lengths1.invalid(i) || batches.lengths2.invalid(j), out + blockIdx.x);
}

// Launchers.

template <class T>
void form(const Gradients& gradients, int rows, float* sums, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(gradients.batch),
                    static_cast<unsigned>(ceil_div(gradients.in, kThreads)));
  form_elementwise<T><<<blocks, kThreads, 0, stream>>>(
      static_cast<const T*>(gradients.x), static_cast<const T*>(gradients.g), lengths_of(gradients),
      gradients.in, rows, sums);
  check_launch(kOp);
}

template <class T>
void run_token_pairs(const Gradients& first, const Gradients& second, const Batches& batches,
                     bool bias, float* out, cudaStream_t stream) {
  const Layout layout1 = layout_of(first), layout2 = layout_of(second);
  const auto blocks = static_cast<unsigned>(layout1.tiles * layout2.tiles);
  check_call(kOp, cudaFuncSetAttribute(sum_token_pairs<T>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, kPairBytes));
  sum_token_pairs<T><<<blocks, kThreads, kPairBytes, stream>>>(
      batches, layout1, layout2, copy_unit<T>(first.out, {first.g, second.g}),
      copy_unit<T>(first.in, {first.x, second.x}), bias ? 1.0f : 0.0f, out);
  check_launch(kOp);
}

// Scratch of the formed path.
struct Formed {
  int64_t parts, all_parts;  // parts that are in scratch at a time, and parts of a gradient
  int64_t shares;
  float *first, *second;            // (B, parts, 128, 128)
  float *bias_first, *bias_second;  // (B, O)
  double* products;                 // (shares, B1, B2)
};

Formed plan_formed(Scratch& scratch, const Gradients& first, const Gradients& second, bool bias) {
  Formed plan{};
  const int64_t part_bytes = (first.batch + second.batch) * kPart128 * int64_t{sizeof(float)};
  const int64_t tiles = ceil_div(first.batch, kSide) * ceil_div(second.batch, kSide);
  plan.all_parts = ceil_div(first.out, kSide) * ceil_div(first.in, kSide);
  plan.parts = std::clamp<int64_t>(kFormedBytes / part_bytes, 1, plan.all_parts);
  plan.shares = std::clamp<int64_t>(ceil_div(kBlocks, tiles), 1, plan.parts * kPart128 / kChain);
  plan.first = scratch.take<float>(first.batch * plan.parts * kPart128);
  plan.second = scratch.take<float>(second.batch * plan.parts * kPart128);
  if (bias) {
    plan.bias_first = scratch.take<float>(first.batch * first.out);
    plan.bias_second = scratch.take<float>(second.batch * second.out);
  }
  plan.products = scratch.take<double>(plan.shares * first.batch * second.batch);
  return plan;
}

template <class T>
void form_parts(const Gradients& gradients, int64_t part, int64_t parts, float* formed,
                cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(gradients.batch * parts);
  const int unit = std::min(copy_unit<T>(gradients.in, {gradients.x}),
                            copy_unit<T>(gradients.out, {gradients.g}));
  form_tiles<T><<<blocks, kThreads, kColumnBytes<T>, stream>>>(
      static_cast<const T*>(gradients.x), static_cast<const T*>(gradients.g), lengths_of(gradients),
      gradients.in, gradients.out, unit, part, parts, formed);
  check_launch(kOp);
}

template <class T>
void form_bias(const Gradients& gradients, float* sums, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(gradients.batch),
                    static_cast<unsigned>(ceil_div(gradients.out, kThreads)));
  sum_tokens<T><<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(gradients.g),
                                                 lengths_of(gradients), gradients.out, sums);
  check_launch(kOp);
}

void add_products(const Formed& plan, const Batches& batches, const float* first,
                  const float* second, int64_t depth, bool overwrite, cudaStream_t stream) {
  const int64_t tiles = ceil_div(batches.batch1, kSide) * ceil_div(batches.batch2, kSide);
  const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(plan.shares));
  const Products job{first,          second,    batches.batch1,
                     batches.batch2, depth,     copy_unit<float>(depth, {first, second}),
                     plan.shares,    overwrite, plan.products};
  dot_shares<<<blocks, kThreads, kProductBytes, stream>>>(job);
  check_launch(kOp);
}

template <class T>
void run_formed(const Gradients& first, const Gradients& second, const Batches& batches, bool bias,
                const Formed& plan, float* out, cudaStream_t stream) {
  check_call(kOp, cudaFuncSetAttribute(dot_shares, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kProductBytes));
  check_call(kOp, cudaFuncSetAttribute(form_tiles<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kColumnBytes<T>));
  for (int64_t part = 0; part < plan.all_parts; part += plan.parts) {
    const int64_t parts = std::min(plan.parts, plan.all_parts - part);
    form_parts<T>(first, part, parts, plan.first, stream);
    form_parts<T>(second, part, parts, plan.second, stream);
    add_products(plan, batches, plan.first, plan.second, parts * kPart128, part == 0, stream);
  }
  if (bias) {
    form_bias<T>(first, plan.bias_first, stream);
    form_bias<T>(second, plan.bias_second, stream);
    add_products(plan, batches, plan.bias_first, plan.bias_second, first.out, false, stream);
  }
  const auto blocks = static_cast<unsigned>(ceil_div(first.batch * second.batch, kThreads));
  add_shares<<<blocks, kThreads, 0, stream>>>(batches, plan.products, plan.shares, out);
  check_launch(kOp);
}

bool uses_token_pairs(const Gradients& first, const Gradients& second) {
  return token_pairs_are_cheaper(first.batch * first.tokens, second.batch * second.tokens,
                                 first.batch, second.batch, first.in, first.out, 1);
}

template <class T>
void run_elementwise(const Gradients& first, const Gradients& second, const Batches& batches,
                     bool bias, float* memory, float* out, cudaStream_t stream) {
  const int rows = bias ? 2 : 1;
  float* sums2 = memory + first.batch * rows * first.in;
  form<T>(first, rows, memory, stream);
  form<T>(second, rows, sums2, stream);
  const auto pairs = static_cast<unsigned>(first.batch * second.batch);
  dot_rows<<<pairs, kThreads, 0, stream>>>(batches, memory, sums2, rows * first.in, out);
  check_launch(kOp);
}

template <class T>
void dispatch(const Gradients& first, const Gradients& second, Layer layer, bool bias, float* out,
              void* memory, cudaStream_t stream) {
  const Batches batches{
      first.x,     first.g,      second.x, second.g, lengths_of(first), lengths_of(second),
      first.batch, second.batch, first.in, first.out};
  if (layer == Layer::elementwise) {
    run_elementwise<T>(first, second, batches, bias, static_cast<float*>(memory), out, stream);
  } else if (layer == Layer::embedding) {
    const auto pairs = static_cast<unsigned>(first.batch * second.batch);
    sum_equal_ids<T><<<pairs, kThreads, 0, stream>>>(batches, out);
    check_launch(kOp);
  } else if (uses_token_pairs(first, second)) {
    run_token_pairs<T>(first, second, batches, bias, out, stream);
  } else {
    Scratch scratch(memory);
    const Formed plan = plan_formed(scratch, first, second, bias);
    run_formed<T>(first, second, batches, bias, plan, out, stream);
  }
}

}  // namespace

size_t gradient_dot_scratch(const Gradients& first, const Gradients& second, Layer layer,
                            bool bias) {
  Scratch scratch;
  if (layer == Layer::elementwise) {
    scratch.take<float>((first.batch + second.batch) * first.in * (bias ? 2 : 1));
  } else if (layer == Layer::linear && !uses_token_pairs(first, second)) {
    plan_formed(scratch, first, second, bias);
  }
  return scratch.bytes();
}

void gradient_dot(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                  float* out, void* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (first.dtype == DType::bfloat16) {
    dispatch<__nv_bfloat16>(first, second, layer, bias, out, scratch, on);
  } else {
    dispatch<float>(first, second, layer, bias, out, scratch, on);
  }
}

}  // namespace tracmod::cuda

// out[i, j] += <G_i, G'_j>, the gradients of examples i and j of two batches for one layer.
//
//   linear       sum_{s,t} <g_s, g'_t> (<x_s, x'_t> + 1): a block owns one pair of examples and
//                goes over their tokens in tiles of 64 x 64, both Gram tiles in registers; float32
//                within a tile, float64 across tiles, the threads' sums by a tree. Operations
//                2 S S' (I + O) a pair; bytes S S' (I + O) / 8 of float32 through the caches: the
//                float32 units are the limit. Forming the gradients (cost.h) takes fewer operations
//                for long sequences and is not done here.
//   elementwise  G = [sum_s g_s x_s, sum_s g_s] formed into scratch, a thread per feature; then a
//                block per pair; one read of x and g.
//   embedding    a block per pair; a warp per token of the first takes the second's tokens with the
//                same id.
#include "cuda/tile.cuh"
#include "scratch.h"

namespace tracmod::cuda {
namespace {

constexpr char kOp[] = "gradient_dot";
constexpr int kThreads = kTileThreads;

struct Batches {
  const void *x1, *g1, *x2, *g2;
  Lengths lengths1, lengths2;
  int64_t batch1, batch2, in, out;
};

// The sum over the block's threads, by a tree of fixed shape; valid in thread 0.
__device__ double block_sum(double value) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  for (unsigned width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) values[threadIdx.x] += values[threadIdx.x + width];
  }
  return values[0];
}

__device__ void add_pair(double value, bool bad, float* out) {
  const double total = block_sum(value);
  if (threadIdx.x == 0) *out += bad ? not_a_number() : static_cast<float>(total);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_token_pairs(Batches batches, float bias, float* out) {
  __shared__ TileMemory memory;
  const int64_t i = blockIdx.x / batches.batch2, j = blockIdx.x % batches.batch2;
  const int64_t length1 = batches.lengths1.of(i), length2 = batches.lengths2.of(j);
  const auto rows = [](const void* base, int64_t token, int64_t left, int64_t size) {
    return MatrixRows<T>{static_cast<const T*>(base) + token * size, size, left};
  };
  double total = 0.0;
  for (int64_t s = 0; s < length1; s += kTile) {
    const int64_t token1 = i * batches.lengths1.tokens + s, left1 = length1 - s;
    for (int64_t t = 0; t < length2; t += kTile) {
      const int64_t token2 = j * batches.lengths2.tokens + t, left2 = length2 - t;
      float gram_g[kPerThread][kPerThread], gram_x[kPerThread][kPerThread];
      multiply_tile(rows(batches.g1, token1, left1, batches.out),
                    rows(batches.g2, token2, left2, batches.out), batches.out, memory, gram_g);
      multiply_tile(rows(batches.x1, token1, left1, batches.in),
                    rows(batches.x2, token2, left2, batches.in), batches.in, memory, gram_x);
      // Tokens past an end have gram_g = 0, so the bias adds nothing there.
      float sum = 0.0f;
      for (int m = 0; m < kPerThread; ++m) {
        for (int n = 0; n < kPerThread; ++n) sum += gram_g[m][n] * (gram_x[m][n] + bias);
      }
      total += static_cast<double>(sum);
    }
  }
  add_pair(total, batches.lengths1.bad(i) || batches.lengths2.bad(j), out + blockIdx.x);
}

// sums (B, rows, D): weight gradients, and bias gradients behind them.
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

__global__ void __launch_bounds__(kThreads)
    dot_rows(Batches batches, const float* sums1, const float* sums2, int64_t width, float* out) {
  const int64_t i = blockIdx.x / batches.batch2, j = blockIdx.x % batches.batch2;
  double total = 0.0;
  for (int64_t d = threadIdx.x; d < width; d += kThreads) {
    total += static_cast<double>(sums1[i * width + d]) * static_cast<double>(sums2[j * width + d]);
  }
  add_pair(total, batches.lengths1.bad(i) || batches.lengths2.bad(j), out + blockIdx.x);
}

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
  add_pair(total, batches.lengths1.bad(i) || batches.lengths2.bad(j), out + blockIdx.x);
}

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
void dispatch(const Gradients& first, const Gradients& second, Layer layer, bool bias, float* out,
              void* memory, cudaStream_t stream) {
  const Batches batches{
      first.x,     first.g,      second.x, second.g, lengths_of(first), lengths_of(second),
      first.batch, second.batch, first.in, first.out};
  const auto pairs = static_cast<unsigned>(first.batch * second.batch);
  if (layer == Layer::elementwise) {
    const int rows = bias ? 2 : 1;
    auto* sums1 = static_cast<float*>(memory);
    float* sums2 = sums1 + first.batch * rows * first.in;
    form<T>(first, rows, sums1, stream);
    form<T>(second, rows, sums2, stream);
    dot_rows<<<pairs, kThreads, 0, stream>>>(batches, sums1, sums2, rows * first.in, out);
  } else if (layer == Layer::embedding) {
    sum_equal_ids<T><<<pairs, kThreads, 0, stream>>>(batches, out);
  } else {
    sum_token_pairs<T><<<pairs, kThreads, 0, stream>>>(batches, bias ? 1.0f : 0.0f, out);
  }
  check_launch(kOp);
}

}  // namespace

size_t gradient_dot_scratch(const Gradients& first, const Gradients& second, Layer layer,
                            bool bias) {
  if (layer != Layer::elementwise) return 0;
  Scratch scratch;
  scratch.take<float>((first.batch + second.batch) * first.in * (bias ? 2 : 1));
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

// scale[n] = max_k |x[n, k]| / 127,  code[n, k] = x[n, k] * (127 / max_k |x[n, k]|) rounded to an
// integer, ties to even: the bits of the CPU's.
//
// A block owns a row at a time: as many threads as the row has vectors of 16 bytes, 256 at most. It
// reads the row twice, the second time from the caches: 2048 threads of an SM have 128 KiB of rows
// in hand if those are 4096 float32. Rows that do not begin at 16 bytes go a number at a time.
//
// Bytes: the rows once, N K (4 or 2), and N K of codes. Operations: 4 N K, so memory is the limit.
// Divisions are correctly rounded and denormals kept, as nvcc has it unless told otherwise; there
// is no sum that a product could be contracted with. No GPU has run this yet.
#include <algorithm>

#include "cuda/common.cuh"
#include "quantize.h"

namespace tracmod::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kMostThreads = 256;
constexpr int64_t kMostBlocks = int64_t{1} << 20;

// V numbers that are read or written at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// The largest of all threads' values.
__device__ unsigned block_max(unsigned value) {
  __shared__ unsigned of_warp[kMostThreads / kWarp];
  const auto take = [&](unsigned other) { value = other > value ? other : value; };
  for (int lane = kWarp / 2; lane > 0; lane /= 2) take(__shfl_xor_sync(0xffffffffu, value, lane));
  __syncthreads();  // the row before has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) take(of_warp[warp]);
  return value;
}

// Bits without the sign: their largest is the largest magnitude, with NaN above infinity.
template <class T, int V>
__device__ unsigned largest_bits(const Pack<T, V>* row, int64_t packs) {
  unsigned largest = 0;
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    const Pack<T, V> numbers = row[i];
    for (int v = 0; v < V; ++v) {
      const unsigned bits = __float_as_uint(to_float(numbers.at[v])) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
  }
  return block_max(largest);
}

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads)
    quantize(const Pack<T, V>* rows, int64_t count, int64_t packs, Pack<int8_t, V>* codes,
             float* scales) {
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x) {
    const Pack<T, V>* row = rows + n * packs;
    const RowScale found = row_scale(__uint_as_float(largest_bits(row, packs)));
    if (threadIdx.x == 0) scales[n] = found.scale;
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const Pack<T, V> numbers = row[i];
      Pack<int8_t, V> result{};
      for (int v = 0; v < V && found.factor != 0.0f; ++v) {
        result.at[v] = static_cast<int8_t>(__float2int_rn(to_float(numbers.at[v]) * found.factor));
      }
      codes[n * packs + i] = result;
    }
  }
}

template <class T, int V>
void launch(const Quantization& job, cudaStream_t stream) {
  const int64_t packs = job.width / V, warps = std::max<int64_t>(1, ceil_div(packs, kWarp));
  const auto threads = static_cast<unsigned>(std::min(kMostThreads, kWarp * warps));
  const auto blocks = static_cast<unsigned>(std::min(job.count, kMostBlocks));
  quantize<T, V>
      <<<blocks, threads, 0, stream>>>(static_cast<const Pack<T, V>*>(job.rows), job.count, packs,
                                       reinterpret_cast<Pack<int8_t, V>*>(job.codes), job.scales);
  check_launch("quantize_rows");
}

template <class T>
void choose(const Quantization& job, cudaStream_t stream) {
  constexpr int kNumbers = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(job.rows) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(job.codes) % kNumbers == 0;
  if (aligned && job.width % kNumbers == 0) {
    launch<T, kNumbers>(job, stream);
  } else {
    launch<T, 1>(job, stream);
  }
}

}  // namespace

void quantize_rows(const Quantization& job, void* stream) {
  if (job.dtype == DType::bfloat16) {
    choose<__nv_bfloat16>(job, static_cast<cudaStream_t>(stream));
  } else {
    choose<float>(job, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace tracmod::cuda

// Quantizes every row to 8-bit codes and one scale, with the same bits as the CPU:
//
//   scale (N,)    scale[n] = max_k |x[n, k]| / 127
//   codes (N, K)  code[n, k] = round(x[n, k] * (127 / max_k |x[n, k]|)), ties to even
//
// A block owns one row at a time. It has as many threads as the row has vectors of 16 bytes, at
// most 256, and reads the row twice, the second time from the caches: the 2048 threads of a
// multiprocessor work on 128 KiB of rows if a row has 4096 float32. Rows that are not aligned to 16
// bytes are read one number at a time.
//
// Bytes: the rows once, N K (4 or 2), and N K of codes. Operations: 4 N K, so memory is the limit.
//
// Same bits as the CPU: without options nvcc rounds divisions correctly and keeps denormals, and
// there is no sum here into which a product could be contracted. This file has not run on a GPU
// yet.
#include <algorithm>

#include "cuda/common.cuh"
#include "quantize.h"

namespace tracmod::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kMaxThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;

// V numbers that are read or written by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// The largest value of all threads of the block, in every thread.
__device__ unsigned block_max(unsigned value) {
  __shared__ unsigned warp_max[kMaxThreads / kWarp];
  const auto take = [&](unsigned other) { value = other > value ? other : value; };
  for (int lane = kWarp / 2; lane > 0; lane /= 2) take(__shfl_xor_sync(0xffffffffu, value, lane));
  __syncthreads();  // all threads have read warp_max of the previous row
  if (threadIdx.x % kWarp == 0) warp_max[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) take(warp_max[warp]);
  return value;
}

// The largest magnitude of a row as bits. Bits without the sign order like magnitudes, with NaN
// above infinity, so that neither is lost.
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

// A row has `packs` packs of V numbers; a block owns every gridDim.x-th row.
template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads)
    quantize(const Pack<T, V>* rows, int64_t count, int64_t packs, Pack<int8_t, V>* codes,
             float* scales) {
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x) {
    const Pack<T, V>* row = rows + n * packs;
    const RowScale scaling = row_scale(__uint_as_float(largest_bits(row, packs)));
    if (threadIdx.x == 0) scales[n] = scaling.scale;
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const Pack<T, V> numbers = row[i];
      Pack<int8_t, V> result{};
      for (int v = 0; v < V && scaling.factor != 0.0f; ++v) {
        const float code = to_float(numbers.at[v]) * scaling.factor;
        result.at[v] = static_cast<int8_t>(__float2int_rn(code));
      }
      codes[n * packs + i] = result;
    }
  }
}

template <class T, int V>
void launch(const Quantization& job, cudaStream_t stream) {
  const int64_t packs = job.width / V, warps = std::max<int64_t>(1, ceil_div(packs, kWarp));
  const auto threads = static_cast<unsigned>(std::min(kMaxThreads, kWarp * warps));
  const auto blocks = static_cast<unsigned>(std::min(job.count, kMaxBlocks));
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

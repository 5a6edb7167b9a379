// Quantizes every row to 8-bit codes and one scale:
//
//   scale (N,)    scale[n] = max_k |x[n, k]| / 127
//   codes (N, K)  code[n, k] = round(x[n, k] * (127 / max_k |x[n, k]|)), ties to even
//
// Work: an item is a few rows (about 16,384 numbers). A row is read twice, the second time from the
// cache: once for its largest magnitude, once for the codes.
//
// The largest magnitude is the integer maximum of the bits without the sign bit: positive floats
// order like their bits, infinity is above every number and NaN above infinity, so that neither is
// lost. (A floating-point maximum may ignore NaN.)
//
// Rounding: the sum x * factor + 1.5 * 2^23 is a float whose spacing is 1, so the addition itself
// rounds to an integer, and the lowest byte of the sum is the code in two's complement. The product
// must be rounded before it is added: fused into one multiply-add it would break some ties
// differently than the reference, which is why CMakeLists.txt compiles this file without
// contraction.
//
// Bytes: the rows once, N K (4 or 2), and N K of codes. Operations: 4 N K, so memory is the limit.
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/tiles.h"
#include "cpu/vector.h"
#include "kernels.h"
#include "quantize.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kNumbersPerItem = 1 << 14;

TRACMOD_INLINE int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class T>
TRACMOD_INLINE float largest_magnitude(const T* row, int64_t width) {
  int32_t largest = 0;
  for (int64_t k = 0; k < width; ++k) {
    const int32_t magnitude = bits_of(to_float(row[k])) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  float result;
  std::memcpy(&result, &largest, sizeof result);
  return result;
}

template <class T>
TRACMOD_INLINE void quantize_row(const T* __restrict row, int64_t width, int8_t* __restrict codes,
                                 float* scale) {
  const RowScale scaling = row_scale(largest_magnitude(row, width));
  *scale = scaling.scale;
  if (scaling.factor == 0.0f) {
    std::memset(codes, 0, static_cast<size_t>(width));
    return;
  }
  for (int64_t k = 0; k < width; ++k) {
    codes[k] = static_cast<int8_t>(bits_of(to_float(row[k]) * scaling.factor + 0x1.8p23f));
  }
}

// The two functions for one instruction set, for which the compiler vectorizes the loops above.
struct Quantizer {
  void (*row)(const float* row, int64_t width, int8_t* codes, float* scale);
  void (*row_bfloat16)(const bfloat16* row, int64_t width, int8_t* codes, float* scale);
};

#define TRACMOD_QUANTIZER(NAME, TARGET)                                                  \
  TARGET void row_##NAME(const float* row, int64_t width, int8_t* codes, float* scale) { \
    quantize_row(row, width, codes, scale);                                              \
  }                                                                                      \
  TARGET void row_bfloat16_##NAME(const bfloat16* row, int64_t width, int8_t* codes,     \
                                  float* scale) {                                        \
    quantize_row(row, width, codes, scale);                                              \
  }                                                                                      \
  constexpr Quantizer k_##NAME = {row_##NAME, row_bfloat16_##NAME};

TRACMOD_QUANTIZER(baseline, )
#if defined(__x86_64__)
TRACMOD_QUANTIZER(avx2, __attribute__((target("avx2"))))
TRACMOD_QUANTIZER(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

const Quantizer& quantizer() {
#if defined(__x86_64__)
  if (std::strncmp(tiles().name, "avx512", 6) == 0) return k_avx512;  // or avx512_bf16
  if (std::strcmp(tiles().name, "avx2") == 0) return k_avx2;
#endif
  return k_baseline;
}

template <class T>
void run(const Quantization& job, void (*quantize)(const T*, int64_t, int8_t*, float*),
         int threads) {
  const int64_t rows = std::max<int64_t>(1, kNumbersPerItem / std::max<int64_t>(1, job.width));
  parallel_for(threads, (job.count + rows - 1) / rows, [&](int64_t item, int) {
    for (int64_t n = item * rows; n < std::min(job.count, (item + 1) * rows); ++n) {
      quantize(static_cast<const T*>(job.rows) + n * job.width, job.width,
               job.codes + n * job.width, job.scales + n);
    }
  });
}

}  // namespace

void quantize_rows(const Quantization& job, int threads) {
  if (job.dtype == DType::bfloat16) {
    run(job, quantizer().row_bfloat16, threads);
  } else {
    run(job, quantizer().row, threads);
  }
}

}  // namespace tracmod::cpu

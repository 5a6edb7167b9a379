// scale[n] = max_k |x[n, k]| / 127,  code[n, k] = x[n, k] * (127 / max_k |x[n, k]|) rounded to an
// integer, ties to even.
//
// A row at a time: its largest magnitude as the largest of its bits without the sign, an integer
// maximum in which infinity is above all numbers and NaN above infinity; then its codes, while the
// row is still in the cache. The sum x * factor + 1.5 * 2^23 has the code as its lowest byte: the
// addition rounds to an integer. A product contracted with that sum would not be rounded by itself
// and so have other ties: CMakeLists.txt has this file compiled without contraction.
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
  const RowScale found = row_scale(largest_magnitude(row, width));
  *scale = found.scale;
  if (found.factor == 0.0f) {
    std::memset(codes, 0, static_cast<size_t>(width));
    return;
  }
  for (int64_t k = 0; k < width; ++k) {
    codes[k] = static_cast<int8_t>(bits_of(to_float(row[k]) * found.factor + 0x1.8p23f));
  }
}

// One instruction set, for which the compiler turns the loops above into vectors.
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
  if (std::strncmp(tiles().name, "avx512", 6) == 0) return k_avx512;  // avx512_bf16 too
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

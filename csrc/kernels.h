// Every op, declared once for the CPU and once for CUDA. Pointers are borrowed, row-major and
// contiguous; sizes are checked by module.cpp; the caller owns outputs and scratch.
//
// Sizes: B examples, S tokens, I in, O out, K features per row, N train, Q query, C checkpoints,
// G groups.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tracmod {

enum class DType { float32, bfloat16, int64, float64 };
enum class Layer { linear, elementwise, embedding };
enum class Kind { rademacher, sjlt, identity };

// What one backward pass shows of a layer. linear: x (B,S,I), g (B,S,O). elementwise: x and g
// (B,S,D) with I = O = D. embedding: x (B,S) int64 ids, g (B,S,D) with I = 1, O = D.
struct Gradients {
  const void* x;
  const void* g;
  const int64_t* lengths;  // (B,) tokens to read of each example; null: all S
  int64_t batch, tokens, in, out;
  DType dtype;  // of g, and of x unless embedding
};

constexpr int kMaxOutputs = 4;

// One of the layers that read the same x. Column i of g has the signs of column columns[i] of R_out
// (null: of i itself).
struct Output {
  const void* g;  // (B, S, size)
  int64_t size;
  uint64_t key;
  const int64_t* columns;  // (size,) or null
};

// Output 0 is g and out of Gradients; only linear has more.
struct Projection {
  Layer layer;
  Kind kind;
  bool bias;
  int64_t k_out, k_in;
  uint64_t seed, input_key;
  const int64_t* input_columns;  // (in + bias,) or null, as an output's
  int outputs;
  Output output[kMaxOutputs];
};

// The k largest (or smallest) of each of Q rows so far, best first; index -1: not filled yet.
struct Ranking {
  float* scores;     // (Q, k)
  int64_t* indices;  // (Q, k)
};

struct TopK {
  int64_t queries, trains, width, checkpoints;  // Q, N, K, C
  const void* const* query_rows;                // C pointers to (Q, K)
  const void* const* train_rows;                // C pointers to (N, K)
  const double* weights;                        // C, on the host
  DType dtype;
  bool cosine;
  int64_t k;
  int64_t index_offset;   // added to a train row's number
  const int64_t* groups;  // (N,) in [0, num_groups), or null
  int64_t num_groups;     // G
  Ranking proponents, opponents;
  double* group_sums;  // (Q, G) added to, or null
};

// A linear layer's product: x (rows, depth) by a weight (columns, depth), or (depth, columns) if
// transposed.
struct Linear {
  const float *x, *weight, *bias;  // bias (columns,) or null
  int64_t rows, depth, columns;
  bool transposed;
};

// Rows to 8-bit codes with a scale each, written.
struct Quantization {
  const void* rows;      // (count, width)
  int64_t count, width;  // N, K
  DType dtype;           // of the rows
  int8_t* codes;         // (count, width)
  float* scales;         // (count,)
};

namespace cpu {

// Fills matrix (rows, size) with a projection's entries, without the scale 1 / sqrt(rows).
void projection_matrix(Kind kind, int64_t rows, int64_t size, uint64_t seed, uint64_t key,
                       float* matrix);

// out[b, offset ...] += features of example b, summed over the outputs; `out` points at column `offset`, rows are `stride`
// apart. The scratch is at least project_gradients_scratch(...) bytes, 64-byte aligned.
size_t project_gradients_scratch(const Gradients& gradients, const Projection& projection,
                                 int threads);
void project_gradients(const Gradients& gradients, const Projection& projection, float* out,
                       int64_t stride, void* scratch, int threads);

// out (B1, B2) += <gradient i, gradient j>.
size_t gradient_dot_scratch(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                            int threads);
void gradient_dot(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                  float* out, void* scratch, int threads);

size_t top_k_dot_scratch(const TopK& job, int threads);
void top_k_dot(const TopK& job, void* scratch, int threads);

// out (rows, columns), written.
size_t linear_scratch(const Linear& linear, int threads);
void linear(const Linear& linear, float* out, void* scratch, int threads);

void quantize_rows(const Quantization& job, int threads);

}  // namespace cpu

namespace cuda {

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// As above; every launch goes to `stream` (a cudaStream_t), nothing is synchronised.
size_t project_gradients_scratch(const Gradients& gradients, const Projection& projection);
void project_gradients(const Gradients& gradients, const Projection& projection, float* out,
                       int64_t stride, void* scratch, void* stream);

size_t gradient_dot_scratch(const Gradients& first, const Gradients& second, Layer layer,
                            bool bias);
void gradient_dot(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                  float* out, void* scratch, void* stream);

size_t top_k_dot_scratch(const TopK& job);
void top_k_dot(const TopK& job, void* scratch, void* stream);

void quantize_rows(const Quantization& job, void* stream);

}  // namespace cuda
}  // namespace tracmod

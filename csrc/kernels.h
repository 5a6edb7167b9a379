// Declarations of every op, once for the CPU and once for CUDA, and the arguments they share.
//
// All pointers are borrowed and point at row-major contiguous memory. module.cpp checks sizes,
// dtypes and devices before a function declared here is called, so the kernels check nothing twice.
// The caller allocates the outputs and the scratch memory.
//
// Sizes: B examples, S tokens, I input features, O output features, D features of LayerNorm or an
// embedding, K features per row, N training rows, Q query rows, C checkpoints, G groups.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tracmod {

enum class DType { float32, bfloat16, int64, float64 };
enum class Layer { linear, elementwise, embedding };
enum class Kind { rademacher, sjlt, identity, sketch };

// The per-example gradients of one layer in factored form: its inputs x and the gradients g of the
// loss at its outputs. For a linear layer the gradient of example b is G_b = sum_s g_bs x_bs^T.
//
//   linear       x (B, S, I), g (B, S, O)
//   elementwise  x and g (B, S, D), I = O = D (LayerNorm)
//   embedding    x (B, S) int64 token ids, g (B, S, D), I = 1 and O = D
struct Gradients {
  const void* x;
  const void* g;
  const int64_t* lengths;  // (B,) number of tokens to read of each example, or null for all S
  int64_t batch, tokens, in, out;
  DType dtype;  // of g, and of x unless the layer is an embedding
};

constexpr int kMaxOutputs = 4;

// One of several layers that read the same x (query, key and value, for example). Column i of g is
// multiplied by column columns[i] of R_out, or by column i where columns is null; so a layer whose
// columns were partly removed keeps the projection of the columns that remain.
struct Output {
  const void* g;  // (B, S, size)
  int64_t size;
  uint64_t key;
  const int64_t* columns;  // (size,) or null
};

// How a gradient becomes k_out * k_in features. output[0] repeats g and out of Gradients; only
// linear layers have more than one output.
struct Projection {
  Layer layer;
  Kind kind;
  bool bias;
  int64_t k_out, k_in;
  int64_t rows;  // sketch: rows to which R_out reduces the gradient before it is sketched, or 0
  uint64_t seed, input_key;
  const int64_t* input_columns;  // (in + bias,) or null; columns of R_in, as Output::columns
  int outputs;
  Output output[kMaxOutputs];
};

// The k largest (or smallest) scores so far of each of Q queries, best first. Index -1 marks an
// entry that is not filled yet.
struct Ranking {
  float* scores;     // (Q, k)
  int64_t* indices;  // (Q, k)
  int64_t k;
};

struct TopK {
  int64_t queries, trains, width, checkpoints;  // Q, N, K, C
  const void* const* query_rows;                // C pointers to (Q, K)
  const void* const* train_rows;                // C pointers to (N, K)
  const double* weights;                        // C, on the host
  DType dtype;
  bool cosine;
  int64_t index_offset;   // added to the row number of a training row
  const int64_t* groups;  // (N,) in [0, num_groups), or null
  int64_t num_groups;     // G
  Ranking proponents, opponents;  // of lengths of their own
  double* group_sums;  // (Q, G), added to; or null
};

// The product of a linear layer: x (rows, depth) times weight (columns, depth), or times weight
// (depth, columns) if transposed.
struct Linear {
  const float *x, *weight, *bias;  // bias (columns,) or null
  int64_t rows, depth, columns;
  bool transposed;
};

// Rows and the 8-bit codes and scales that replace them.
struct Quantization {
  const void* rows;      // (count, width)
  int64_t count, width;  // N, K
  DType dtype;           // of the rows
  int8_t* codes;         // (count, width)
  float* scales;         // (count,)
};

namespace cpu {

// Each op comes with a function that returns the bytes of scratch memory it needs; the op itself
// expects at least as many, aligned to 64 bytes. Results do not depend on the number of threads.

// Fills matrix (rows, size) with the entries of a projection, without the scale 1 / sqrt(rows).
void projection_matrix(Kind kind, int64_t rows, int64_t size, uint64_t seed, uint64_t key,
                       float* matrix);

// out[b, 0 : k_out k_in] += features of example b, summed over the outputs. `out` points at the
// first feature of this layer in row 0; `stride` is the distance between rows.
size_t project_gradients_scratch(const Gradients& gradients, const Projection& projection,
                                 int threads);
void project_gradients(const Gradients& gradients, const Projection& projection, float* out,
                       int64_t stride, void* scratch, int threads);

// out (B1, B2) += inner products of the gradients of example i and example j.
size_t gradient_dot_scratch(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                            int threads);
void gradient_dot(const Gradients& first, const Gradients& second, Layer layer, bool bias,
                  float* out, void* scratch, int threads);

// Updates both rankings and the group sums of `job`.
size_t top_k_dot_scratch(const TopK& job, int threads);
void top_k_dot(const TopK& job, void* scratch, int threads);

// out (rows, columns) = x weight^T + bias, or x weight if transposed; CPU and float32 only.
size_t linear_scratch(const Linear& linear, int threads);
void linear(const Linear& linear, float* out, void* scratch, int threads);

// Writes the codes and scales of `job`.
void quantize_rows(const Quantization& job, int threads);

}  // namespace cpu

namespace cuda {

// Makes a device current and restores the previous one when destroyed.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// As above, on the current device. Every launch goes to `stream` (a cudaStream_t); nothing is
// allocated or synchronized.
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

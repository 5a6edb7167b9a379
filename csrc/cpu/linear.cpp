// The product of a linear layer in float32, for its forward pass and for the gradient at its input:
//
//   forward     out (T, O) = x (T, I) W (O, I)^T + bias (O,)
//   transposed  out (T, I) = x (T, O) W (O, I)
//
// Work: first the weight is packed into panels of 64 columns of the result, (depth, 64), once per
// call; one panel is one item. Then an item is a block of 96 rows of x times one panel, computed by
// `outer` (tiles.h): rows of x are read where they are, the panel comes from the second-level
// cache. Sums are float32 within 256 steps of depth and float64 across them.
//
// Bytes: x is read once per panel, from cache; the panels once per 96 rows. Operations: 2 T I O,
// which is 48 per byte of a panel at 96 rows, so the multiply-add units are the limit.
//
// Why this exists although matrix products belong to a library: collection multiplies by the same
// few weights all the time, and this product is faster than torch's float32 product on the CPU
// (measured in bench/RESULTS.md); tracmod uses it only where that holds.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "scratch.h"

namespace tracmod::cpu {
namespace {

constexpr int64_t kRows = 96;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  int64_t panels;
  float* panel;  // (panels, depth, kPanel)
  double* sums;  // (threads, kRows, kPanel)
};

Plan make_plan(Scratch& scratch, const Linear& linear, int threads) {
  Plan plan{};
  plan.panels = ceil_div(linear.columns, kPanel);
  plan.panel = scratch.take<float>(plan.panels * linear.depth * kPanel);
  plan.sums = scratch.take<double>(threads * kRows * kPanel);
  return plan;
}

// Packs the part of the weight that gives columns [n, n + count) of the result. A transposed weight
// already has the layout of a panel, only its rows are longer.
void pack_panel(const Linear& linear, int64_t n, int64_t count, float* panel) {
  if (!linear.transposed) {
    const float* rows[kPanel];
    for (int64_t i = 0; i < count; ++i) rows[i] = linear.weight + (n + i) * linear.depth;
    pack(rows, count, linear.depth, panel);
    return;
  }
  const int64_t width = padded(count);
  for (int64_t d = 0; d < linear.depth; ++d) {
    const float* from = linear.weight + d * linear.columns + n;
    std::fill(std::copy(from, from + count, panel + d * width), panel + (d + 1) * width, 0.0f);
  }
}

// out[row : row + rows, n : n + 64] = x times one panel, plus the bias.
void multiply(const Linear& linear, int64_t row, int64_t rows, int64_t n, const float* panel,
              double* sums, float* out) {
  const int64_t count = std::min(kPanel, linear.columns - n);
  const float* a[kRows];
  for (int64_t m = 0; m < rows; ++m) a[m] = linear.x + (row + m) * linear.depth;
  // The result is only written, but a cache line must be in the cache to be written. Fetching the
  // lines now hides that behind the product.
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < count; i += 16) {
      __builtin_prefetch(out + (row + m) * linear.columns + n + i, 1);
    }
  }
  std::fill(sums, sums + rows * kPanel, 0.0);
  outer(a, rows, panel, padded(count), linear.depth, sums, kPanel);
  for (int64_t m = 0; m < rows; ++m) {
    float* to = out + (row + m) * linear.columns + n;
    for (int64_t i = 0; i < count; ++i) {
      const double shift = linear.bias == nullptr ? 0.0 : static_cast<double>(linear.bias[n + i]);
      to[i] = static_cast<float>(sums[m * kPanel + i] + shift);
    }
  }
}

}  // namespace

size_t linear_scratch(const Linear& linear, int threads) {
  Scratch scratch;
  make_plan(scratch, linear, threads);
  return scratch.bytes();
}

void linear(const Linear& linear, float* out, void* memory, int threads) {
  Scratch scratch(memory);
  const Plan plan = make_plan(scratch, linear, threads);
  const int64_t size = linear.depth * kPanel, blocks = ceil_div(linear.rows, kRows);
  parallel_for(threads, plan.panels, [&](int64_t p, int) {
    const int64_t n = p * kPanel;
    pack_panel(linear, n, std::min(kPanel, linear.columns - n), plan.panel + p * size);
  });
  parallel_for(threads, blocks * plan.panels, [&](int64_t item, int slot) {
    const int64_t row = item / plan.panels * kRows, p = item % plan.panels;
    multiply(linear, row, std::min(kRows, linear.rows - row), p * kPanel, plan.panel + p * size,
             plan.sums + slot * kRows * kPanel, out);
  });
}

}  // namespace tracmod::cpu

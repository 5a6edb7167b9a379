// out (T, O) = x (T, I) W^T + bias, or out (T, I) = x (T, O) W: a linear layer's forward pass and the
// gradient at its input, float32.
//
// The matrix goes into panels of 64 columns of the result, (depth, 64), once per call; then a block
// of 96 rows of x by one panel an item, as an `outer` tile: x as it lies, the panel from the second
// cache, sums in float32 blocks, float64 across.
//
// Bytes: x once per panel from cache, the panels once per 96 rows; operations 2 T I O: at 96 rows 48 a
// byte of panel, so the multiply-add units are the limit.
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

// Columns [n, n + count) of the result.
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

void multiply(const Linear& linear, int64_t row, int64_t rows, int64_t n, const float* panel,
              double* sums, float* out) {
  const int64_t count = std::min(kPanel, linear.columns - n);
  const float* a[kRows];
  for (int64_t m = 0; m < rows; ++m) a[m] = linear.x + (row + m) * linear.depth;
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

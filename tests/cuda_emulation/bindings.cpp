// The emulated ops as plain C functions. Scratch begins as NaN and ends at a mark that must stay.
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "cuda_runtime.h"
#include "kernels.h"

using namespace tracmod;

namespace {

constexpr size_t kMark = 64;

template <class Op>
int run(size_t bytes, bool backwards, Op op) {
  emu::backwards = backwards;
  void* memory = aligned_alloc(256, (bytes + kMark + 255) / 256 * 256);
  memset(memory, 0xff, bytes);
  char* mark = static_cast<char*>(memory) + bytes;
  memset(mark, 0x5a, kMark);
  try {
    op(memory);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  for (size_t i = 0; i < kMark; ++i) {
    if (mark[i] != 0x5a) return 2;
  }
  free(memory);
  return 0;
}

}  // namespace

extern "C" {

int emulated_project_gradients(const Gradients* gradients, const Projection* projection, float* out,
                               int64_t stride, int backwards) {
  return run(cuda::project_gradients_scratch(*gradients, *projection), backwards,
             [&](void* memory) {
               cuda::project_gradients(*gradients, *projection, out, stride, memory, nullptr);
             });
}

int emulated_gradient_dot(const Gradients* first, const Gradients* second, int layer, int bias,
                          float* out, int backwards) {
  const auto of = static_cast<Layer>(layer);
  return run(cuda::gradient_dot_scratch(*first, *second, of, bias), backwards, [&](void* memory) {
    cuda::gradient_dot(*first, *second, of, bias, out, memory, nullptr);
  });
}

int emulated_top_k_dot(const TopK* job, int backwards) {
  return run(cuda::top_k_dot_scratch(*job), backwards,
             [&](void* memory) { cuda::top_k_dot(*job, memory, nullptr); });
}
}

// The count sketch of formed gradients: project_gradients of linear layers with kind sketch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace tracmod::cpu {

size_t formed_sketch_scratch(const Gradients& gradients, const Projection& projection, int threads);
void formed_sketch(const Gradients& gradients, const Projection& projection, float* out,
                   int64_t stride, void* memory, int threads);

}  // namespace tracmod::cpu

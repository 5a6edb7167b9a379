// Shared by all CUDA kernels: conversion to float32, lengths of the examples of a batch, and checks
// of launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace tracmod::cuda {

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline float not_a_number() { return __int_as_float(0x7fffffff); }

inline void check_call(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) +
                             ": CUDA launch failed: " + cudaGetErrorString(error));
  }
}

// Throws if the last launch failed. A sticky error of earlier work is reported here as well.
inline void check_launch(const char* op) { check_call(op, cudaGetLastError()); }

// Number of tokens to read of each example. The host cannot check lengths on the GPU without
// waiting for it, so kernels do: an example with an invalid length has 0 tokens, and the last
// kernel of an op writes NaN where `invalid` is true.
struct Lengths {
  const int64_t* values;
  int64_t tokens;

  __device__ bool invalid(int64_t example) const {
    return values != nullptr && (values[example] < 0 || values[example] > tokens);
  }
  __device__ int64_t of(int64_t example) const {
    if (values == nullptr) return tokens;
    return invalid(example) ? 0 : values[example];
  }
};

// The lengths of the examples from `first` on.
inline Lengths lengths_of(const Gradients& gradients, int64_t first = 0) {
  return {gradients.lengths == nullptr ? nullptr : gradients.lengths + first, gradients.tokens};
}

}  // namespace tracmod::cuda

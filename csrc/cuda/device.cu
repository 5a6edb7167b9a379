// Selects the device that launches go to.
#include "cuda/common.cuh"

namespace tracmod::cuda {

DeviceGuard::DeviceGuard(int device) {
  cudaError_t error = cudaGetDevice(&previous_);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    throw std::runtime_error("cuda:" + std::to_string(device) +
                             " cannot be used: " + cudaGetErrorString(error));
  }
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

}  // namespace tracmod::cuda

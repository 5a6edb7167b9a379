// The device that launches go to.
#include "cuda/common.cuh"

namespace tracmod::cuda {

DeviceGuard::DeviceGuard(int device) {
  const cudaError_t got = cudaGetDevice(&before_);
  const cudaError_t set = got == cudaSuccess ? cudaSetDevice(device) : got;
  if (set != cudaSuccess) {
    throw std::runtime_error("cuda:" + std::to_string(device) +
                             " cannot be used: " + cudaGetErrorString(set));
  }
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(before_); }

}  // namespace tracmod::cuda

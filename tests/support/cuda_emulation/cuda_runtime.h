// Replaces CUDA's runtime header, so that a C++ compiler compiles the kernels and the CPU runs
// them. emulator.cpp runs the blocks and their threads; checker.cpp, in a build that checks,
// watches their accesses to memory.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
// All shared variables of all kernels are the thread-local storage of the library, so their
// addresses are one known range.
#define __shared__ static thread_local
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct int2 {
  int x, y;
};
struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);

namespace emu {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Everything that device code reads of the emulation itself.
struct Position {
  dim3 thread, block, block_size, grid_size;
  int fault;  // the number of the fault that is switched on (native.py), or 0
};
inline Position position;

// The line of the source at which a thread called the emulation.
struct Site {
  const char* file;
  int line;
};

// Operations that the lanes of a warp do together.
enum class Operation { sync, shuffle, ballot, multiply_bf16, multiply_tf32, load, load_transposed };

// Waits until all lanes of the mask have called the same operation, which then takes place for all
// of them: `in`, `out`, `number` and `size` are this lane's arguments.
void warp_operation(Operation operation, uint32_t mask, const void* in, void* out, int number,
                    size_t size, Site site);

// Waits until all threads of the block have called it; returns how many of them passed true.
int block_barrier(bool value, Site site);

// Asynchronous copies to shared memory (mma.cuh).
void copy_later(void* to, const void* from, int bytes, int size);
void commit_copies();
void wait_copies(int groups);

// An atomic access to memory, for the checker.
void atomic_access(const void* at, size_t size);

char* dynamic_shared();

// Ends the launch with an exception; called by device code.
[[noreturn]] void fail(const char* what);

// What a launch needs to know about a kernel and its arguments.
struct Kernel {
  const char* name;
  const void* function;
  int most_threads;                   // by __launch_bounds__, or 1024
  void (*call)(const void* closure);  // runs one thread
  const void* closure;
  size_t closure_bytes;
};
void launch(const Kernel& kernel, dim3 grid, dim3 size, size_t shared);
bool grant_shared(const void* function, size_t bytes);
void forget_grants();

// A launch as native.py writes it: `closure` holds copies of the kernel's arguments.
template <class Function, class Closure>
void launch(const char* name, int most_threads, Function* function, const Closure& closure,
            dim3 grid, dim3 size, size_t shared = 0, cudaStream_t = nullptr) {
  launch(
      {name, reinterpret_cast<const void*>(function), most_threads,
       [](const void* made) { (*static_cast<const Closure*>(made))(); }, &closure, sizeof closure},
      grid, size, shared);
}

template <class T>
T from_lane(uint32_t mask, T value, int lane, Site site) {
  T result;
  warp_operation(Operation::shuffle, mask, &value, &result, lane, sizeof value, site);
  return result;
}

inline int lane() { return static_cast<int>(position.thread.x) % kWarp; }

}  // namespace emu

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  const bool granted = emu::grant_shared(reinterpret_cast<const void*>(kernel), bytes);
  return granted ? cudaSuccess : cudaErrorInvalidValue;
}

#define threadIdx emu::position.thread
#define blockIdx emu::position.block
#define blockDim emu::position.block_size
#define gridDim emu::position.grid_size

// The last two arguments of the functions below are the file and line of the call.
#define EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMU_SITE) { emu::block_barrier(false, {file, line}); }
inline int __syncthreads_count(int value, EMU_SITE) {
  return emu::block_barrier(value != 0, {file, line});
}
inline int __syncthreads_or(int value, EMU_SITE) {
  return emu::block_barrier(value != 0, {file, line}) > 0;
}
inline void __syncwarp(unsigned mask = emu::kAllLanes, EMU_SITE) {
  emu::warp_operation(emu::Operation::sync, mask, nullptr, nullptr, 0, 0, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMU_SITE) {
  return emu::from_lane(mask, value, emu::lane() ^ lanes, {file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, EMU_SITE) {
  return emu::from_lane(mask, value, lane % emu::kWarp, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, EMU_SITE) {
  const int lane = emu::lane() + delta;
  return emu::from_lane(mask, value, lane < emu::kWarp ? lane : emu::lane(), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, EMU_SITE) {
  const int lane = emu::lane() - delta;
  return emu::from_lane(mask, value, lane >= 0 ? lane : emu::lane(), {file, line});
}
// The bits of the lanes of the mask that passed true.
inline unsigned __ballot_sync(unsigned mask, int value, EMU_SITE) {
  unsigned bits = 0;
  emu::warp_operation(emu::Operation::ballot, mask, &value, &bits, 0, 0, {file, line});
  return bits;
}
#undef EMU_SITE

template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* to, T value) {
  static_assert(std::is_integral_v<T>, "floating-point atomics add in any order: no repeatability");
  emu::atomic_access(to, sizeof(T));
  const T before = *to;
  *to += value;
  return before;
}
inline float __int_as_float(int bits) {
  float value;
  return memcpy(&value, &bits, sizeof value), value;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  return memcpy(&bits, &value, sizeof bits), bits;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __float2int_rn(float value) { return static_cast<int>(lrintf(value)); }

// Stands in for CUDA's header, so that g++ compiles the kernels and the CPU runs them: a block
// after the other, every thread of a block as a fiber that runs until it has to wait for others. So
// one warp is as far ahead of the others as barriers let it be, which shows a missing one.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <map>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
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
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}

namespace emu {

constexpr int kWarp = 32, kThreads = 1024;
constexpr size_t kStack = 128 << 10, kShared = 227 << 10, kSharedUnasked = 48 << 10;
constexpr size_t kSharedEverywhere = 163 << 10;  // compute capability 8.0

struct Copy {
  char* to;
  const char* from;
  int bytes, size;
};

struct Fiber {
  ucontext_t start;
  jmp_buf context;
  char* stack = nullptr;
  bool started, done;
  const int* waits_for;  // runs on when this is no longer `seen`
  int seen;
  std::vector<Copy> copies;              // not yet in a group
  std::deque<std::vector<Copy>> groups;  // under way
};

struct Barrier {
  int arrived = 0, round = 0, members = 0;
};

inline dim3 thread, block, block_size, grid_size;
inline Fiber fibers[kThreads];
inline int current;
inline jmp_buf scheduler;
inline std::function<void()>* kernel;
inline Barrier whole, warps[kThreads / kWarp];
inline char slots[kThreads][64];
inline bool backwards = false;                        // the order in which threads are taken up
inline std::map<const void*, size_t> shared_granted;  // to each kernel that asked for more
alignas(1024) inline char shared_memory[kShared];

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated kernel: %s (block %u %u %u, thread %d)\n", what, block.x, block.y,
          block.z, current);
  abort();
}

inline void release(Barrier& barrier) {
  if (barrier.members == 0 || barrier.arrived < barrier.members) return;
  barrier.arrived = 0;
  ++barrier.round;
}

inline void wait(Barrier& barrier) {
  Fiber& fiber = fibers[current];
  fiber.waits_for = &barrier.round;
  fiber.seen = barrier.round;
  ++barrier.arrived;
  release(barrier);
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
}

inline Barrier& warp() { return warps[current / kWarp]; }

inline void enter() {
  (*kernel)();
  fibers[current].done = true;
  for (Barrier* barrier : {&whole, &warp()}) {
    --barrier->members;
    release(*barrier);
  }
  _longjmp(scheduler, 1);
}

inline void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(malloc(kStack));
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  fiber.started = fiber.done = false;
  fiber.waits_for = nullptr;
}

inline void resume(int index) {
  Fiber& fiber = fibers[index];
  current = index;
  thread = dim3(index);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets every thread of a warp that need not wait run on; false if there is none.
inline bool run_warp(int begin, int end) {
  volatile bool some = false;
  for (volatile int i = begin; i < end; i = i + 1) {
    const int index = backwards ? begin + end - 1 - i : i;
    const Fiber& fiber = fibers[index];
    if (fiber.done) continue;
    if (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen) continue;
    some = true;
    resume(index);
  }
  return some;
}

// A warp runs as far as it can before the next one: so what one warp does too early, shows.
inline void run_block(int threads, size_t shared) {
  memset(shared_memory, 0xff, shared);  // NaN
  whole = {0, 0, threads};
  for (int i = 0; i < threads; ++i) prepare(fibers[i]);
  for (int w = 0; w * kWarp < threads; ++w) {
    warps[w] = {0, 0, threads - w * kWarp < kWarp ? threads - w * kWarp : kWarp};
  }
  for (volatile bool some = true; some;) {
    some = false;
    for (volatile int i = 0; i < threads; i = i + kWarp) {
      const int first = backwards ? (threads - 1) / kWarp * kWarp - i : i;
      while (run_warp(first, first + kWarp < threads ? first + kWarp : threads)) some = true;
    }
  }
  if (whole.members > 0) fail("threads wait for each other for ever");
}

template <class Kernel, class F>
void launch(Kernel* function, F body, dim3 grid, dim3 size, size_t shared = 0,
            cudaStream_t = nullptr) {
  std::function<void()> call = body;
  kernel = &call;
  block_size = size;
  grid_size = grid;
  const auto granted = shared_granted.find(reinterpret_cast<const void*>(function));
  if (shared > (granted == shared_granted.end() ? kSharedUnasked : granted->second)) {
    fail("more shared memory than was asked for");
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block = dim3(x, y, z);
        run_block(static_cast<int>(size.x), shared);
      }
    }
  }
}

// What lane `lane` of this warp gave.
template <class T>
T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= sizeof slots[0]);
  memcpy(slots[current], &value, sizeof value);
  wait(warp());
  T result;
  memcpy(&result, slots[current / kWarp * kWarp + lane % kWarp], sizeof result);
  wait(warp());
  return result;
}

inline int count_block(bool value) {
  slots[current][0] = value;
  wait(whole);
  int count = 0;
  for (unsigned i = 0; i < block_size.x; ++i) count += !fibers[i].done && slots[i][0] != 0;
  wait(whole);
  return count;
}

}  // namespace emu

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > emu::kSharedEverywhere) return cudaErrorInvalidValue;
  emu::shared_granted[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

#define threadIdx emu::thread
#define blockIdx emu::block
#define blockDim emu::block_size
#define gridDim emu::grid_size

inline void __syncthreads() { emu::wait(emu::whole); }
inline void __syncwarp(unsigned = 0xffffffffu) { emu::wait(emu::warp()); }
inline int __syncthreads_count(int value) { return emu::count_block(value != 0); }
inline int __syncthreads_or(int value) { return __syncthreads_count(value) > 0; }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emu::from_lane(value, emu::current % emu::kWarp ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emu::from_lane(value, lane);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = emu::current % emu::kWarp + delta;
  return emu::from_lane(value, lane < emu::kWarp ? lane : emu::current % emu::kWarp);
}
template <class T>
T atomicAdd(T* to, T value) {
  static_assert(std::is_integral_v<T>, "sums of float32 in any order do not repeat");
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
inline int __float2int_rn(float value) { return static_cast<int>(lrintf(value)); }

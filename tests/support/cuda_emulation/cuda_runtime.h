// Replaces CUDA's runtime header, so that a C++ compiler compiles the kernels and the CPU runs
// them.
//
// Blocks run one after the other. Every thread of a block is a fiber that runs until it has to wait
// for others at a barrier, and a warp runs as far as it can before the next warp starts. Each warp
// is thus as far ahead of the others as the barriers allow, which reveals a missing barrier. Shared
// memory starts as NaN, which reveals reads before writes. `backwards` reverses the order in which
// warps and threads run. Races that need another interleaving are not found.
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
constexpr size_t kStack = 128 << 10;          // bytes of a fiber's stack
constexpr size_t kShared = 227 << 10;         // most shared memory of a block on any GPU
constexpr size_t kSharedDefault = 48 << 10;   // without cudaFuncSetAttribute
constexpr size_t kSharedMaximum = 163 << 10;  // with it, on compute capability 8.0

// An asynchronous copy to shared memory that has been started.
struct Copy {
  char* to;
  const char* from;
  int bytes, size;
};

// One thread of a block. It is started with ucontext, and later switched with setjmp and longjmp,
// which make no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf context;
  char* stack = nullptr;
  bool started, done;
  const int* waits_for;  // the round of a barrier; the fiber continues when it is no longer `seen`
  int seen;
  std::vector<Copy> copies;              // copies that belong to no group yet
  std::deque<std::vector<Copy>> groups;  // committed groups that have not been waited for
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
inline bool backwards = false;                        // run warps and threads in reverse order
inline std::map<const void*, size_t> shared_granted;  // per kernel, by cudaFuncSetAttribute
alignas(1024) inline char shared_memory[kShared];

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated kernel: %s (block %u %u %u, thread %d)\n", what, block.x, block.y,
          block.z, current);
  abort();
}

// Starts the next round of a barrier once all of its members have arrived.
inline void release(Barrier& barrier) {
  if (barrier.members == 0 || barrier.arrived < barrier.members) return;
  barrier.arrived = 0;
  ++barrier.round;
}

// Waits at a barrier: control returns to the scheduler until the round is over.
inline void wait(Barrier& barrier) {
  Fiber& fiber = fibers[current];
  fiber.waits_for = &barrier.round;
  fiber.seen = barrier.round;
  ++barrier.arrived;
  release(barrier);
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
}

inline Barrier& warp() { return warps[current / kWarp]; }

// Entry point of a fiber. A thread that returns leaves its barriers, so the others do not wait for
// it.
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

// Runs a thread until it waits or returns.
inline void resume(int index) {
  Fiber& fiber = fibers[index];
  current = index;
  thread = dim3(index);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs every thread of a warp that does not have to wait; returns false if there is none. Local
// variables are volatile because resume, whose setjmp would not preserve them, may be inlined.
inline bool run_warp(int begin, int end) {
  volatile bool progress = false;
  for (volatile int i = begin; i < end; i = i + 1) {
    const int index = backwards ? begin + end - 1 - i : i;
    const Fiber& fiber = fibers[index];
    if (fiber.done) continue;
    if (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen) continue;
    progress = true;
    resume(index);
  }
  return progress;
}

// Runs one block; each warp runs as far as it can before the next one does.
inline void run_block(int threads, size_t shared) {
  memset(shared_memory, 0xff, shared);  // NaN
  whole = {0, 0, threads};
  for (int i = 0; i < threads; ++i) prepare(fibers[i]);
  for (int w = 0; w * kWarp < threads; ++w) {
    warps[w] = {0, 0, threads - w * kWarp < kWarp ? threads - w * kWarp : kWarp};
  }
  for (volatile bool progress = true; progress;) {
    progress = false;
    for (volatile int i = 0; i < threads; i = i + kWarp) {
      const int first = backwards ? (threads - 1) / kWarp * kWarp - i : i;
      while (run_warp(first, first + kWarp < threads ? first + kWarp : threads)) progress = true;
    }
  }
  if (whole.members > 0) fail("deadlock: all remaining threads wait at barriers");
}

template <class Kernel, class F>
void launch(Kernel* function, F body, dim3 grid, dim3 size, size_t shared = 0,
            cudaStream_t = nullptr) {
  std::function<void()> call = body;
  kernel = &call;
  block_size = size;
  grid_size = grid;
  const auto granted = shared_granted.find(reinterpret_cast<const void*>(function));
  if (shared > (granted == shared_granted.end() ? kSharedDefault : granted->second)) {
    fail("the launch uses more dynamic shared memory than was requested for the kernel");
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

// The value that lane `lane` of this warp passed; called by all lanes of the warp.
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
  if (static_cast<size_t>(bytes) > emu::kSharedMaximum) return cudaErrorInvalidValue;
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
  static_assert(std::is_integral_v<T>, "floating-point atomics add in any order: no repeatability");
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

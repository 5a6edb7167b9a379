// Runs the kernels on the CPU: blocks one after the other, every thread of a block as a fiber.
//
// A fiber runs until it has to wait for others, and a warp runs as far as it can before the next
// warp starts. Each warp is thus as far ahead of the others as the barriers allow, which reveals a
// missing barrier. Shared memory starts as NaN, which reveals reads before writes. An asynchronous
// copy fills its destination with NaN and takes effect when it is waited for. `backwards` reverses
// the order in which warps and threads run. Products of tensor cores round towards zero, as on the
// hardware.
//
// What a GPU would refuse or leave undefined (a launch beyond its limits, a deadlock, a wrong
// address of an asynchronous copy) ends the launch with an exception. Wrong lane masks and barriers
// are reports of the checker; a build without it fails in the same places.
#include <cuda_runtime.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "checker.h"

namespace emu {

bool backwards = false;

namespace {

constexpr int kThreads = 1024;
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

enum class State { runs, at_block, at_warp, returned };

// One thread of a block. It is started with ucontext, and later switched with setjmp and longjmp,
// which make no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf context;
  bool started;
  State state;
  // Where it waits, and its arguments of the operation of the warp or of the barrier.
  Site site;
  Operation operation;
  uint32_t mask;
  const void* in;
  void* out;
  int number;
  size_t size;
  bool value;
  std::vector<Copy> copies;              // copies that belong to no group yet
  std::deque<std::vector<Copy>> groups;  // committed groups that have not been waited for
};

Fiber fibers[kThreads];
char* stacks;
int current, threads;   // the thread that runs, and the number of threads of the block
int waiting, returned;  // threads of the block at its barrier, and threads that have returned
jmp_buf scheduler;
const Kernel* kernel;
std::string failure;                           // why the launch ends, or empty
std::map<const void*, size_t> shared_granted;  // per kernel, by cudaFuncSetAttribute
alignas(1024) char shared_memory[kShared];
thread_local volatile char first_shared;  // its use makes the thread-local storage exist
char* static_shared;                      // the __shared__ variables
size_t static_shared_bytes;

std::string at(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

// Ends the launch. Called in a fiber.
[[noreturn]] void fail(const std::string& what) {
  failure = std::string(kernel->name) + ", block " + std::to_string(position.block.x) +
            ", thread " + std::to_string(current) + ": " + what;
  check::record(false);
  _longjmp(scheduler, 1);
}

void fault(const char* kind, const std::string& what) {
#ifdef TRACMOD_CHECK
  check::report(kind, what);
#else
  fail(std::string(kind) + ": " + what);
#endif
}

// Control returns to the scheduler until the fiber runs again.
void pause() {
  check::record(false);
  if (_setjmp(fibers[current].context) == 0) _longjmp(scheduler, 1);
  check::record(true);
}

// Lets the threads at the barrier continue once no thread of the block is on its way to it.
void release_block() {
  if (waiting == 0 || waiting + returned < threads) return;
  const auto thread_in = [](State state) {
    int i = 0;
    while (fibers[i].state != state) ++i;
    return i;
  };
  const int first = thread_in(State::at_block);
  const Site site = fibers[first].site;
  if (returned > 0) {
    fault("barrier", "thread " + std::to_string(thread_in(State::returned)) +
                         " returned before the barrier at " + at(site) + " that thread " +
                         std::to_string(first) + " waits at");
  }
  int count = 0;
  bool mismatch = false;
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state != State::at_block) continue;
    count += fiber.value;
    if (!mismatch && (fiber.site.line != site.line || strcmp(fiber.site.file, site.file) != 0)) {
      mismatch = true;
      fault("barrier", "threads " + std::to_string(first) + " and " + std::to_string(i) +
                           " are at different barriers: " + at(site) + " and " + at(fiber.site));
    }
  }
  for (int i = 0; i < threads; ++i) {
    if (fibers[i].state != State::at_block) continue;
    *static_cast<int*>(fibers[i].out) = count;
    fibers[i].state = State::runs;
  }
  waiting = 0;
  check::next_round();
}

float towards_zero(double value) {
  const float nearest = static_cast<float>(value);
  const bool over =
      std::isfinite(value) && std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return over ? std::nextafterf(nearest, 0.0f) : nearest;
}

float bf16(uint32_t word, int half) {
  return __uint_as_float(half == 0 ? word << 16 : word & 0xffff0000u);
}
float tf32(uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); }

// d += a b for all lanes. Each register holds `values` numbers; value(register, i) is the i-th. The
// table in mma.cuh shows which lane holds an element.
template <class Value>
void multiply(const Fiber* lanes, int values, Value value) {
  struct Operands {
    const uint32_t *a, *b;
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, column = lane % 4 * 2 + i % 2;
      double sum = d[i];
      for (int half = 0; half < 2; ++half) {
        for (int t = 0; t < 4; ++t) {
          const uint32_t* a = static_cast<const Operands*>(lanes[row * 4 + t].in)->a;
          const uint32_t* b = static_cast<const Operands*>(lanes[column * 4 + t].in)->b;
          for (int v = 0; v < values; ++v) {
            const double left = value(a[i / 2 + 2 * half], v);
            sum += left * value(b[half], v);
          }
        }
      }
      d[i] = towards_zero(sum);
    }
  }
}

void load_matrices(const Fiber* lanes, bool transposed) {
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* to = static_cast<uint32_t*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const auto row = [&](int r) { return static_cast<const char*>(lanes[i * 8 + r].in); };
      if (!transposed) {
        memcpy(&to[i], row(lane / 4) + lane % 4 * 4, 4);
        continue;
      }
      uint16_t values[2];
      for (int v = 0; v < 2; ++v) memcpy(&values[v], row(lane % 4 * 2 + v) + lane / 4 * 2, 2);
      memcpy(&to[i], values, 4);
    }
  }
}

// Does an operation for the lanes of a warp, all of which have arrived.
void do_operation(Operation operation, int first, uint32_t mask) {
  Fiber* lanes = fibers + first;
  switch (operation) {
    case Operation::sync:
      return check::join_lanes(first, mask);
    case Operation::shuffle:
      for (int lane = 0; lane < kWarp; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        const Fiber& fiber = lanes[lane];
        const bool named = (mask >> fiber.number & 1) != 0;
        if (!named) {
          fault("lanes", "lane " + std::to_string(lane) + " reads lane " +
                             std::to_string(fiber.number) + ", which is not in the mask, at " +
                             at(fiber.site));
        }
        memcpy(fiber.out, lanes[named ? fiber.number : lane].in, fiber.size);
      }
      return;
    case Operation::ballot: {
      unsigned bits = 0;
      for (int lane = 0; lane < kWarp; ++lane) {
        const bool named = (mask >> lane & 1) != 0;
        if (named && *static_cast<const int*>(lanes[lane].in) != 0) bits |= 1u << lane;
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        if ((mask >> lane & 1) != 0) memcpy(lanes[lane].out, &bits, sizeof bits);
      }
      return;
    }
    case Operation::multiply_bf16:
      return multiply(lanes, 2, bf16);
    case Operation::multiply_tf32:
      return multiply(lanes, 1, tf32);
    case Operation::load:
      return load_matrices(lanes, false);
    case Operation::load_transposed:
      return load_matrices(lanes, true);
  }
}

// Does the operation that the current lane waits for if all lanes of its mask wait for it, too.
void release_warp() {
  const int first = current / kWarp * kWarp;
  const uint32_t mask = fibers[current].mask;
  const auto named = [&](int lane) { return (mask >> lane & 1) != 0; };
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!named(lane)) continue;
    const Fiber& fiber = fibers[first + lane];
    if (first + lane >= threads || fiber.state != State::at_warp || fiber.mask != mask) return;
  }
  const Fiber& mine = fibers[current];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fiber& fiber = fibers[first + lane];
    if (!named(lane) || (fiber.site.line == mine.site.line && fiber.operation == mine.operation)) {
      continue;
    }
    if (fiber.operation != mine.operation) {
      fail("lanes of a warp meet in different operations, at " + at(mine.site) + " and " +
           at(fiber.site));
    }
    fault("lanes",
          "lanes of a warp meet at different lines: " + at(mine.site) + " and " + at(fiber.site));
  }
  do_operation(mine.operation, first, mask);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (named(lane)) fibers[first + lane].state = State::runs;
  }
}

// Entry point of a fiber.
void enter() {
  check::record(true);
  kernel->call(kernel->closure);
  check::record(false);
  fibers[current].state = State::returned;
  ++returned;
  release_block();
  _longjmp(scheduler, 1);
}

void prepare(int index) {
  Fiber& fiber = fibers[index];
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stacks + index * kStack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  fiber.started = false;
  fiber.state = State::runs;
  fiber.copies.clear();
  fiber.groups.clear();
}

// Runs a thread until it waits or returns.
void resume(int index) {
  Fiber& fiber = fibers[index];
  current = index;
  position.thread = dim3(index);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs every thread of a warp that does not have to wait; returns false if there is none. Local
// variables are volatile because resume, whose setjmp would not preserve them, may be inlined.
bool run_warp(int begin, int end) {
  volatile bool progress = false;
  for (volatile int i = begin; i < end && failure.empty(); i = i + 1) {
    const int index = backwards ? begin + end - 1 - i : i;
    if (fibers[index].state != State::runs) continue;
    progress = true;
    resume(index);
  }
  return progress;
}

// Says where the threads of a deadlock wait.
std::string deadlock() {
  std::string text;
  std::map<std::string, bool> seen;
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    std::string where = "returned";
    if (fiber.state == State::at_block) where = "waits at the barrier " + at(fiber.site);
    if (fiber.state == State::at_warp) {
      where = "waits for the lanes of its mask at " + at(fiber.site);
    }
    if (!seen.emplace(where, true).second) continue;
    text += (text.empty() ? "thread " : "; thread ") + std::to_string(i) + " " + where;
  }
  return text;
}

// Runs one block; each warp runs as far as it can before the next one does.
void run_block(size_t shared) {
  memset(shared_memory, 0xff, shared);  // NaN
  memset(static_shared, 0xff, static_shared_bytes);
  check::begin_block();
  waiting = returned = 0;
  for (int i = 0; i < threads; ++i) prepare(i);
  for (volatile bool progress = true; progress && failure.empty();) {
    progress = false;
    for (volatile int i = 0; i < threads; i = i + kWarp) {
      const int first = backwards ? (threads - 1) / kWarp * kWarp - i : i;
      while (run_warp(first, first + kWarp < threads ? first + kWarp : threads)) progress = true;
    }
  }
  for (int i = 0; i < threads && failure.empty(); ++i) {
    if (fibers[i].state == State::returned) continue;
    const bool lanes = fibers[i].state == State::at_warp;
    check::report(lanes ? "lanes" : "barrier", deadlock());
    failure = std::string(kernel->name) + ": deadlock: " + deadlock();
  }
}

// Finds the thread-local storage of this library.
int find_static_shared(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&find_static_shared);
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD && here >= begin && here < begin + header.p_memsz) ours = true;
    if (header.p_type == PT_TLS) bytes = header.p_memsz;
  }
  if (!ours) return 0;
  static_shared = static_cast<char*>(info->dlpi_tls_data);
  static_shared_bytes = bytes;
  return 1;
}

void set_up() {
  if (stacks != nullptr) return;
  first_shared = 0;
  stacks = static_cast<char*>(aligned_alloc(4096, kThreads * kStack));
  dl_iterate_phdr(find_static_shared, nullptr);
  check::add_stacks(stacks, kThreads * kStack);
  check::add_shared("static shared memory", static_shared, static_shared_bytes);
}

// What is wrong with a launch, or an empty text.
std::string refused(const Kernel& kernel, dim3 grid, dim3 size, size_t shared) {
  const auto granted = shared_granted.find(kernel.function);
  const size_t most = granted == shared_granted.end() ? kSharedDefault : granted->second;
  if (shared > most) {
    return std::to_string(shared) + " bytes of dynamic shared memory, granted " +
           std::to_string(most);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || size.x == 0) return "an empty grid or block";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "a grid beyond its limits";
  if (size.y != 1 || size.z != 1) return "a block of more than one dimension is not emulated";
  if (size.x > static_cast<unsigned>(kernel.most_threads)) {
    return std::to_string(size.x) + " threads, expected at most " +
           std::to_string(kernel.most_threads);
  }
  return "";
}

}  // namespace

void warp_operation(Operation operation, uint32_t mask, const void* in, void* out, int number,
                    size_t size, Site site) {
  check::record(false);
  Fiber& fiber = fibers[current];
  const bool loads = operation == Operation::load || operation == Operation::load_transposed;
  if (loads) {
    if (reinterpret_cast<uintptr_t>(in) % 16 != 0) {
      check::report("misaligned", "a row of load_matrices is not a multiple of 16");
      fail("a row of load_matrices is not aligned");
    }
    check::record(true);
    check::access(in, 16, check::Access::read, __builtin_return_address(0));
    check::record(false);
  }
  const uint32_t own = 1u << current % kWarp;
  if ((mask & own) == 0) {
    fault("lanes",
          "lane " + std::to_string(current % kWarp) + " is not in its own mask at " + at(site));
  }
  fiber.operation = operation;
  fiber.mask = mask | own;
  fiber.in = in;
  fiber.out = out;
  fiber.number = number;
  fiber.size = size;
  fiber.site = site;
  fiber.state = State::at_warp;
  release_warp();
  pause();
}

int block_barrier(bool value, Site site) {
  check::record(false);
  int count = 0;
  Fiber& fiber = fibers[current];
  fiber.value = value;
  fiber.out = &count;
  fiber.site = site;
  fiber.state = State::at_block;
  ++waiting;
  release_block();
  pause();
  return count;
}

void copy_later(void* to, const void* from, int bytes, int size) {
  const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (bits % size != 0) {
    check::report("misaligned", "an address of an asynchronous copy is not a multiple of " +
                                    std::to_string(size));
    fail("an address of an asynchronous copy is not aligned");
  }
  if (bytes < 0 || bytes > size) fail("an asynchronous copy of more bytes than its size");
  check::access(to, size, check::Access::copy, __builtin_return_address(0));
  if (bytes > 0) check::access(from, bytes, check::Access::read, __builtin_return_address(0));
  memset(to, 0xff, size);
  fibers[current].copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, size});
}

void commit_copies() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

void wait_copies(int groups) {
  auto& under_way = fibers[current].groups;
  for (; under_way.size() > static_cast<size_t>(groups); under_way.pop_front()) {
    for (const Copy& copy : under_way.front()) {
      check::access(copy.to, copy.size, check::Access::write, __builtin_return_address(0));
      memset(copy.to, 0, copy.size);
      memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

void atomic_access(const void* at, size_t size) {
  check::access(at, size, check::Access::atomic, __builtin_return_address(0));
}

char* dynamic_shared() { return shared_memory; }

void fail(const char* what) { fail(std::string(what)); }

bool grant_shared(const void* function, size_t bytes) {
  if (bytes > kSharedMaximum) return false;
  shared_granted[function] = bytes;
  return true;
}

void forget_grants() { shared_granted.clear(); }

void launch(const Kernel& launched, dim3 grid, dim3 size, size_t shared) {
  set_up();
  const std::string wrong = refused(launched, grid, size, shared);
  if (!wrong.empty()) {
    check::report("launch", std::string(launched.name) + ": " + wrong);
    throw std::runtime_error(std::string(launched.name) + ": launch refused: " + wrong);
  }
  kernel = &launched;
  threads = static_cast<int>(size.x);
  position.block_size = size;
  position.grid_size = grid;
  failure.clear();
  check::add_shared("dynamic shared memory", shared_memory, shared);
  check::begin_launch(launched.name, launched.closure, launched.closure_bytes);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && failure.empty(); ++x) {
        position.block = dim3(x, y, z);
        run_block(shared);
      }
    }
  }
  check::end_launch();
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace emu

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  check::host_write(to, bytes);
  memset(to, value, bytes);
  return cudaSuccess;
}

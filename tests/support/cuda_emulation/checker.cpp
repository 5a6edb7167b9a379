// Checks every access of the emulated kernels to memory, without a GPU.
//
// The kernels are compiled with -fsanitize=thread, but linked with the callbacks of this file in
// place of the sanitizer's runtime. Reported are
//
//   race           two accesses to a byte, at least one a write, that nothing orders
//   outside        an access outside of the tensors, the scratch and the shared memory
//   read-only      a write to an input
//   uninitialized  a read of shared memory that nobody wrote in this block, of scratch that nobody
//                  wrote in this call, or of an asynchronous copy before it was waited for
//   misaligned     an access whose address is not a multiple of its size
//   barrier, lanes, launch    what emulator.cpp finds
//
// An access that is outside or misaligned ends the launch before it happens.
//
// Two accesses are ordered if they are in different launches, in the same thread, in the same block
// with a barrier between them, or in the same warp with a __syncwarp between them that names both
// lanes. Blocks are never ordered. Two atomic accesses do not conflict.
//
// For every byte the last write and three reads are remembered: the last one, the last one of
// another lane of that warp, and the last one of another warp. Hence a write that conflicts with a
// read of any other warp, or of any other lane, finds one to conflict with.
#include "checker.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <tuple>
#include <vector>

#include "cuda_runtime.h"

namespace check {
namespace {

constexpr int kThreads = 1024, kLanes = 32;
constexpr size_t kMostReports = 20;

// One access of one thread. Accesses between the same two barriers share a segment; segments are
// numbered through all launches of a process, 0 is none.
struct Mark {
  uint32_t segment = 0;
  bool atomic = false;
  const void* code = nullptr;
};

struct Cell {
  Mark write, read, lane_read, warp_read;
  bool copying;  // written by an asynchronous copy that has not been waited for
};

struct Segment {
  uint32_t block, round, epoch;
  int thread;
};

enum class Content { shared, tensor, input, scratch };

struct Region {
  const char* name;
  uintptr_t begin, end;
  Content content;
  Cell* cells;  // one per byte; zeros (calloc) are empty cells
};

struct Range {
  uintptr_t begin = 0, end = 0;

  bool holds(uintptr_t at) const { return at >= begin && at < end; }
};

bool recording = false;
std::vector<Region> regions;
const Region* last_region = nullptr;
Range stacks, closure;
const char* kernel = "";
uint32_t block, round_number, block_begin;    // number of the block, and its first segment
std::vector<Segment> segments;                // of this launch
uint32_t launch_begin = 1, next_segment = 1;  // first segment of this launch; next one
uint32_t current_segment[kThreads];           // 0 after a barrier
uint32_t epochs[kThreads];
uint32_t clocks[kThreads][kLanes];  // epoch of each lane of its warp that a thread has joined
std::set<std::tuple<std::string, const void*, const void*>> known;
std::string reports;

int thread() { return static_cast<int>(emu::position.thread.x); }

// The place of an instruction, which native.py replaces by its line.
std::string place(const void* code) {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&place), &info);
  char text[32];
  const auto offset =
      reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  snprintf(text, sizeof text, "@0x%zx@", static_cast<size_t>(offset) - 1);
  return text;
}

std::string where(const Region* region, uintptr_t at) {
  return region == nullptr ? "memory"
                           : "byte " + std::to_string(at - region->begin) + " of " + region->name;
}

void report_once(const char* kind, const void* code, const void* other, const std::string& text) {
  if (known.size() < kMostReports && known.emplace(kind, code, other).second) {
    reports += std::string(kind) + ": " + kernel + ": " + text + "\n";
  }
}

// Whether a library holds the address in memory that cannot be written: constants.
bool is_constant(uintptr_t at) {
  const auto visit = [](dl_phdr_info* info, size_t, void* data) {
    const uintptr_t at = *static_cast<uintptr_t*>(data);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
      const bool writable = (header.p_flags & PF_W) != 0;
      if (header.p_type == PT_LOAD && !writable && at >= begin && at < begin + header.p_memsz) {
        return 1;
      }
    }
    return 0;
  };
  return dl_iterate_phdr(visit, &at) != 0;
}

const Region* region_of(uintptr_t at) {
  if (last_region != nullptr && at >= last_region->begin && at < last_region->end) {
    return last_region;
  }
  for (const Region& region : regions) {
    if (at >= region.begin && at < region.end) return last_region = &region;
  }
  return nullptr;
}

// The segment of the current thread; it begins with the first access after a barrier.
uint32_t segment_of(int thread) {
  uint32_t& segment = current_segment[thread];
  if (segment < block_begin) {
    segment = next_segment++;
    segments.push_back({block, round_number, epochs[thread], thread});
  }
  return segment;
}

bool conflicts(const Mark& before, bool atomic, const Segment& now, Content content) {
  if (before.segment < launch_begin || (before.atomic && atomic)) return false;
  const Segment& then = segments[before.segment - launch_begin];
  if (then.block != now.block) return content != Content::shared;
  if (then.thread == now.thread || then.round != now.round) return false;
  const bool joined = clocks[now.thread][then.thread % kLanes] >= then.epoch;
  return then.thread / kLanes != now.thread / kLanes || !joined;
}

void report_race(const char* kinds, const Mark& before, const Region& region, uintptr_t at,
                 const void* code) {
  const Segment& then = segments[before.segment - launch_begin];
  report_once("race", before.code, code,
              std::string(kinds) + " at " + where(&region, at) + ": thread " +
                  std::to_string(then.thread) + " of block " + std::to_string(then.block) + " at " +
                  place(before.code) + ", thread " + std::to_string(thread()) + " of block " +
                  std::to_string(block) + " at " + place(code));
}

// Reports a read of bytes that nobody has written. A hole of fewer than 8 bytes in a larger access
// is not one: it may be the padding of a struct.
void check_written(const Region& region, uintptr_t at, size_t bytes, const void* code) {
  const bool shared = region.content == Content::shared;
  if (!shared && region.content != Content::scratch) return;
  size_t unwritten = 0;
  bool copying = false;
  for (size_t i = 0; i < bytes; ++i) {
    const Cell& cell = region.cells[at - region.begin + i];
    unwritten += cell.write.segment < (shared ? block_begin : 1);
    copying = copying || cell.copying;
  }
  if (!copying && (unwritten == 0 || (bytes > 8 && unwritten < 8))) return;
  report_once("uninitialized", code, nullptr,
              "thread " + std::to_string(thread()) + " reads " + where(&region, at) +
                  (copying ? ", an asynchronous copy that it has not waited for, at "
                           : ", which nobody has written, at ") +
                  place(code));
}

void check_byte(const Region& region, uintptr_t at, Access access, uint32_t segment,
                const void* code) {
  Cell& cell = region.cells[at - region.begin];
  const bool atomic = access == Access::atomic;
  if (access == Access::read && cell.read.segment == segment) return;
  const Segment now = segments[segment - launch_begin];
  if (conflicts(cell.write, atomic, now, region.content)) {
    report_race(access == Access::read ? "write, then read," : "two writes", cell.write, region, at,
                code);
  }
  const Mark mark{segment, atomic, code};
  if (access == Access::read) {
    if (cell.read.segment >= launch_begin) {
      const int before = segments[cell.read.segment - launch_begin].thread;
      if (before / kLanes != now.thread / kLanes) {
        cell.warp_read = cell.read;
      } else if (before != now.thread) {
        cell.lane_read = cell.read;
      }
    }
    cell.read = mark;
    return;
  }
  for (const Mark* read : {&cell.read, &cell.lane_read, &cell.warp_read}) {
    if (!conflicts(*read, atomic, now, region.content)) continue;
    report_race("read, then write,", *read, region, at, code);
    break;
  }
  cell.write = mark;
  cell.copying = access == Access::copy;
}

void add_region(const char* name, const void* begin, size_t bytes, Content content) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  auto* cells = static_cast<Cell*>(calloc(bytes == 0 ? 1 : bytes, sizeof(Cell)));
  regions.push_back({name, at, at + bytes, content, cells});
  last_region = nullptr;
}

void remove_regions(bool (*remove)(const Region&)) {
  std::vector<Region> others;
  for (const Region& region : regions) {
    if (remove(region)) {
      free(region.cells);
    } else {
      others.push_back(region);
    }
  }
  regions = others;
  last_region = nullptr;
}

}  // namespace

void record(bool on) { recording = on; }

void add_stacks(const void* begin, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  stacks = {at, at + bytes};
}

void add_shared(const char* name, const void* begin, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  for (Region& region : regions) {
    if (region.begin == at && region.content == Content::shared) {
      region.end = at + bytes;
      last_region = nullptr;
      return;
    }
  }
  add_region(name, begin, size_t{256} << 10, Content::shared);
  regions.back().end = at + bytes;
}

void begin_launch(const char* name, const void* made, size_t bytes) {
  kernel = name;
  const auto at = reinterpret_cast<uintptr_t>(made);
  closure = {at, at + bytes};
  launch_begin = next_segment;
  segments.clear();
  block = 0;
}

void end_launch() { recording = false; }

void begin_block() {
  ++block;
  round_number = 0;
  block_begin = next_segment;
  memset(clocks, 0, sizeof clocks);
  for (uint32_t& epoch : epochs) epoch = 1;
}

// A barrier of the block has been passed: all threads begin new segments.
void next_round() {
  ++round_number;
  memset(current_segment, 0, sizeof current_segment);
}

// The lanes of a mask have passed a __syncwarp: what one did or had joined, all have joined.
void join_lanes(int first, uint32_t mask) {
  uint32_t joined[kLanes] = {};
  const auto named = [&](int lane) { return (mask >> lane & 1) != 0; };
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!named(lane)) continue;
    for (int other = 0; other < kLanes; ++other) {
      if (clocks[first + lane][other] > joined[other]) joined[other] = clocks[first + lane][other];
    }
    joined[lane] = epochs[first + lane]++;
    current_segment[first + lane] = 0;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (named(lane)) memcpy(clocks[first + lane], joined, sizeof joined);
  }
}

void report(const char* kind, const std::string& text) {
  static const char calls[kMostReports] = {};  // each report counts as another instruction
  report_once(kind, calls + known.size() % kMostReports, nullptr, text);
}

void access(const void* pointer, size_t bytes, Access access, const void* code) {
  if (!recording) return;
  recording = false;
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const Range position{reinterpret_cast<uintptr_t>(&emu::position),
                       reinterpret_cast<uintptr_t>(&emu::position + 1)};
  const bool read = access == Access::read;
  const bool local = stacks.holds(at) || (read && (closure.holds(at) || position.holds(at)));
  if (!local) {
    const Region* region = region_of(at);
    if (region == nullptr || at + bytes > region->end) {
      if (!read || region != nullptr || !is_constant(at)) {
        report_once("outside", code, nullptr,
                    "thread " + std::to_string(thread()) + (read ? " reads " : " writes ") +
                        std::to_string(bytes) + " bytes outside of all tensors" +
                        (region == nullptr ? "" : ", behind " + std::string(region->name)) +
                        ", at " + place(code));
        emu::fail("an access outside of all tensors");
      }
    } else {
      if (!read && region->content == Content::input) {
        report_once("read-only", code, nullptr,
                    "thread " + std::to_string(thread()) + " writes " + where(region, at) +
                        ", an input, at " + place(code));
      }
      if (read || access == Access::atomic) check_written(*region, at, bytes, code);
      const uint32_t segment = segment_of(thread());
      for (size_t i = 0; i < bytes; ++i) check_byte(*region, at + i, access, segment, code);
    }
  }
  recording = true;
}

void host_write(const void* pointer, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const Region* region = region_of(at);
  if (bytes > 0 && (region == nullptr || at + bytes > region->end)) {
    return report("outside", "cudaMemsetAsync writes outside of all tensors");
  }
  const uint32_t segment = next_segment++;
  for (size_t i = 0; i < bytes; ++i) region->cells[at - region->begin + i].write.segment = segment;
}

namespace {

// An access whose alignment the hardware requires.
void aligned_access(const void* at, size_t bytes, Access kind, const void* code) {
  if (!recording) return;
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) {
    recording = false;
    report_once("misaligned", code, nullptr,
                "thread " + std::to_string(thread()) + " accesses " + std::to_string(bytes) +
                    " bytes at an address that is not a multiple of that, at " + place(code));
    emu::fail("a misaligned access");
  }
  access(at, bytes, kind, code);
}

}  // namespace
}  // namespace check

// The callbacks that the compiler inserts with -fsanitize=thread.
#define CALLER __builtin_return_address(0)
#define CALLBACKS(n)                                                        \
  extern "C" void __tsan_read##n(void* at) {                                \
    check::aligned_access(at, n, check::Access::read, CALLER);              \
  }                                                                         \
  extern "C" void __tsan_write##n(void* at) {                               \
    check::aligned_access(at, n, check::Access::write, CALLER);             \
  }                                                                         \
  extern "C" void __tsan_volatile_read##n(void* at) { __tsan_read##n(at); } \
  extern "C" void __tsan_volatile_write##n(void* at) { __tsan_write##n(at); }
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)

// Objects of another size, or aligned to less than it.
extern "C" void __tsan_read_range(void* at, size_t bytes) {
  check::access(at, bytes, check::Access::read, CALLER);
}
extern "C" void __tsan_write_range(void* at, size_t bytes) {
  check::access(at, bytes, check::Access::write, CALLER);
}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}

// For native.py. `content` is the number of a Content.
extern "C" void check_add_memory(const char* name, const void* begin, size_t bytes, int content) {
  check::add_region(name, begin, bytes, static_cast<check::Content>(content));
}
extern "C" void check_remove_memory() {
  check::remove_regions(
      [](const check::Region& region) { return region.content != check::Content::shared; });
}
extern "C" const char* check_reports() { return check::reports.c_str(); }
extern "C" void check_begin(int fault) {
  check::reports.clear();
  check::known.clear();
  emu::forget_grants();
  emu::position.fault = fault;
}

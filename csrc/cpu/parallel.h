// Distributes work items over threads. Threads take the next item from a shared counter, so which
// thread runs which item varies from run to run. For results that repeat bit by bit, every item
// must own its output, and nothing may depend on the order of items.
#pragma once

#include <atomic>
#include <cstdint>

namespace tracmod::cpu {

// Runs body(context) on `threads` threads, including the calling one, and returns when all of them
// have finished. (OpenMP may grant fewer threads; body must then do all the work with those.)
void run_on_threads(int threads, void (*body)(void*), void* context);

// Calls work(item, slot) for every item in [0, items). slot is in [0, threads) and is used by one
// thread only, so an array of one scratch buffer per slot is safe.
template <class Work>
void parallel_for(int threads, int64_t items, const Work& work) {
  struct Context {
    const Work& work;
    int64_t items;
    std::atomic<int64_t> next_item{0};
    std::atomic<int> next_slot{0};
  } context{work, items, {0}, {0}};
  const auto body = [](void* raw) {
    auto& shared = *static_cast<Context*>(raw);
    const int slot = shared.next_slot++;
    for (int64_t item = shared.next_item++; item < shared.items; item = shared.next_item++) {
      shared.work(item, slot);
    }
  };
  run_on_threads(static_cast<int>(items < threads ? items : threads), body, &context);
}

}  // namespace tracmod::cpu

// Work items spread over threads. Which thread takes which item is left to chance; so an op must
// give every item its own output and leave nothing to the order of items.
#pragma once

#include <atomic>
#include <cstdint>

namespace tracmod::cpu {

// Runs body(context) on up to `threads` threads at once, this one included; returns when all have
// returned.
void run_on_threads(int threads, void (*body)(void*), void* context);

// work(item, slot) for every item in [0, items). No two items run under one slot at the same time,
// and slot < threads: scratch per slot is safe.
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

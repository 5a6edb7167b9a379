// Threads for the CPU ops.
#include "cpu/parallel.h"

#include <thread>
#include <vector>

namespace tracmod::cpu {

void run_on_threads(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(body, context);
  body(context);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace tracmod::cpu

// Threads for the CPU ops: torch's own, where they can be had, else threads of one call.
//
// Torch's OpenMP workers spin for a while after each of its operations; threads of our own would
// share the cores with them. So a team is asked of the OpenMP library that torch has brought into
// the process: looked up there, not linked, the module needs no OpenMP to be built or imported.
#include "cpu/parallel.h"

#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>
#endif

namespace tracmod::cpu {
namespace {

// The entry point that GCC's compiled `#pragma omp parallel` calls: body(context) on each of
// `threads` threads; stable since GCC 4.9.
using OpenMP = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

#ifdef __linux__
// Keeps the path of a loaded libgomp; torch's own copy before another package's.
int keep_libgomp(dl_phdr_info* library, size_t, void* raw) {
  auto& path = *static_cast<std::string*>(raw);
  const bool openmp = std::strstr(library->dlpi_name, "/libgomp") != nullptr;
  const bool of_torch = std::strstr(library->dlpi_name, "/torch/") != nullptr;
  if (openmp && (path.empty() || of_torch)) path = library->dlpi_name;
  return openmp && of_torch ? 1 : 0;
}

OpenMP find_openmp() {
  std::string path;
  dl_iterate_phdr(keep_libgomp, &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<OpenMP>(dlsym(library, "GOMP_parallel"));
}
#else
OpenMP find_openmp() { return nullptr; }
#endif

}  // namespace

void run_on_threads(int threads, void (*body)(void*), void* context) {
  if (threads <= 1) {
    body(context);
    return;
  }
  static const OpenMP openmp = find_openmp();
  if (openmp != nullptr) {
    openmp(body, context, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(body, context);
  body(context);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace tracmod::cpu

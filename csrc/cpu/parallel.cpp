// Threads for the CPU ops: the OpenMP threads that torch already uses, if there are any, else
// threads created for the call.
//
// Torch's OpenMP workers keep spinning for a while after each of its operations. Threads of our own
// would compete with them for the cores: on a busy machine with 2 cores a small call right after a
// torch operation took up to 20 ms that way, and takes 0.2 ms now. So the ops run on the OpenMP
// library that torch has loaded into the process. It is looked up at run time and not linked, so
// the module needs no OpenMP to be built or imported.
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

// GOMP_parallel, the function that code compiled by GCC calls for `#pragma omp parallel`: it runs
// body(context) on each of `threads` threads. Its interface is stable since GCC 4.9.
using OpenMP = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

#ifdef __linux__
// Callback for dl_iterate_phdr that stores the path of a loaded libgomp. A process may hold several
// copies of it; torch's copy is preferred, because its threads are the ones that spin.
int choose_libgomp(dl_phdr_info* library, size_t, void* raw) {
  auto& path = *static_cast<std::string*>(raw);
  const bool is_openmp = std::strstr(library->dlpi_name, "/libgomp") != nullptr;
  const bool from_torch = std::strstr(library->dlpi_name, "/torch/") != nullptr;
  if (is_openmp && (path.empty() || from_torch)) path = library->dlpi_name;
  return is_openmp && from_torch ? 1 : 0;  // 1 ends the search
}

OpenMP find_openmp() {
  std::string path;
  dl_iterate_phdr(choose_libgomp, &path);
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

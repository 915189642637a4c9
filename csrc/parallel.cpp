// SPDX-License-Identifier: Apache-2.0
// The threads are those of the OpenMP runtime that PyTorch has loaded, looked up by name, so that
// the module links none. Others would compete with them for the cores: OpenMP's threads wait for
// their next work in a loop, for milliseconds, and a product comes before and after ours. Measured
// with threads of our own on two cores: the whole op 10 % slower.
#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace fastvit {
namespace {

struct Work {
  void (*body)(void*, int64_t);
  void* context;
  int64_t parts;
  std::atomic<int64_t> next{0};

  // What each thread does, however many come.
  void take_parts() {
    for (int64_t part = next++; part < parts; part = next++) {
      body(context, part);
    }
  }
};

// GCC's entry to a parallel region, which LLVM's and Intel's runtimes have, too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_gomp_parallel() {
#ifdef __SANITIZE_THREAD__
  return nullptr;  // ThreadSanitizer does not see how that runtime synchronises
#else
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

void run_in_new_threads(Work& work) {
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(work.parts));
  try {
    for (int64_t i = 1; i < work.parts; ++i) {
      others.emplace_back([&work] { work.take_parts(); });
    }
  } catch (const std::system_error&) {
    // The system grants no more threads: those that there are do the rest.
  }
  work.take_parts();
  for (std::thread& other : others) {
    other.join();
  }
}

}  // namespace

void run_parts(int64_t parts, void (*body)(void*, int64_t), void* context) {
  static const GompParallel gomp_parallel = find_gomp_parallel();
  Work work{body, context, parts};
  if (gomp_parallel != nullptr) {
    const auto take_parts = [](void* w) { static_cast<Work*>(w)->take_parts(); };
    gomp_parallel(take_parts, &work, static_cast<unsigned>(parts), 0);
  } else {
    run_in_new_threads(work);
  }
}

}  // namespace fastvit

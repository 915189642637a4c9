// SPDX-License-Identifier: Apache-2.0
// Loops over several threads of the processor.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastvit {

// What a thread must have to write before it is woken: about 10 us.
constexpr int64_t kBytesPerThread = 64 * 1024;

// Calls body(context, part) once for each part in [0, parts), in up to `parts` threads. The body
// must not throw.
void run_parts(int64_t parts, void (*body)(void* context, int64_t part), void* context);

// Calls body(first, last) for ranges that together cover [0, count), in up to `threads` threads:
// one for each kBytesPerThread of `count` items of `bytes_each`. The body must not throw.
template <typename Body>
void parallel_for(int64_t count, int64_t bytes_each, int64_t threads, const Body& body) {
  const int64_t worth = count * bytes_each / kBytesPerThread;
  const int64_t parts = std::min({threads, worth, count});
  if (parts <= 1) {
    body(int64_t{0}, count);
    return;
  }
  struct Loop {
    const Body& body;
    int64_t count, parts;
    int64_t start(int64_t part) const {
      return count / parts * part + count % parts * part / parts;
    }
  } loop{body, count, parts};
  run_parts(
      parts,
      [](void* context, int64_t part) {
        const auto* l = static_cast<const Loop*>(context);
        l->body(l->start(part), l->start(part + 1));
      },
      &loop);
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda_support.h gives where there is a CUDA runtime.
#pragma once

#include "emulated_cuda.h"
#include "emulator.h"

namespace fastvit {

struct DeviceLimits {
  int multiprocessors, shared_bytes_of_block, shared_bytes_of_multiprocessor;
};

inline DeviceLimits device_limits(int) {
  const emulator::Device device = emulator::device();
  return {device.multiprocessors, device.shared_bytes_of_block,
          device.shared_bytes_of_multiprocessor};
}

struct Blocks {
  int64_t x, y;
};

template <typename Args>
void launch_kernel(void (*kernel)(Args), Blocks blocks, int threads, int shared_bytes, int, void*,
                   const char* name, const Args& args) {
  emulator::run({name, blocks.x, blocks.y, threads, shared_bytes, [&] { kernel(args); }});
}

}  // namespace fastvit

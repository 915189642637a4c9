// SPDX-License-Identifier: Apache-2.0
// CUDA's C++ for a plain compiler: enough of it to run the kernels of csrc/ thread by thread on a
// processor. See emulator.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};
extern EmulatedIndex threadIdx, blockIdx;

namespace emulator {
void barrier(const char* file, int line);
}
#define __syncthreads() emulator::barrier(__FILE__, __LINE__)

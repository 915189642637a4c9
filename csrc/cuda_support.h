// SPDX-License-Identifier: Apache-2.0
// What every use of the CUDA runtime shares. The module links the static runtime, which shares
// with PyTorch's only the driver: its contexts and each thread's current one.
#pragma once

#ifdef FASTVIT_EMULATED
#include "emulated_launch.h"
#else

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace fastvit {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ")");
  }
}

// Makes `device` current for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = previous_ != device;
    if (changed_) {
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
  }
  ~DeviceGuard() {
    if (changed_) {
      cudaSetDevice(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

struct DeviceLimits {
  int multiprocessors, shared_bytes_of_block, shared_bytes_of_multiprocessor;
};

inline DeviceLimits device_limits(int device) {
  const auto value = [device](cudaDeviceAttr attribute) {
    int result = 0;
    check_cuda(cudaDeviceGetAttribute(&result, attribute, device), "cudaDeviceGetAttribute");
    return result;
  };
  return {value(cudaDevAttrMultiProcessorCount), value(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          value(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

struct Blocks {
  int64_t x, y;
};

// Queues kernel(args) on `stream` of `device`. `name` is for the message where that fails.
template <typename Args>
void launch_kernel(void (*kernel)(Args), Blocks blocks, int threads, int shared_bytes, int device,
                   void* stream, const char* name, const Args& args) {
  if (blocks.x > std::numeric_limits<int32_t>::max() || blocks.y > 65535) {
    throw std::runtime_error(std::string(name) + ": expected fewer blocks than a grid holds, got " +
                             std::to_string(blocks.x) + " x " + std::to_string(blocks.y));
  }
  const DeviceGuard guard(device);
  const auto function = reinterpret_cast<const void*>(kernel);
  // More than 48 KB must be asked for, on each device.
  if (shared_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        name);
  }
  Args copy = args;
  void* parameters[] = {&copy};
  check_cuda(cudaLaunchKernel(
                 function, dim3(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y)),
                 dim3(static_cast<unsigned>(threads)), parameters,
                 static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
             name);
}

}  // namespace fastvit

#endif

// SPDX-License-Identifier: Apache-2.0
// What every use of the CUDA runtime shares. The module links the static runtime, which shares
// with PyTorch's only the driver: its contexts and each thread's current one.
#pragma once

#ifdef FASTVIT_EMULATED
#include "emulated_launch.h"
#else

#include <cudaTypedefs.h>
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

// A function of the driver, of the CUDA `version` that gave it its type. Through the runtime, so
// that the module loads where there is no libcuda.
template <typename Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found),
             "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string(name) + ": expected in the driver, got none");
  }
  return reinterpret_cast<Function>(function);
}

// Makes `device` current for the life of the guard. Then the thread has the context of before
// again, or none: setting the device of before would create a context on it, which for device 0 and
// a thread that works on another is some hundred megabytes that nobody asked for.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    static const auto get_current =
        driver_function<PFN_cuCtxGetCurrent_v4000>("cuCtxGetCurrent", 4000);
    int current = 0;
    check_cuda(cudaGetDevice(&current), "cudaGetDevice");
    if (get_current(&previous_) != CUDA_SUCCESS) {
      throw std::runtime_error("cuCtxGetCurrent: expected success, got an error");
    }
    changed_ = previous_ == nullptr || current != device;
    if (changed_) {
      set_current();  // where the driver lacks it, this says so and not the destructor
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
  }
  ~DeviceGuard() {
    if (changed_) {
      set_current()(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static PFN_cuCtxSetCurrent_v4000 set_current() {
    static const auto function =
        driver_function<PFN_cuCtxSetCurrent_v4000>("cuCtxSetCurrent", 4000);
    return function;
  }

  CUcontext previous_ = nullptr;
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

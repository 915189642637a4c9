// SPDX-License-Identifier: Apache-2.0
// Whether the CUDA code of this module can run here, for `fastvit info`.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"

#if FASTVIT_WITH_CUDA
#include <cuda_runtime_api.h>

#include "cuda_support.h"
#include "patch_embed.h"
#endif

namespace py = pybind11;

namespace fastvit {
namespace {

#if FASTVIT_WITH_CUDA

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

py::dict device_status(int index) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  cudaError_t kernel;
  {
    const DeviceGuard guard(index);
    kernel = static_cast<cudaError_t>(probe_patch_embed());
    cudaGetLastError();  // the probe's error is reported here and must not reach a later launch
  }
  py::dict device;
  device["name"] = std::string(properties.name);
  device["capability"] = std::to_string(properties.major) + "." + std::to_string(properties.minor);
  device["has_kernels"] = kernel == cudaSuccess;
  device["error"] =
      kernel == cudaSuccess ? py::object(py::none()) : py::str(cudaGetErrorString(kernel));
  return device;
}

py::dict cuda_status() {
  py::dict status;
  status["compiled"] = true;
  int runtime = 0;
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  status["runtime_version"] = version_text(runtime);
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  status["driver_version"] = driver == 0 ? py::object(py::none()) : py::str(version_text(driver));
  status["error"] = py::none();
  py::list devices;
  try {
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    for (int index = 0; index < count; ++index) {
      devices.append(device_status(index));
    }
  } catch (const std::runtime_error& error) {
    cudaGetLastError();
    status["error"] = std::string(error.what());
  }
  status["devices"] = devices;
  return status;
}

#else

py::dict cuda_status() {
  py::dict status;
  status["compiled"] = false;
  status["runtime_version"] = py::none();
  status["driver_version"] = py::none();
  status["error"] = "built without CUDA code";
  status["devices"] = py::list();
  return status;
}

#endif

}  // namespace

void register_cuda_status(py::module_& m) {
  m.def("cuda_status", &cuda_status,
        "Whether CUDA code is built in and can run: a dict of compiled, runtime_version, "
        "driver_version (the newest CUDA that the driver serves, None without a driver), devices "
        "(name, capability, has_kernels, error of each) and error (None, or why there are none).");
}

}  // namespace fastvit

# SPDX-License-Identifier: Apache-2.0
"""The guard around every launch, over a CUDA runtime that only keeps account of contexts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

pytestmark = [
    pytest.mark.skipif(not CSRC.exists(), reason="csrc/ is not beside tests/"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

TYPES = """
#pragma once
typedef struct Context* CUcontext;
enum CUresult { CUDA_SUCCESS = 0 };
typedef CUresult (*PFN_cuCtxGetCurrent_v4000)(CUcontext*);
typedef CUresult (*PFN_cuCtxSetCurrent_v4000)(CUcontext);
"""

RUNTIME = """
#pragma once
#include <cstdint>
#include <cstring>
#include <set>
#include "cudaTypedefs.h"
enum cudaError_t { cudaSuccess = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum { cudaEnableDefault = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef void* cudaStream_t;
struct dim3 { explicit dim3(unsigned, unsigned = 1, unsigned = 1) {} };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }

// A context is the number of its device plus one; each device has one, once it was needed.
inline thread_local uintptr_t current = 0;
inline thread_local int chosen = 0;
inline std::set<int> contexts;
inline int sets = 0;

inline cudaError_t cudaGetDevice(int* device) {
  *device = current ? static_cast<int>(current) - 1 : chosen;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {  // as since CUDA 12
  ++sets;
  contexts.insert(device);
  chosen = device;
  current = static_cast<uintptr_t>(device) + 1;
  return cudaSuccess;
}
inline CUresult get_current(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(current);
  return CUDA_SUCCESS;
}
inline CUresult set_current(CUcontext context) {
  current = reinterpret_cast<uintptr_t>(context);
  return CUDA_SUCCESS;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, int, cudaDriverEntryPointQueryResult* found) {
  *function = std::strcmp(name, "cuCtxGetCurrent") == 0 ? reinterpret_cast<void*>(&get_current)
                                                        : reinterpret_cast<void*>(&set_current);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaSuccess;
}
"""

PROGRAM = """
#include "cuda_support.h"
#include <cstdio>
#include <thread>

#define CHECK(what) if (!(what)) { std::printf("line %d: " #what "\\n", __LINE__); ++failures; }

int main() {
  int failures = 0;
  std::thread([&] {  // one that has had no device
    for (int turn = 0; turn < 2; ++turn) {
      {
        const fastvit::DeviceGuard guard(1);
        CHECK(current == 2);
      }
      CHECK(current == 0);
    }
    CHECK(contexts == std::set<int>{1});
  }).join();
  std::thread([&] {  // one that PyTorch has put on the same device
    cudaSetDevice(1);
    const int before = sets;
    {
      const fastvit::DeviceGuard guard(1);
      CHECK(current == 2);
    }
    CHECK(current == 2);
    CHECK(sets == before);
  }).join();
  std::thread([&] {  // one on another
    cudaSetDevice(2);
    {
      const fastvit::DeviceGuard guard(1);
      CHECK(current == 2);
      {
        const fastvit::DeviceGuard within(3);
        CHECK(current == 4);
      }
      CHECK(current == 2);
    }
    CHECK(current == 3);
  }).join();
  CHECK((contexts == std::set<int>{1, 2, 3}));
  return failures;
}
"""


def test_a_guard_leaves_the_thread_its_context_and_creates_no_other(tmp_path: Path) -> None:
    (tmp_path / "cudaTypedefs.h").write_text(TYPES)
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    (tmp_path / "guard.cpp").write_text(PROGRAM)
    program = tmp_path / "guard"
    command = ["g++", "-std=c++17", "-pthread", f"-I{tmp_path}", f"-I{CSRC}"]
    built = subprocess.run(
        [*command, str(tmp_path / "guard.cpp"), "-o", str(program)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "")

// SPDX-License-Identifier: Apache-2.0
// The functions of fastvit._C that launch CUDA kernels, on tensors of the processor.
#include "../../csrc/bindings.h"

#include <pybind11/pybind11.h>

#include "emulator.h"

namespace py = pybind11;

namespace {

// The memory from `begin` on that the next calls may read or write.
void allow(uintptr_t begin, int64_t bytes, bool writes) {
  if (writes) {
    emulator::allow_writes(reinterpret_cast<void*>(begin), bytes);
  } else {
    emulator::allow_reads(reinterpret_cast<const void*>(begin), bytes);
  }
}

}  // namespace

PYBIND11_MODULE(fastvit_emulated, m) {
  fastvit::register_patch_embed(m);
  m.def("allow", &allow, py::arg("begin"), py::arg("bytes"), py::arg("writes"));
  m.def(
      "set_device",
      [](int multiprocessors, int shared_bytes_of_block, int shared_bytes_of_multiprocessor) {
        emulator::set_device(
            {multiprocessors, shared_bytes_of_block, shared_bytes_of_multiprocessor});
      },
      py::arg("multiprocessors"), py::arg("shared_bytes_of_block"),
      py::arg("shared_bytes_of_multiprocessor"));
  m.def("set_shuffle", &emulator::set_shuffle, py::arg("seed"));
  m.def("clear_tensors", &emulator::clear_tensors);
  m.def("last_launch", &emulator::last_launch);
  m.def("bank_conflicts", &emulator::bank_conflicts);
}

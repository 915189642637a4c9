// SPDX-License-Identifier: Apache-2.0
// Faults at will, in builds with sanitizers only. Tests commit them to see that the sanitizers are
// in this module, know the memory of tensors, and end the process.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"

namespace py = pybind11;

namespace fastvit {
namespace {

// What the compiler must neither foresee nor remove is volatile.
int read_byte(uintptr_t address) { return *reinterpret_cast<const volatile uint8_t*>(address); }

int32_t add(int32_t a, int32_t b) {
  volatile int32_t sum = a + b;
  return sum;
}

}  // namespace

void register_sanitizer_probe(py::module_& m) {
  m.def("probe_read_byte", &read_byte, py::arg("address"), "The byte at an address.");
  m.def("probe_add", &add, py::arg("a"), py::arg("b"), "The sum of two 32-bit integers.");
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "broken_kernels.h"
#include "emulated_ptx.h"
#include "emulator.h"

namespace py = pybind11;

namespace {

constexpr int kFloats = 64;

// Runs the kernel that commits `fault` on 64 floats; returns as many. `seed` is for the order of
// the threads.
std::vector<float> run(const std::string& fault, const std::vector<float>& values, unsigned seed) {
  emulator::set_shuffle(seed);
  struct alignas(16) {
    float in[kFloats], between[kFloats], out[kFloats], behind[kFloats];
  } memory{};
  for (int i = 0; i < kFloats; ++i) {
    memory.in[i] = values.at(i);
  }
  emulator::clear_tensors();
  emulator::allow_reads(memory.in, sizeof memory.in);
  emulator::allow_writes(memory.out, sizeof memory.out);
#define FASTVIT_FAULT(value, text)                                     \
  if (fault == text) {                                                 \
    fastvit::run_broken(fastvit::Fault::value, memory.in, memory.out); \
    return {memory.out, memory.out + kFloats};                         \
  }
  FASTVIT_FAULTS(FASTVIT_FAULT)
#undef FASTVIT_FAULT
  throw std::invalid_argument(fault);
}

std::vector<std::string> faults() {
#define FASTVIT_FAULT(value, text) text,
  return {FASTVIT_FAULTS(FASTVIT_FAULT)};
#undef FASTVIT_FAULT
}

using Registers = std::vector<std::array<uint32_t, 4>>;  // of 32 lanes

// What the lanes get of four matrices of 8 rows of 8 elements.
template <bool kTransposed>
Registers load_matrices(const std::vector<std::array<uint16_t, 8>>& rows) {
  fastvit::EmulatedRow held[32];
  Registers registers(32);
  const void* inputs[32];
  void* outputs[32];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    held[lane].address = 16 * lane;
    std::copy(rows.at(lane).begin(), rows.at(lane).end(), held[lane].elements);
    inputs[lane] = &held[lane];
    outputs[lane] = registers[lane].data();
  }
  fastvit::emulated_matrices<kTransposed>(inputs, outputs);
  return registers;
}

// The sums of the lanes, from the registers of both operands.
template <typename T>
std::vector<std::array<float, 4>> multiply(const Registers& a,
                                           const std::vector<std::array<uint32_t, 2>>& b) {
  fastvit::EmulatedOperands held[32];
  std::vector<std::array<float, 4>> sums(32, std::array<float, 4>{});
  const void* inputs[32];
  void* outputs[32];
  for (int lane = 0; lane < 32; ++lane) {
    std::copy(a.at(lane).begin(), a.at(lane).end(), held[lane].a);
    std::copy(b.at(lane).begin(), b.at(lane).end(), held[lane].b);
    inputs[lane] = &held[lane];
    outputs[lane] = sums[lane].data();
  }
  fastvit::emulated_multiply_add<T>(inputs, outputs);
  return sums;
}

}  // namespace

PYBIND11_MODULE(broken_kernels, m) {
  m.def("run", &run, py::arg("fault"), py::arg("values"), py::arg("seed") = 0);
  m.def("faults", &faults);
  m.def("load_matrices", &load_matrices<false>, py::arg("rows"));
  m.def("load_matrices_transposed", &load_matrices<true>, py::arg("rows"));
  m.def("multiply_half", &multiply<fastvit::Half>, py::arg("a"), py::arg("b"));
  m.def("multiply_tf32", &multiply<float>, py::arg("a"), py::arg("b"));
  m.def("round_to_tf32", &fastvit::round_to_tf32, py::arg("bits"));
}

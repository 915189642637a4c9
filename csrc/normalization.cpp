// SPDX-License-Identifier: Apache-2.0
#include "normalization.h"

#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;

namespace fastvit {
namespace {

std::vector<double> channel_values(py::handle values, const char* name, const TensorView& tensor) {
  std::vector<double> result;
  try {
    // Converted here, not by the binding, whose message would print the tensors in full.
    result = values.cast<std::vector<double>>();
  } catch (const py::cast_error&) {
    throw py::type_error(std::string(name) + ": expected a sequence of numbers, got " +
                         std::string(py::str(py::type::handle_of(values).attr("__qualname__"))));
  }
  if (static_cast<int64_t>(result.size()) != tensor.size(1)) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(tensor.size(1)) +
                          " values, one for each image channel of " + tensor.name() + ", got " +
                          std::to_string(result.size()));
  }
  return result;
}

}  // namespace

Normalization read_normalization(py::handle mean, py::handle std, const TensorView& tensor) {
  if (mean.is_none() && std.is_none()) {
    const auto channels = static_cast<size_t>(tensor.size(1));
    return {std::vector<double>(channels, 0.0), std::vector<double>(channels, 1.0)};
  }
  Normalization result{channel_values(mean, "mean", tensor), channel_values(std, "std", tensor)};
  for (size_t c = 0; c < result.std.size(); ++c) {
    if (result.std[c] == 0) {
      throw py::value_error("std: expected values other than 0, got 0 for channel " +
                            std::to_string(c));
    }
  }
  return result;
}

}  // namespace fastvit

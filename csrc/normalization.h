// SPDX-License-Identifier: Apache-2.0
// The mean and standard deviation of each image channel, as Python passes them.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "tensor_view.h"

namespace fastvit {

// A pixel u in 0..255 is normalised to (u / 255 - mean) / std.
struct Normalization {
  std::vector<double> mean, std;
};

// One number for each channel, dimension 1 of `tensor`, out of any Python sequences; None for both
// leaves u / 255. Throws TypeError or ValueError where they do not fit or a std is 0.
Normalization read_normalization(pybind11::handle mean, pybind11::handle std,
                                 const TensorView& tensor);

}  // namespace fastvit

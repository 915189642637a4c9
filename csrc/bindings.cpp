// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of fastvit. Private: use fastvit.functional and the layers.";
  fastvit::register_build_info(m);
  fastvit::register_cuda_status(m);
  fastvit::register_uint8_fold(m);
}

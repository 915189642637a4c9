// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace fastvit {

// Each area of the module registers its own functions, at the bottom of its source file.
void register_build_info(pybind11::module_& m);
void register_cuda_status(pybind11::module_& m);
void register_patch_embed(pybind11::module_& m);
void register_patch_rows(pybind11::module_& m);
void register_place_tokens(pybind11::module_& m);
void register_sanitizer_probe(pybind11::module_& m);
void register_uint8_fold(pybind11::module_& m);

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of fastvit. Private: use fastvit.functional and the layers.";
  fastvit::register_build_info(m);
  fastvit::register_cuda_status(m);
#if FASTVIT_WITH_CUDA
  fastvit::register_patch_embed(m);
#endif
  fastvit::register_patch_rows(m);
  fastvit::register_place_tokens(m);
#ifdef FASTVIT_SANITIZED
  fastvit::register_sanitizer_probe(m);
#endif
  fastvit::register_uint8_fold(m);
}

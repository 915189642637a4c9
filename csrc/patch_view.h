// SPDX-License-Identifier: Apache-2.0
// The checked arguments that the entries of the patch embedding share.
#pragma once

#include <cstdint>
#include <optional>

#include "patch_grid.h"
#include "tensor_view.h"

namespace fastvit {

// The patches, patch_height x patch_width, of images (B, C, H, W); `interleaved` as in
// patch_grid.h. Throws ValueError where the sides do not divide, where a run of pixels is not
// contiguous or where there are more than 2^30 patches in all or elements in
// a patch.
PatchGrid patch_grid(const TensorView& images, int64_t patch_height, int64_t patch_width,
                     bool interleaved);

// The patch alone, of a weight (D, C, ph, pw).
PatchGrid patch_shape(const TensorView& weight, bool interleaved);

// The view of a tensor, or nothing for None.
inline std::optional<TensorView> optional_view(pybind11::handle tensor, const char* name) {
  std::optional<TensorView> view;
  if (!tensor.is_none()) {
    view.emplace(tensor, name);
  }
  return view;
}

}  // namespace fastvit

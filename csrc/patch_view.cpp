// SPDX-License-Identifier: Apache-2.0
#include "patch_view.h"

namespace py = pybind11;

namespace fastvit {
namespace {

std::string size_text(int64_t height, int64_t width) {
  return std::to_string(height) + " x " + std::to_string(width);
}

void expect_whole_patches(const TensorView& images, int64_t height, int64_t width) {
  if (height < 1 || width < 1) {
    throw py::value_error("patch size: expected positive sides, got " + size_text(height, width));
  }
  if (images.size(2) % height != 0 || images.size(3) % width != 0) {
    throw py::value_error(images.name() + ": expected sides divisible by the patch size " +
                          size_text(height, width) + ", got " +
                          size_text(images.size(2), images.size(3)));
  }
}

void expect_contiguous_runs(const TensorView& images, int64_t width, bool interleaved) {
  const int64_t channels = images.size(1);
  const bool pixels = width == 1 || images.stride(3) == (interleaved ? channels : 1);
  const bool within_pixel = !interleaved || channels == 1 || images.stride(1) == 1;
  if (!pixels || !within_pixel) {
    throw py::value_error(
        images.name() +
        ": expected the pixels of a row to follow each other (strides of channels "
        "and columns " +
        (interleaved ? "1 and " + std::to_string(channels) : "any and 1") + "), got strides " +
        std::to_string(images.stride(1)) + " and " + std::to_string(images.stride(3)));
  }
}

// Kernels count patches and columns by 31 bits, and past the last of them by up to a tile.
constexpr int64_t kMost = int64_t{1} << 30;

bool product_fits(int64_t a, int64_t b) { return a == 0 || b <= kMost / a; }

}  // namespace

PatchGrid patch_grid(const TensorView& images, int64_t patch_height, int64_t patch_width,
                     bool interleaved) {
  images.expect_rank(4);
  expect_whole_patches(images, patch_height, patch_width);
  const int64_t rows = images.size(2) / patch_height, columns = images.size(3) / patch_width;
  if (!product_fits(rows, columns) || !product_fits(images.size(0), rows * columns) ||
      !product_fits(patch_height, patch_width) ||
      !product_fits(images.size(1), patch_height * patch_width)) {
    throw py::value_error(images.name() +
                          ": expected at most 2^30 patches in all and elements in each");
  }
  if (images.numel() != 0) {
    expect_contiguous_runs(images, patch_width, interleaved);
  }
  PatchGrid grid;
  grid.images = images.size(0);
  grid.grid_rows = static_cast<int32_t>(rows);
  grid.grid_columns = static_cast<int32_t>(columns);
  grid.channels = static_cast<int32_t>(images.size(1));
  grid.patch_height = static_cast<int32_t>(patch_height);
  grid.patch_width = static_cast<int32_t>(patch_width);
  grid.interleaved = interleaved;
  grid.image_stride = images.stride(0);
  grid.channel_stride = images.stride(1);
  grid.row_stride = images.stride(2);
  grid.pixel_stride = images.stride(3);
  grid.prepare();
  return grid;
}

PatchGrid patch_shape(const TensorView& weight, bool interleaved) {
  if (!product_fits(weight.size(2), weight.size(3)) ||
      !product_fits(weight.size(1), weight.size(2) * weight.size(3))) {
    throw py::value_error(weight.name() + ": expected at most 2^30 elements in a patch");
  }
  PatchGrid grid;
  grid.channels = static_cast<int32_t>(weight.size(1));
  grid.patch_height = static_cast<int32_t>(weight.size(2));
  grid.patch_width = static_cast<int32_t>(weight.size(3));
  grid.interleaved = interleaved;
  grid.prepare();
  return grid;
}

}  // namespace fastvit

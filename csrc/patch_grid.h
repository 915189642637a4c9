// SPDX-License-Identifier: Apache-2.0
// Where the patches of images lie in memory: what every kernel of the patch embedding reads by, on
// the processor and on the GPU.
//
// The patches are the rows of a matrix that is never made. Row m is patch (b, gy, gx), counted in
// that order. Its columns k go through the patch in the order of memory, so that they fall into
// runs of consecutive elements, one for each pixel row:
//
//     planar images (NCHW)         k = (c ph + py) pw + px     runs (c, py) of pw elements
//     interleaved (channels_last)  k = (py pw + px) C + c      runs py of pw C elements
//
// The weight's columns are in the same order: (D, C, ph, pw) or (D, ph, pw, C), contiguous.
#pragma once

#include <cstdint>

#include "divisor.h"
#include "host_device.h"

namespace fastvit {

struct PatchGrid {
  int64_t images = 0;
  int32_t grid_rows = 0, grid_columns = 0;
  int32_t channels = 0, patch_height = 0, patch_width = 0;
  bool interleaved = false;
  // Elements from one image, channel, pixel row and pixel to the next. Within a run neighbours
  // follow each other, so that pixel_stride is 1 or, interleaved, `channels`, except in patches
  // one pixel wide, where it may be anything.
  int64_t image_stride = 0, channel_stride = 0, row_stride = 0, pixel_stride = 0;

  // Call once the sizes stand; prepares the divisions below.
  void prepare() {
    by_columns = Divisor(grid_columns > 0 ? grid_columns : 1);
    by_patches = Divisor(patches() > 0 ? patches() : 1);
    by_run = Divisor(run() > 0 ? run() : 1);
    by_height = Divisor(patch_height > 0 ? patch_height : 1);
    by_channels = Divisor(channels > 0 ? channels : 1);
  }

  // N, the patches of one image, and K, the elements of a patch.
  FASTVIT_HOST_DEVICE int32_t patches() const { return grid_rows * grid_columns; }
  FASTVIT_HOST_DEVICE int32_t columns() const { return channels * patch_height * patch_width; }
  // Elements of a run, and how many runs make a patch.
  FASTVIT_HOST_DEVICE int32_t run() const {
    return interleaved ? patch_width * channels : patch_width;
  }
  FASTVIT_HOST_DEVICE int32_t runs() const {
    return interleaved ? patch_height : patch_height * channels;
  }

  // The first element of patch `patch` of image `image`, counted from the first of all.
  FASTVIT_HOST_DEVICE int64_t patch_offset(int64_t image, int32_t patch) const {
    const int32_t gy = by_columns.quotient(patch);
    const int32_t gx = by_columns.remainder(patch, gy);
    return image * image_stride + gy * (patch_height * row_stride) +
           gx * (patch_width * pixel_stride);
  }

  // The first element of run `r`, counted from the first of its patch.
  FASTVIT_HOST_DEVICE int64_t run_offset(int32_t r) const {
    const int32_t c = interleaved ? 0 : by_height.quotient(r);
    const int32_t py = interleaved ? r : by_height.remainder(r, c);
    return c * channel_stride + py * row_stride;
  }

  // The element of column k, counted from the first of its patch.
  FASTVIT_HOST_DEVICE int64_t column_offset(int32_t k) const {
    const int32_t r = by_run.quotient(k);
    return run_offset(r) + by_run.remainder(k, r);
  }

  // The image channel of column k.
  FASTVIT_HOST_DEVICE int32_t channel(int32_t k) const {
    return interleaved ? by_channels.remainder(k, by_channels.quotient(k))
                       : by_height.quotient(by_run.quotient(k));
  }

  Divisor by_columns, by_patches, by_run, by_height, by_channels;
};

}  // namespace fastvit

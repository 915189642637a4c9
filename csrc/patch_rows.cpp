// SPDX-License-Identifier: Apache-2.0
// The patches of images as the rows of a matrix, on the processor: the left side of the product
// that a patch embedding is, and of its weight gradient.
#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

#include "bindings.h"
#include "normalization.h"
#include "parallel.h"
#include "patch_view.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastvit {
namespace {

// Copies a run; those of a patch are too short for a call of memcpy to pay.
template <typename T>
void copy_run(const T* from, T* to, int64_t count) {
  constexpr int64_t kBlock = 16 / sizeof(T);
  if (count < kBlock) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[i];
    }
    return;
  }
  for (int64_t i = 0; i + kBlock <= count; i += kBlock) {
    std::memcpy(to + i, from + i, 16);
  }
  std::memcpy(to + count - kBlock, from + count - kBlock, 16);
}

// Every value of a pixel, normalised: 256 for each channel. Bit for bit what
// fastvit.reference.normalize_images computes, at the price of one load for a pixel.
template <typename T>
std::vector<T> pixel_table(const Normalization& normalization) {
  std::vector<T> table;
  table.reserve(256 * normalization.mean.size());
  for (size_t c = 0; c < normalization.mean.size(); ++c) {
    const auto mean = static_cast<float>(normalization.mean[c]);
    const auto std = static_cast<float>(normalization.std[c]);
    for (int u = 0; u < 256; ++u) {
      table.push_back(round_to<T>((static_cast<float>(u) / 255.0f - mean) / std));
    }
  }
  return table;
}

// Copies runs.
template <typename T>
struct Copy {
  int64_t run;

  using Pixel = T;
  void operator()(const T* from, T* to, int32_t /*channel*/) const { copy_run(from, to, run); }
};

// Normalises runs of one channel.
template <typename T>
struct NormalizePlanar {
  const T* table;
  int32_t run;

  using Pixel = uint8_t;
  void operator()(const uint8_t* from, T* to, int32_t channel) const {
    const T* values = table + 256 * int64_t{channel};
    for (int32_t i = 0; i < run; ++i) {
      to[i] = values[from[i]];
    }
  }
};

// Normalises runs of whole pixels.
template <typename T>
struct NormalizeInterleaved {
  const T* table;
  int32_t run, channels;

  using Pixel = uint8_t;
  void operator()(const uint8_t* from, T* to, int32_t /*channel*/) const {
    for (int32_t i = 0; i < run; i += channels) {
      for (int32_t c = 0; c < channels; ++c) {
        to[i + c] = table[256 * int64_t{c} + from[i + c]];
      }
    }
  }
};

// Writes the rows of all patches, their runs by `read_run`.
template <typename T, typename ReadRun>
void write_rows(const PatchGrid& grid, const typename ReadRun::Pixel* images, T* rows,
                int64_t threads, const ReadRun& read_run) {
  const int64_t count = grid.images * grid.patches(), columns = grid.columns(), run = grid.run();
  const int32_t channels = grid.interleaved ? 1 : grid.channels, height = grid.patch_height;
  parallel_for(count, sizeof(T) * columns, threads, [=](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const int32_t image = grid.by_patches.quotient(static_cast<int32_t>(m));
      const int32_t patch = grid.by_patches.remainder(static_cast<int32_t>(m), image);
      T* to = rows + m * columns;
      const auto* patch_start = images + grid.patch_offset(image, patch);
      for (int32_t c = 0; c < channels; ++c) {
        const auto* from = patch_start + grid.run_offset(c * height);
        for (int32_t y = 0; y < height; ++y, from += grid.row_stride, to += run) {
          read_run(from, to, c);
        }
      }
    }
  });
}

void patch_rows(py::handle images_tensor,  // [B, C, H, W]
                int64_t patch_height, int64_t patch_width, bool interleaved,
                py::handle mean,         // [C] numbers, or None
                py::handle std,          // [C] numbers, or None
                py::handle rows_tensor,  // [B, N, K]
                int64_t threads) {
  const TensorView images(images_tensor, "images"), rows(rows_tensor, "rows");
  rows.expect_dtype(
      {ElementType<float>::value, ElementType<Half>::value, ElementType<Bfloat16>::value});
  const bool bytes = images.has_dtype(ElementType<uint8_t>::value);
  if (!bytes) {
    images.expect_dtype({rows.dtype(), ElementType<uint8_t>::value});
  }
  images.expect_cpu();
  rows.expect_cpu();
  const PatchGrid grid = patch_grid(images, patch_height, patch_width, interleaved);
  rows.expect_shape({grid.images, grid.patches(), grid.columns()});
  rows.expect_contiguous();
  if (!bytes && !(mean.is_none() && std.is_none())) {
    throw py::value_error("mean, std: expected None for floating images, got values");
  }
  const Normalization normalization = read_normalization(mean, std, images);
  if (rows.numel() == 0) {
    return;
  }
  visit_token_type(rows, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = rows.data<T>();
    if (!bytes) {
      const py::gil_scoped_release release;
      write_rows(grid, images.data<T>(), out, threads, Copy<T>{grid.run()});
      return;
    }
    const std::vector<T> table = pixel_table<T>(normalization);
    const auto* pixels = images.data<uint8_t>();
    const py::gil_scoped_release release;
    if (interleaved) {
      const NormalizeInterleaved<T> read_run{table.data(), grid.run(), grid.channels};
      write_rows(grid, pixels, out, threads, read_run);
    } else {
      const NormalizePlanar<T> read_run{table.data(), grid.run()};
      write_rows(grid, pixels, out, threads, read_run);
    }
  });
}

}  // namespace

void register_patch_rows(py::module_& m) {
  m.def("patch_rows", &patch_rows, py::arg("images"), py::arg("patch_height"),
        py::arg("patch_width"), py::arg("interleaved"), py::arg("mean"), py::arg("std"),
        py::arg("rows"), py::arg("threads"),
        "Writes the patches of images (B, C, H, W) as rows (B, N, K), contiguous, in float32, "
        "float16 or bfloat16. Their columns are (C, ph, pw), or (ph, pw, C) if interleaved, and a "
        "pixel row of a patch must lie so in memory. Images have the dtype of the rows, or are "
        "uint8 and normalised by mean and std, C numbers each, or None. On up to `threads` "
        "threads.");
}

}  // namespace fastvit

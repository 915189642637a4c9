// SPDX-License-Identifier: Apache-2.0
// The patches of images as the rows of a matrix, on the processor: the left side of the product
// that a patch embedding is, and of its weight gradient.
#include <pybind11/pybind11.h>

#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "avx2.h"
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

// `count` runs of one channel, or of whole pixels, and how far they lie apart.
template <typename Pixel>
struct Runs {
  const Pixel* from;
  int64_t stride;
  int32_t count, channel;
};

// Copies runs.
template <typename T>
struct Copy {
  int32_t run;

  using Pixel = T;
  void operator()(Runs<T> runs, T* to) const {
    for (int32_t y = 0; y < runs.count; ++y, runs.from += runs.stride, to += run) {
      copy_run(runs.from, to, run);
    }
  }
};

// Normalises runs of one channel.
template <typename T>
struct NormalizePlanar {
  const T* table;
  int32_t run;

  using Pixel = uint8_t;
  void operator()(Runs<uint8_t> runs, T* to) const {
    const T* values = table + 256 * int64_t{runs.channel};
    for (int32_t y = 0; y < runs.count; ++y, runs.from += runs.stride, to += run) {
      for (int32_t i = 0; i < run; ++i) {
        to[i] = values[runs.from[i]];
      }
    }
  }
};

// Normalises runs of whole pixels.
template <typename T>
struct NormalizeInterleaved {
  const T* table;
  int32_t run, channels;

  using Pixel = uint8_t;
  void operator()(Runs<uint8_t> runs, T* to) const {
    for (int32_t y = 0; y < runs.count; ++y, runs.from += runs.stride, to += run) {
      for (int32_t i = 0; i < run; i += channels) {
        for (int32_t c = 0; c < channels; ++c) {
          to[i + c] = table[256 * int64_t{c} + runs.from[i + c]];
        }
      }
    }
  }
};

#if FASTVIT_HAS_AVX2_CODE

// Normalises runs by arithmetic, 16 elements at a time: pixel * scale + shift. Half the time of the
// table.
struct NormalizeLine {
  const float* scale;  // [channels, run], or [run] for runs of whole pixels
  const float* shift;
  int32_t run;  // a multiple of 16

  using Pixel = uint8_t;
  FASTVIT_AVX2 void operator()(Runs<uint8_t> runs, Bfloat16* to) const {
    const float* scales = scale + int64_t{runs.channel} * run;
    const float* shifts = shift + int64_t{runs.channel} * run;
    for (int32_t y = 0; y < runs.count; ++y, runs.from += runs.stride, to += run) {
      for (int32_t i = 0; i < run; i += 16) {
        const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(runs.from + i));
        const __m256i low = line(pixels, scales + i, shifts + i);
        const __m256i high =
            line(_mm_unpackhi_epi64(pixels, pixels), scales + i + 8, shifts + i + 8);
        // Packs within 128 bits.
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), packed);
      }
    }
  }

  // The bits of 8 values, rounded. None is a NaN, or the table would have one.
  static FASTVIT_AVX2 __m256i line(__m128i pixels, const float* scale, const float* shift) {
    const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(pixels));
    const __m256 product = _mm256_mul_ps(x, _mm256_loadu_ps(scale));
    const __m256i bits = _mm256_castps_si256(_mm256_add_ps(product, _mm256_loadu_ps(shift)));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  }
};

// What NormalizeLine reads.
struct Lines {
  std::vector<float> scale, shift;

  Lines(const Normalization& normalization, bool interleaved, int32_t run) {
    const auto channels = static_cast<int64_t>(normalization.mean.size());
    for (int64_t i = 0; i < (interleaved ? 1 : channels) * run; ++i) {
      const auto c = static_cast<size_t>(interleaved ? i % channels : i / run);
      scale.push_back(static_cast<float>(1.0 / (255.0 * normalization.std[c])));
      shift.push_back(static_cast<float>(-normalization.mean[c] / normalization.std[c]));
    }
  }
};

// Whether NormalizeLine gives the bits of the table. Its error before the last rounding is a
// hundred thousandth of that, so that rarely one of the 256 values is rounded to the other side.
bool lines_agree(const Normalization& normalization, const std::vector<Bfloat16>& table) {
  std::vector<uint8_t> pixels(256);
  std::iota(pixels.begin(), pixels.end(), uint8_t{0});
  const Lines lines(normalization, false, 256);
  std::vector<Bfloat16> values(256);
  for (size_t c = 0; c < normalization.mean.size(); ++c) {
    const NormalizeLine read_runs{lines.scale.data(), lines.shift.data(), 256};
    read_runs({pixels.data(), 0, 1, static_cast<int32_t>(c)}, values.data());
    if (std::memcmp(values.data(), table.data() + 256 * c, sizeof(Bfloat16) * 256) != 0) {
      return false;
    }
  }
  return true;
}

#endif

// Writes the rows of all patches, their runs by `read_runs`.
template <typename T, typename ReadRuns>
void write_rows(const PatchGrid& grid, const typename ReadRuns::Pixel* images, T* rows,
                int64_t threads, const ReadRuns& read_runs) {
  const int64_t count = grid.images * grid.patches(), columns = grid.columns();
  const int64_t of_channel = int64_t{grid.patch_height} * grid.run();
  const int32_t channels = grid.interleaved ? 1 : grid.channels, height = grid.patch_height;
  parallel_for(count, sizeof(T) * columns, threads, [=](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const int32_t image = grid.by_patches.quotient(static_cast<int32_t>(m));
      const int32_t patch = grid.by_patches.remainder(static_cast<int32_t>(m), image);
      T* to = rows + m * columns;
      const auto* patch_start = images + grid.patch_offset(image, patch);
      for (int32_t c = 0; c < channels; ++c, to += of_channel) {
        read_runs({patch_start + grid.run_offset(c * height), grid.row_stride, height, c}, to);
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
#if FASTVIT_HAS_AVX2_CODE
    if constexpr (std::is_same_v<T, Bfloat16>) {
      if (grid.run() % 16 == 0 && has_avx2() && lines_agree(normalization, table)) {
        const Lines lines(normalization, interleaved, grid.run());
        const NormalizeLine read_runs{lines.scale.data(), lines.shift.data(), grid.run()};
        write_rows(grid, pixels, out, threads, read_runs);
        return;
      }
    }
#endif
    if (interleaved) {
      const NormalizeInterleaved<T> read_runs{table.data(), grid.run(), grid.channels};
      write_rows(grid, pixels, out, threads, read_runs);
    } else {
      const NormalizePlanar<T> read_runs{table.data(), grid.run()};
      write_rows(grid, pixels, out, threads, read_runs);
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

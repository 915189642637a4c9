// SPDX-License-Identifier: Apache-2.0
// The gradient of the weight, gradᵀ patches, with the same gather as the forward.
//
// Every block sums up a tile of it over a share of the patches; a second kernel adds the shares in
// a fixed order. So the result is the same bit for bit from run to run.
#pragma once

#include "product.cuh"

namespace fastvit {

struct GradientTile {
  static constexpr int kOutputs = 128, kPixels = 128;
  static constexpr int kWarpsHigh = 2, kWarpsWide = 4;
  static constexpr int kThreads = 32 * kWarpsHigh * kWarpsWide;
  // Blocks for each multiprocessor that registers are to allow; two spill but for 16-bit pixels.
  template <typename Pixel>
  static constexpr int kBlocks = sizeof(Pixel) == 2 ? 2 : 1;
  static constexpr int kOperandBytes = 16384;
  static constexpr int kStageBytes = 2 * kOperandBytes;
  // Patches in a stage.
  template <typename T>
  static constexpr int kDepth = kOperandBytes / (kPixels * static_cast<int>(sizeof(T)));
};

// What a thread copies of the tiles: chunk threadIdx.x % 8 of every panel's rows threadIdx.x / 8
// and 32 further.
template <typename T, typename Pixel>
class GradientCopier {
 public:
  static constexpr int kDepth = GradientTile::kDepth<T>;
  static constexpr int kApart = GradientTile::kThreads / kRowChunks;
  static constexpr int kRows = kDepth / kApart;
  static constexpr int kPanels = GradientTile::kPixels / kRowElements<T>;
  static constexpr bool kRaw = sizeof(Pixel) == 1;

  __device__ GradientCopier(const WeightGradientArgs& args, int32_t first_output,
                            int32_t first_pixel, int32_t first_row, int32_t end)
      : args_(args),
        chunk_(threadIdx.x % kRowChunks),
        row_(threadIdx.x / kRowChunks),
        output_(first_output + chunk_ * kChunkElements<T>),
        pixel_(first_pixel + chunk_ * kChunkElements<T>),
        first_row_(first_row),
        end_(end) {}

  __device__ void start(int step, uint32_t stage) {
    const PatchGrid& grid = args_.pixels.grid;
    int32_t image[kRows], patch[kRows];
    bool inside[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t m = first_row_ + step * kDepth + row_ + i * kApart;
      inside[i] = m < end_;
      image[i] = grid.by_patches.quotient(inside[i] ? m : 0);
      patch[i] = grid.by_patches.remainder(inside[i] ? m : 0, image[i]);
    }
    const int32_t output = anew(output_), pixel = anew(pixel_);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const auto row = [&](int i) -> ChunkRow<T> {
        const T* grad = static_cast<const T*>(args_.grad) + image[i] * args_.grad_image_stride +
                        patch[i] * args_.grad_token_stride;
        return {address(stage, panel, i), grad, inside[i]};
      };
      copy_chunks<kRows, T>(row, output + panel * kRowElements<T>, args_.outputs, args_.grad_access,
                            [](int k) { return k; });
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const auto row = [&](int i) -> ChunkRow<Pixel> {
        const Pixel* from =
            static_cast<const Pixel*>(args_.pixels.data) + grid.patch_offset(image[i], patch[i]);
        return {address(stage + GradientTile::kOperandBytes, panel, i), from, inside[i]};
      };
      const int32_t k = pixel + panel * kRowElements<T>;
      if constexpr (kRaw) {
        load_pixels<kRows, T>(raw_[panel], args_.pixels, row, k);
      } else {
        copy_chunks<kRows, T>(row, k, grid.columns(), args_.pixels.access,
                              [&grid](int at) { return grid.column_offset(at); });
      }
    }
  }

  __device__ void finish(uint32_t stage) {
    if constexpr (kRaw) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        store_pixels<kRows, T>(
            raw_[panel], args_.pixels,
            [&](int i) -> ChunkRow<Pixel> {
              return {address(stage + GradientTile::kOperandBytes, panel, i), nullptr, true};
            },
            pixel_ + panel * kRowElements<T>);
      }
    }
  }

 private:
  struct Nothing {};

  __device__ uint32_t address(uint32_t tile, int panel, int i) const {
    return chunk_address<true>(tile + panel * kDepth * kRowBytes, row_ + i * kApart, chunk_);
  }

  const WeightGradientArgs& args_;
  const int chunk_, row_;
  const int32_t output_, pixel_, first_row_, end_;
  std::conditional_t<kRaw, RawChunk<T>, Nothing> raw_[kPanels][kRows];
};

template <Arithmetic kArithmetic, typename Pixel>
__global__ void __launch_bounds__(GradientTile::kThreads, GradientTile::kBlocks<Pixel>)
    weight_gradient_kernel(const __grid_constant__ WeightGradientArgs args) {
  using T = typename ElementOf<kArithmetic>::type;
  using Tile = GradientTile;
  constexpr int kDepth = Tile::kDepth<T>;
  constexpr int kWarpRows = Tile::kOutputs / Tile::kWarpsHigh;
  constexpr int kWarpColumns = Tile::kPixels / Tile::kWarpsWide;
  const PatchGrid& grid = args.pixels.grid;
  const auto rows = static_cast<int32_t>(grid.images * grid.patches());
  const int32_t across = (grid.columns() + Tile::kPixels - 1) / Tile::kPixels;
  const int32_t first_pixel = static_cast<int32_t>(blockIdx.x % across) * Tile::kPixels;
  const int32_t first_output = static_cast<int32_t>(blockIdx.x / across) * Tile::kOutputs;
  const int32_t split = static_cast<int32_t>(blockIdx.y);
  const int32_t first_row = split * args.rows_per_split;
  const int32_t end =
      rows - first_row < args.rows_per_split ? rows : first_row + args.rows_per_split;
  const uint32_t memory = shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / Tile::kWarpsWide * kWarpRows;
  const int warp_column = warp % Tile::kWarpsWide * kWarpColumns;

  GradientCopier<T, Pixel> copier(args, first_output, first_pixel, first_row, end);
  WarpSums<kArithmetic, kWarpRows, kWarpColumns> sums;
  sums.clear();
  run_ring(
      memory, Tile::kStageBytes, args.stages, (end - first_row + kDepth - 1) / kDepth,
      [&](int step, uint32_t stage) { copier.start(step, stage); },
      [&](int, uint32_t stage) { copier.finish(stage); },
      [&](uint32_t stage) {
        sums.template add_columns<kDepth>(stage, warp_row, stage + Tile::kOperandBytes, warp_column,
                                          lane);
      });

  const int32_t columns = grid.columns();
  float* partial = args.partial + static_cast<int64_t>(split) * args.outputs * columns;
  sums.for_pairs(lane, [&](int row, int column, float first, float second) {
    const int32_t n = first_output + warp_row + row, k = first_pixel + warp_column + column;
    if (n < args.outputs && k < columns) {
      float* to = partial + static_cast<int64_t>(n) * columns + k;
      store_global(to, first);
      if (k + 1 < columns) {
        store_global(to + 1, second);
      }
    }
  });
}

constexpr int kSumThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    weight_gradient_sum_kernel(const __grid_constant__ SumArgs args) {
  const int32_t columns = args.grid.columns();
  const int64_t size = static_cast<int64_t>(args.outputs) * columns;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at >= size) {
    return;
  }
  float sum = 0.0f;
  for (int split = 0; split < args.splits; ++split) {
    sum += load_global(args.partial + split * size + at);
  }
  if (args.dbias != nullptr) {
    const auto n = static_cast<int32_t>(at / columns);
    const int channel = args.grid.channel(static_cast<int32_t>(at - int64_t{n} * columns));
    sum = (sum * args.inverse_unit + load_global(args.dbias + n) * args.shift[channel]) *
          args.scale[channel];
  }
  store_global(static_cast<T*>(args.dweight) + at, round_element<T>(sum));
}

}  // namespace fastvit

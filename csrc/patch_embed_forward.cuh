// SPDX-License-Identifier: Apache-2.0
// Images to tokens in one launch: out = patches weightᵀ + bias + pos_embed, behind the class token.
//
// A block computes a tile of the product. Patches are gathered from the image while they are
// copied to shared memory, a ring of `stages` tiles ahead of the tensor cores.
#pragma once

#include "patch_copier.cuh"
#include "product.cuh"
#include "token_writer.cuh"

namespace fastvit {

template <int kRows_, int kColumns_, int kWarpsHigh_, int kWarpsWide_, int kBlocks_>
struct ForwardTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpsHigh = kWarpsHigh_, kWarpsWide = kWarpsWide_;
  static constexpr int kThreads = 32 * kWarpsHigh * kWarpsWide;
  // Blocks for each multiprocessor that registers are to allow.
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  template <typename T>
  using Writer = TokenWriter<T, kRows, kColumns, kThreads>;
  // The sums pass through the memory of the stages.
  static constexpr int bytes(int stages) {
    constexpr int kSums = Writer<float>::kBytes;
    return stages * kStageBytes > kSums ? stages * kStageBytes : kSums;
  }
};

using LargeTile = ForwardTile<128, 128, 2, 4, 2>;
// For few patches, which would leave multiprocessors idle.
using SmallTile = ForwardTile<64, 64, 2, 2, 3>;

// Starts the copies of step `step` along kRows rows of the weight into a tile.
template <typename T, int kRows, int kThreads>
__device__ __forceinline__ void copy_weight(const ForwardArgs& args, int32_t first_output, int step,
                                            uint32_t tile) {
  constexpr int kApart = kThreads / kRowChunks;
  const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  const int32_t columns = args.pixels.grid.columns();
  const int32_t from_output = anew(first_output) + first;
  const auto row = [&](int i) -> ChunkRow<T> {
    const int32_t n = from_output + i * kApart;
    const bool inside = n < args.outputs;
    const T* from = static_cast<const T*>(args.weight) + int64_t{inside ? n : 0} * columns;
    return {chunk_address(tile, first + i * kApart, chunk), from, inside};
  };
  copy_chunks<kRows / kApart, T>(row, step * kRowElements<T> + chunk * kChunkElements<T>, columns,
                                 args.weight_access, [](int k) { return k; });
}

template <Arithmetic kArithmetic, typename Pixel, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    patch_embed_kernel(const __grid_constant__ ForwardArgs args) {
  using T = typename ElementOf<kArithmetic>::type;
  constexpr int kWarpRows = Tile::kRows / Tile::kWarpsHigh;
  constexpr int kWarpColumns = Tile::kColumns / Tile::kWarpsWide;
  const PatchGrid& grid = args.pixels.grid;
  // Blocks of the same patches are neighbours, so that these are read once from memory.
  const int32_t across = (args.outputs + Tile::kColumns - 1) / Tile::kColumns;
  const int32_t first_row = static_cast<int32_t>(blockIdx.x / across) * Tile::kRows;
  const int32_t first_output = static_cast<int32_t>(blockIdx.x % across) * Tile::kColumns;
  const uint32_t memory = shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / Tile::kWarpsWide * kWarpRows;
  const int warp_column = warp % Tile::kWarpsWide * kWarpColumns;

  PatchCopier<T, Pixel, Tile::kRows, Tile::kThreads> patches(args.pixels, threadIdx.x);
  patches.aim(first_row);
  typename decltype(patches)::Loaded loaded;
  WarpSums<kArithmetic, kWarpRows, kWarpColumns> sums;
  sums.clear();
  run_ring(
      memory, Tile::kStageBytes, args.stages,
      (grid.columns() + kRowElements<T> - 1) / kRowElements<T>,
      [&](int step, uint32_t stage) {
        copy_weight<T, Tile::kColumns, Tile::kThreads>(args, first_output, step,
                                                       stage + Tile::kRows * kRowBytes);
        loaded = patches.start(step, stage);
      },
      [&](int step, uint32_t stage) { patches.finish(loaded, step, stage); },
      [&](uint32_t stage) {
        sums.add_rows(stage, warp_row, stage + Tile::kRows * kRowBytes, warp_column, lane);
      });

  __syncthreads();
  using Writer = typename Tile::template Writer<T>;
  sums.for_pairs(lane, [&](int row, int column, float first, float second) {
    Writer::store_pair(memory, warp_row + row, warp_column + column, first, second);
  });
  __syncthreads();
  const Writer writer(args, threadIdx.x, first_row, first_output);
  writer.write_patches(memory);
  writer.write_classes();
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
// The gather: how threads copy a tile of patches out of the images.
#pragma once

#include "tile.cuh"

namespace fastvit {

// What one of kThreads threads copies of kRows patches: chunk `thread % 8` of every row.
template <typename T, typename Pixel, int kRows, int kThreads>
class PatchCopier {
 public:
  static constexpr int kApart = kThreads / kRowChunks;
  static constexpr int kShare = kRows / kApart;
  static constexpr bool kRaw = sizeof(Pixel) == 1;
  // uint8 pixels on their way; other pixels go to shared memory by themselves.
  struct Loaded {
    RawChunk<T> chunks[kRaw ? kShare : 1];
  };

  __device__ PatchCopier(const Pixels& pixels, int thread)
      : pixels_(pixels), chunk_(thread % kRowChunks), row_(thread / kRowChunks) {}

  // Turns to the patches from `first_row` on, counted over all images.
  __device__ void aim(int32_t first_row) {
    const PatchGrid& grid = pixels_.grid;
    const auto rows = static_cast<int32_t>(grid.images * grid.patches());
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int32_t m = first_row + row_ + i * kApart;
      const bool inside = m < rows;
      const int32_t image = grid.by_patches.quotient(inside ? m : 0);
      const int32_t patch = grid.by_patches.remainder(inside ? m : 0, image);
      patches_[i] = static_cast<const Pixel*>(pixels_.data) + grid.patch_offset(image, patch);
      inside_ |= (inside ? 1u : 0u) << i;
    }
  }

  // Starts the copies of step `step` along the patches into a tile, or the loads of uint8 pixels.
  __device__ Loaded start(int step, uint32_t tile) const {
    Loaded loaded{};
    const PatchGrid& grid = pixels_.grid;
    const auto row = [&](int i) { return this->row(i, tile); };
    if constexpr (kRaw) {
      load_pixels<kShare, T>(loaded.chunks, pixels_, row, column(step));
    } else {
      copy_chunks<kShare, T>(row, column(step), grid.columns(), pixels_.access,
                             [&grid](int k) { return grid.column_offset(k); });
    }
    return loaded;
  }

  // Stores the uint8 pixels of `start`.
  __device__ void finish(const Loaded& loaded, int step, uint32_t tile) const {
    if constexpr (kRaw) {
      store_pixels<kShare, T>(
          loaded.chunks, pixels_, [&](int i) { return this->row(i, tile); }, column(step));
    }
  }

 private:
  __device__ ChunkRow<Pixel> row(int i, uint32_t tile) const {
    return {chunk_address(tile, row_ + i * kApart, chunk_), patches_[i], (inside_ >> i & 1u) != 0};
  }
  __device__ int column(int step) const {
    return step * kRowElements<T> + chunk_ * kChunkElements<T>;
  }

  const Pixels& pixels_;
  const int chunk_, row_;
  const Pixel* patches_[kShare];
  uint32_t inside_ = 0;
};

}  // namespace fastvit

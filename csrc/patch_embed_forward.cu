// SPDX-License-Identifier: Apache-2.0
#include "patch_embed_forward.cuh"

#include "launch.cuh"
#include "weight_fold.cuh"

namespace fastvit {

void launch_weight_fold(const WeightFoldArgs& args, Arithmetic arithmetic, int device,
                        void* stream) {
  visit(arithmetic, false, [&](auto constant, auto) {
    launch_kernel(weight_fold_kernel<typename ElementOf<decltype(constant)::value>::type>,
                  {args.outputs, 1}, kFoldThreads, kFoldBytes, device, stream, "weight_fold_kernel",
                  args);
  });
}

#ifndef FASTVIT_EMULATED
int probe_patch_embed() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, weight_fold_kernel<float>);
}
#endif

void launch_patch_embed(ForwardArgs args, Arithmetic arithmetic, bool raw,
                        std::optional<bool> small_tile, int device, void* stream) {
  const int64_t rows = args.pixels.grid.images * args.pixels.grid.patches();
  const DeviceLimits limits = device_limits(device);
  const auto launch = [&](auto kernel, auto tile) {
    using Tile = decltype(tile);
    args.stages = choose_stages(limits, Tile::kBlocks, Tile::bytes);
    const int64_t blocks =
        ceil_divide(rows, Tile::kRows) * ceil_divide(args.outputs, Tile::kColumns);
    launch_kernel(kernel, {blocks, 1}, Tile::kThreads, Tile::bytes(args.stages), device, stream,
                  "patch_embed_kernel", args);
  };
  const int64_t large_tiles =
      ceil_divide(rows, LargeTile::kRows) * ceil_divide(args.outputs, LargeTile::kColumns);
  const bool small =
      small_tile.value_or(large_tiles < LargeTile::kBlocks * int64_t{limits.multiprocessors});
  visit(arithmetic, raw, [&](auto constant, auto pixel) {
    constexpr Arithmetic kArithmetic = decltype(constant)::value;
    using Pixel = decltype(pixel);
    // Without tensor cores a tile takes so long that a small one hides all copies; and float32 from
    // uint8 is not worth another kernel.
    constexpr bool kOnlySmall = kArithmetic == Arithmetic::kIeee ||
                                (kArithmetic == Arithmetic::kTf32 && sizeof(Pixel) == 1);
    if constexpr (!kOnlySmall) {
      if (!small) {
        return launch(patch_embed_kernel<kArithmetic, Pixel, LargeTile>, LargeTile{});
      }
    }
    launch(patch_embed_kernel<kArithmetic, Pixel, SmallTile>, SmallTile{});
  });
}

}  // namespace fastvit

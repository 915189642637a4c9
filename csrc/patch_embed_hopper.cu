// SPDX-License-Identifier: Apache-2.0
#include "patch_embed_hopper.cuh"

#include <algorithm>

#include "launch.cuh"
#include "tensor_map.h"

namespace fastvit {

namespace {

int64_t tile_count(const ForwardArgs& args) {
  const int64_t rows = args.pixels.grid.images * args.pixels.grid.patches();
  return ceil_divide(rows, HopperTile::kRows) * ceil_divide(args.outputs, HopperTile::kColumns);
}

}  // namespace

bool hopper_takes(const ForwardArgs& args, Arithmetic arithmetic, int device) {
  const bool half = arithmetic == Arithmetic::kHalf || arithmetic == Arithmetic::kBfloat16;
  return half && args.weight_access == Access::kChunks &&
         tile_count(args) >= device_limits(device).multiprocessors;
}

void launch_patch_embed_hopper(const ForwardArgs& args, Arithmetic arithmetic, bool raw, int device,
                               void* stream) {
  using Tile = HopperTile;
  HopperArgs hopper{};
  hopper.forward = args;
  hopper.weight = make_tensor_map(args.weight, arithmetic == Arithmetic::kBfloat16, args.outputs,
                                  args.pixels.grid.columns(), Tile::kColumns);
  hopper.blocks = static_cast<int32_t>(
      std::min<int64_t>(tile_count(args), device_limits(device).multiprocessors));
  visit(arithmetic, raw, [&](auto constant, auto pixel) {
    constexpr Arithmetic kArithmetic = decltype(constant)::value;
    if constexpr (sizeof(typename ElementOf<kArithmetic>::type) == 2) {
      launch_kernel(patch_embed_hopper_kernel<kArithmetic, decltype(pixel)>, {hopper.blocks, 1},
                    Tile::kThreads, Tile::kBytes, device, stream, "patch_embed_hopper_kernel",
                    hopper);
    }
  });
}

}  // namespace fastvit

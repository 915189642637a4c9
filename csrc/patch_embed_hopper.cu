// SPDX-License-Identifier: Apache-2.0
#include "patch_embed_hopper.cuh"

#include <algorithm>

#include "launch.cuh"
#include "tensor_map.h"

namespace fastvit {

namespace {

int64_t tile_count(int64_t rows, int64_t outputs) {
  return ceil_divide(rows, HopperTile::kRows) * ceil_divide(outputs, HopperTile::kColumns);
}

int64_t row_count(const ForwardArgs& args) {
  return args.pixels.grid.images * args.pixels.grid.patches();
}

}  // namespace

bool hopper_has_work(int64_t rows, int64_t outputs, int device) {
  return tile_count(rows, outputs) >= device_limits(device).multiprocessors;
}

bool hopper_takes(const ForwardArgs& args, int64_t weight_pitch, Arithmetic arithmetic,
                  int device) {
  const bool half = arithmetic == Arithmetic::kHalf || arithmetic == Arithmetic::kBfloat16;
  // The TMA's.
  const bool aligned =
      reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && weight_pitch * 2 % 16 == 0;
  return half && aligned && hopper_has_work(row_count(args), args.outputs, device);
}

void launch_patch_embed_hopper(const ForwardArgs& args, int64_t weight_pitch, Arithmetic arithmetic,
                               bool raw, int device, void* stream) {
  using Tile = HopperTile;
  HopperArgs hopper{};
  hopper.forward = args;
  hopper.weight = make_tensor_map(args.weight, arithmetic == Arithmetic::kBfloat16, args.outputs,
                                  args.pixels.grid.columns(), weight_pitch, Tile::kColumns);
  hopper.blocks = static_cast<int32_t>(std::min<int64_t>(tile_count(row_count(args), args.outputs),
                                                         device_limits(device).multiprocessors));
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

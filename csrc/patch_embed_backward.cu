// SPDX-License-Identifier: Apache-2.0
#include "patch_embed_backward.cuh"

#include "launch.cuh"

namespace fastvit {

void launch_weight_gradient(WeightGradientArgs args, Arithmetic arithmetic, bool raw, int device,
                            void* stream) {
  using Tile = GradientTile;
  const DeviceLimits limits = device_limits(device);
  const int64_t blocks = ceil_divide(args.outputs, Tile::kOutputs) *
                         ceil_divide(args.pixels.grid.columns(), Tile::kPixels);
  // Gradients from uint8 in float32 are not worth a kernel for tf32, too.
  if (raw && arithmetic == Arithmetic::kTf32) {
    arithmetic = Arithmetic::kIeee;
  }
  visit(arithmetic, raw, [&](auto constant, auto pixel) {
    constexpr Arithmetic kArithmetic = decltype(constant)::value;
    if constexpr (sizeof(pixel) != 1 || kArithmetic != Arithmetic::kTf32) {
      args.stages = choose_stages(limits, Tile::kBlocks<decltype(pixel)>,
                                  [](int stages) { return stages * Tile::kStageBytes; });
      launch_kernel(weight_gradient_kernel<kArithmetic, decltype(pixel)>, {blocks, args.splits},
                    Tile::kThreads, args.stages * Tile::kStageBytes, device, stream,
                    "weight_gradient_kernel", args);
    }
  });
}

void launch_weight_gradient_sum(const SumArgs& args, Arithmetic arithmetic, int device,
                                void* stream) {
  const int64_t size = static_cast<int64_t>(args.outputs) * args.grid.columns();
  visit(arithmetic, false, [&](auto constant, auto) {
    launch_kernel(weight_gradient_sum_kernel<typename ElementOf<decltype(constant)::value>::type>,
                  {ceil_divide(size, kSumThreads), 1}, kSumThreads, 0, device, stream,
                  "weight_gradient_sum_kernel", args);
  });
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
// The forward for compute capability 9.0. One warpgroup fills a ring of stages, gathering patches
// as everywhere and fetching the weight by TMA; two others multiply by wgmma straight out of it, 64
// patches each. Blocks stay and go from tile to tile, so that the first warpgroup is copying the
// next while the others write tokens.
#pragma once

#include "patch_copier.cuh"
#include "product.cuh"
#include "ptx_hopper.cuh"
#include "token_writer.cuh"

namespace fastvit {

struct HopperArgs {
  ForwardArgs forward;
  TensorMap weight;
  int32_t blocks;  // of the grid
};

struct HopperTile {
  static constexpr int kGroup = 128;    // threads of a warpgroup
  static constexpr int kConsumers = 2;  // warpgroups that multiply
  static constexpr int kThreads = (1 + kConsumers) * kGroup;
  static constexpr int kGroupRows = 64;  // patches of each
  static constexpr int kRows = kConsumers * kGroupRows, kColumns = 192;
  static constexpr int kPatchBytes = kRows * kRowBytes, kWeightBytes = kColumns * kRowBytes;
  static constexpr int kStageBytes = kPatchBytes + kWeightBytes;
  static constexpr int kStages = 5;
  // Sums pass through shared memory 32 columns at a time.
  static constexpr int kPanelColumns = 32;
  template <typename T>
  using Writer = TokenWriter<T, kGroupRows, kPanelColumns, kGroup>;
  static constexpr int kPanelBytes = Writer<float>::kBytes;
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  // wgmma and TMA want stages to begin at multiples of 1024.
  static constexpr int kAlignment = 1024;
  static constexpr int kBytes =
      kAlignment + kStages * kStageBytes + kConsumers * kPanelBytes + kBarrierBytes;
  // Registers of a thread. The block begins with as many for all, and takes only what it left: more
  // would wait forever.
  static constexpr int kProducerRegisters = 96, kConsumerRegisters = 200;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * (65536 / kThreads / 8 * 8));
};

// Where the parts of shared memory are.
struct HopperMemory {
  using Tile = HopperTile;

  uint32_t stages = (shared_memory() + Tile::kAlignment - 1) & ~uint32_t{Tile::kAlignment - 1};

  __device__ uint32_t stage(int slot) const { return stages + slot * Tile::kStageBytes; }
  __device__ uint32_t panel(int group) const {
    return stage(Tile::kStages) + group * Tile::kPanelBytes;
  }
  __device__ uint32_t full(int slot) const { return panel(Tile::kConsumers) + slot * 8; }
  __device__ uint32_t empty(int slot) const { return full(Tile::kStages) + slot * 8; }
};

// A place in the ring, and how many times the ring was gone through, as parity.
template <int kStages>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The tiles of a block, in the order in which they come.
struct HopperTiles {
  using Tile = HopperTile;

  int32_t across, count, steps;

  __device__ explicit HopperTiles(const ForwardArgs& args) {
    const PatchGrid& grid = args.pixels.grid;
    const auto rows = static_cast<int32_t>(grid.images * grid.patches());
    across = (args.outputs + Tile::kColumns - 1) / Tile::kColumns;
    count = ((rows - 1) / Tile::kRows + 1) * across;
    constexpr int kDepth = kRowBytes / 2;
    steps = (grid.columns() + kDepth - 1) / kDepth;
  }
  __device__ int32_t first_row(int32_t tile) const { return tile / across * Tile::kRows; }
  __device__ int32_t first_output(int32_t tile) const { return tile % across * Tile::kColumns; }
};

template <typename T, typename Pixel>
__device__ __forceinline__ void fill_stages(const HopperArgs& args, const HopperMemory& memory) {
  using Tile = HopperTile;
  // How many stages behind the latest have arrived for certain. uint8 pixels pass through
  // registers, those of the latest stage while the one before is converted.
  constexpr bool kRaw = sizeof(Pixel) == 1;
  constexpr int kBehind = kRaw ? 1 : 2;
  const int thread = threadIdx.x % Tile::kGroup;
  const HopperTiles tiles(args.forward);
  PatchCopier<T, Pixel, Tile::kRows, Tile::kGroup> patches(args.forward.pixels, thread);
  typename decltype(patches)::Loaded loaded{};
  RingPlace<Tile::kStages> latest, oldest;
  int step_of_oldest = 0, under_way = 0;

  const auto finish_oldest = [&](auto remaining) {
    patches.finish(loaded, step_of_oldest, memory.stage(oldest.slot));
    wait_for_copies<decltype(remaining)::value>();
    publish_writes();
    arrive(memory.full(oldest.slot));
    oldest.advance();
    step_of_oldest = step_of_oldest + 1 == tiles.steps ? 0 : step_of_oldest + 1;
    --under_way;
  };

  for (int32_t tile = blockIdx.x; tile < tiles.count; tile += args.blocks) {
    patches.aim(tiles.first_row(tile));
    for (int step = 0; step < tiles.steps; ++step) {
      // The first time round nothing has to be emptied: the phase before the first is complete.
      wait_for_phase(memory.empty(latest.slot), latest.parity ^ 1);
      const uint32_t stage = memory.stage(latest.slot);
      if (thread == 0) {
        const uint32_t full = memory.full(latest.slot);
        arrive_expecting(full, Tile::kWeightBytes);
        copy_box(stage + Tile::kPatchBytes, args.weight, step * kRowElements<T>,
                 tiles.first_output(tile), full);
      }
      const auto next = patches.start(step, stage);
      commit_copies();
      if (under_way++ >= kBehind) {
        finish_oldest(std::integral_constant<int, kBehind>{});
      }
      loaded = next;
      latest.advance();
    }
  }
  while (under_way > 0) {
    finish_oldest(std::integral_constant<int, 0>{});
  }
}

template <typename T, Arithmetic kArithmetic>
__device__ __forceinline__ void multiply_and_write(const HopperArgs& args,
                                                   const HopperMemory& memory) {
  using Tile = HopperTile;
  const int group = threadIdx.x / Tile::kGroup - 1;
  const int thread = threadIdx.x % Tile::kGroup;
  const int lane = thread % 32, warp = thread / 32;
  const HopperTiles tiles(args.forward);
  RingPlace<Tile::kStages> place;
  WarpSums<kArithmetic, 16, Tile::kColumns> sums;

  for (int32_t tile = blockIdx.x; tile < tiles.count; tile += args.blocks) {
    sums.clear();
    int previous = -1;
    const auto release = [&](int slot) {
      if (lane == 0) {
        arrive(memory.empty(slot));
      }
    };
    for (int step = 0; step < tiles.steps; ++step) {
      wait_for_phase(memory.full(place.slot), place.parity);
      const uint32_t stage = memory.stage(place.slot);
      begin_products();
#pragma unroll
      for (int slab = 0; slab < kRowBytes / 32; ++slab) {
        const uint32_t patches = stage + group * Tile::kGroupRows * kRowBytes + slab * 32;
        multiply_add_tiles<T, Tile::kColumns>(
            sums.at[0], tile_descriptor(patches),
            tile_descriptor(stage + Tile::kPatchBytes + slab * 32));
      }
      commit_products();
      // The products of this stage may go on while the one before is refilled.
      wait_for_products<1>();
      if (previous >= 0) {
        release(previous);
      }
      previous = place.slot;
      place.advance();
    }
    wait_for_products<0>();
    release(previous);

    const int32_t first_row = tiles.first_row(tile) + group * Tile::kGroupRows;
    const uint32_t panel = memory.panel(group);
    using Writer = Tile::Writer<T>;
#pragma unroll
    for (int first = 0; first < Tile::kColumns; first += Tile::kPanelColumns) {
      sums.template for_pairs<Tile::kPanelColumns>(
          lane, first, [&](int row, int column, float left, float right) {
            Writer::store_pair(panel, 16 * warp + row, column, left, right);
          });
      meet(1 + group, Tile::kGroup);
      const Writer writer(args.forward, thread, first_row, tiles.first_output(tile) + first);
      writer.write_patches(panel);
      meet(1 + group, Tile::kGroup);
    }
    TokenWriter<T, Tile::kGroupRows, Tile::kColumns, Tile::kGroup>(args.forward, thread, first_row,
                                                                   tiles.first_output(tile))
        .write_classes();
  }
}

template <Arithmetic kArithmetic, typename Pixel>
__global__ void __launch_bounds__(HopperTile::kThreads, 1)
    patch_embed_hopper_kernel(const __grid_constant__ HopperArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTVIT_EMULATED)
  using T = typename ElementOf<kArithmetic>::type;
  using Tile = HopperTile;
  const HopperMemory memory;
  if (threadIdx.x == 0) {
    prefetch_map(args.weight);
    for (int slot = 0; slot < Tile::kStages; ++slot) {
      // All who copy patches, and the announcement of the weight; one lane of each warp.
      init_barrier(memory.full(slot), Tile::kGroup + 1);
      init_barrier(memory.empty(slot), Tile::kConsumers * Tile::kGroup / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < Tile::kGroup) {
    leave_registers<Tile::kProducerRegisters>();
    fill_stages<T, Pixel>(args, memory);
  } else {
    take_registers<Tile::kConsumerRegisters>();
    multiply_and_write<T, kArithmetic>(args, memory);
  }
#else
  // Never launched there; if it were, an error is better than tokens that nobody wrote.
  stop();
#endif
}

}  // namespace fastvit

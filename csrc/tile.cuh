// SPDX-License-Identifier: Apache-2.0
// Tiles of operands in shared memory and their copies from global memory.
//
// A tile is made of rows of 128 bytes, 8 chunks of 16. Chunk c of row r lies at place c ^ (r % 8),
// so that a chunk of 8 neighbouring rows falls into all banks. Where 4 rows of two chunks are read,
// the bits of r % 8 are turned by one.
#pragma once

#include "patch_embed.h"
#include "ptx.cuh"

namespace fastvit {

constexpr int kRowBytes = 128;
constexpr int kRowChunks = kRowBytes / 16;

template <typename T>
constexpr int kChunkElements = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kRowElements = kRowBytes / static_cast<int>(sizeof(T));

template <bool kTurned = false>
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, int row, int chunk) {
  const int place = kTurned ? (row & 3) << 1 | (row >> 2 & 1) : row & 7;
  return tile + row * kRowBytes + ((chunk ^ place) << 4);
}

// One of the rows that a thread copies a chunk of: where to, and where from if it is `inside`.
template <typename T>
struct ChunkRow {
  uint32_t to;
  const T* from;
  bool inside;
};

// Copies columns k ... of kRows rows, row(i) each, zeros where there are none. offset(k) is where
// column k lies, counted from the beginning of any row: it is asked for once for all.
template <int kRows, typename T, typename Row, typename Offset>
__device__ __forceinline__ void copy_chunks(const Row& row, int k, int columns, Access access,
                                            const Offset& offset) {
  if (access == Access::kChunks) {
    const bool some = k < columns;
    const int64_t at = some ? offset(k) : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const ChunkRow<T> r = row(i);
      copy_async<16>(r.to, r.from + at, r.inside && some);
    }
  } else if (access == Access::kWords) {
    constexpr int kWord = 4 / static_cast<int>(sizeof(T));
    // Not unrolled, here and below: what is read ahead would fill registers that others need.
#pragma unroll 1
    for (int word = 0; word < 4; ++word) {
      const bool some = k + word * kWord < columns;
      const int64_t at = some ? offset(k + word * kWord) : 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const ChunkRow<T> r = row(i);
        copy_async<4>(r.to + 4 * word, r.from + at, r.inside && some);
      }
    }
  } else {
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
    for (int e = 0; e < kChunkElements<T>; ++e) {
      const bool some = k + e < columns;
      const int64_t at = some ? offset(k + e) : 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const ChunkRow<T> r = row(i);
        store_shared<T>(r.to + e * sizeof(T), r.inside && some ? load_global(r.from + at) : T{});
      }
    }
  }
}

// The uint8 pixels of a chunk on their way through registers.
template <typename T>
struct RawChunk {
  static constexpr int kWords = kChunkElements<T> / 4;
  uint32_t words[kWords];
};

// Reads pixels k ... of kRows patches, row(i) each; what is beyond a patch is 0.
template <int kRows, typename T, typename Row>
__device__ __forceinline__ void load_pixels(RawChunk<T> (&raw)[kRows], const Pixels& pixels,
                                            const Row& row, int k) {
  const PatchGrid& grid = pixels.grid;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    raw[i] = RawChunk<T>{};
  }
  if (pixels.access == Access::kChunks) {
    const bool some = k < grid.columns();
    const int64_t at = some ? grid.column_offset(k) : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const ChunkRow<uint8_t> r = row(i);
      if (r.inside && some) {
        if constexpr (RawChunk<T>::kWords == 2) {
          const uint2 both = load_global(reinterpret_cast<const uint2*>(r.from + at));
          raw[i].words[0] = both.x;
          raw[i].words[1] = both.y;
        } else {
          raw[i].words[0] = load_global(reinterpret_cast<const uint32_t*>(r.from + at));
        }
      }
    }
    return;
  }
#pragma unroll
  for (int word = 0; word < RawChunk<T>::kWords; ++word) {
#pragma unroll 1
    for (int byte = 0; byte < 4; ++byte) {
      const int column = k + 4 * word + byte;
      const bool some = column < grid.columns();
      const int64_t at = some ? grid.column_offset(column) : 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const ChunkRow<uint8_t> r = row(i);
        if (r.inside && some) {
          raw[i].words[word] |= uint32_t{load_global(r.from + at)} << 8 * byte;
        }
      }
    }
  }
}

// Stores the pixels of chunks from column k on, at row(i).to each, as (u - offset) * unit. What is
// beyond a patch gets some finite number: the other operand is 0 there.
template <int kRows, typename T, typename Row>
__device__ __forceinline__ void store_pixels(const RawChunk<T> (&raw)[kRows], const Pixels& pixels,
                                             const Row& row, int k) {
  const PatchGrid& grid = pixels.grid;
  const int last = grid.columns() - 1;
  const bool one_channel = pixels.access == Access::kChunks && !grid.interleaved;
  float offsets[kChunkElements<T>];
#pragma unroll
  for (int e = 0; e < kChunkElements<T>; ++e) {
    const bool same = e > 0 && one_channel;
    offsets[e] = same ? offsets[0] : pixels.offsets[grid.channel(k + e < last ? k + e : last)];
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const auto value = [&](int e) {
      const uint32_t pixel = raw[i].words[e / 4] >> 8 * (e % 4) & 0xffu;
      // 2^23 + u as a float is a matter of bits; both differences are exact.
      return (float_from_bits(0x4b000000u | pixel) - 8388608.0f - offsets[e]) * pixels.unit;
    };
    uint4 packed;
    if constexpr (sizeof(T) == 4) {
      packed = {float_bits(value(0)), float_bits(value(1)), float_bits(value(2)),
                float_bits(value(3))};
    } else {
      packed = {pack<T>(value(0), value(1)), pack<T>(value(2), value(3)),
                pack<T>(value(4), value(5)), pack<T>(value(6), value(7))};
    }
    store_shared<uint4>(row(i).to, packed);
  }
}

// Waits, of `stages` stages that are filled in turn, for the oldest, which all threads may then
// read.
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages == 2) {
    wait_for_copies<0>();
  } else if (stages == 3) {
    wait_for_copies<1>();
  } else {
    wait_for_copies<2>();
  }
  __syncthreads();
}

// Multiplies step by step while later steps are copied, through a ring of `stages` stages:
// start(step, stage) and finish(step, stage) fill one, before and after the product that is under
// way, and multiply(stage) reads it.
template <typename Start, typename Finish, typename Multiply>
__device__ __forceinline__ void run_ring(uint32_t memory, int stage_bytes, int stages, int steps,
                                         const Start& start, const Finish& finish,
                                         const Multiply& multiply) {
  const int ahead = stages - 1;
  for (int step = 0; step < ahead; ++step) {
    if (step < steps) {
      const uint32_t stage = memory + step * stage_bytes;
      start(step, stage);
      finish(step, stage);
    }
    commit_copies();
  }
  int slot = 0;
  for (int step = 0; step < steps; ++step) {
    wait_for_stage(stages);
    // Everybody has finished with the slot before this one.
    const uint32_t next = memory + (slot == 0 ? ahead : slot - 1) * stage_bytes;
    const bool more = step + ahead < steps;
    if (more) {
      start(step + ahead, next);
    }
    commit_copies();
    multiply(memory + slot * stage_bytes);
    if (more) {
      finish(step + ahead, next);
    }
    slot = slot == ahead ? 0 : slot + 1;
  }
}

}  // namespace fastvit

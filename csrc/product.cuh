// SPDX-License-Identifier: Apache-2.0
// The product of two tiles, as each warp sums up its part of it in registers.
//
// The sums of a warp are 16 x 8 pieces, of which lane l holds the elements (l / 4, 2 (l % 4)) and
// the one beside it, and the same 8 rows below: what mma.sync prescribes. Float32 without tensor
// cores keeps to the same distribution, so that what follows the product need not know.
#pragma once

#include "tile.cuh"

namespace fastvit {

template <Arithmetic kArithmetic>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<Arithmetic::kHalf> {
  using type = Half;
};
template <>
struct ElementOf<Arithmetic::kBfloat16> {
  using type = Bfloat16;
};

// kRows x kColumns sums of a warp.
template <Arithmetic kArithmetic, int kRows, int kColumns>
struct WarpSums {
  using T = typename ElementOf<kArithmetic>::type;
  static constexpr int kHigh = kRows / 16, kWide = kColumns / 8;
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0);

  float at[kHigh][kWide][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& row : at) {
      for (auto& piece : row) {
        for (float& x : piece) {
          x = 0.0f;
        }
      }
    }
  }

  // Calls body(row, column, left, right) for each pair of neighbours that the lane holds, of
  // kWidth columns from `first` on, where they count from.
  template <int kWidth, typename Body>
  __device__ __forceinline__ void for_pairs(int lane, int first, const Body& body) const {
#pragma unroll
    for (int i = 0; i < kHigh; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* pair = &at[i][first / 8 + j][2 * half];
          body(16 * i + 8 * half + lane / 4, 8 * j + 2 * (lane % 4), pair[0], pair[1]);
        }
      }
    }
  }

  template <typename Body>
  __device__ __forceinline__ void for_pairs(int lane, const Body& body) const {
    for_pairs<kColumns>(lane, 0, body);
  }

  // Adds a bᵀ, both tiles with the summed dimension along their rows of 128 bytes; the warp's rows
  // of a and b begin at a_row and b_row.
  __device__ __forceinline__ void add_rows(uint32_t a, int a_row, uint32_t b, int b_row, int lane) {
    if constexpr (kArithmetic == Arithmetic::kIeee) {
      add_rows_ieee(a, a_row, b, b_row, lane);
    } else {
#pragma unroll
      for (int slab = 0; slab < kRowChunks / 2; ++slab) {
        uint32_t left[kHigh][4];
#pragma unroll
        for (int i = 0; i < kHigh; ++i) {
          load_matrices(left[i],
                        chunk_address(a, a_row + 16 * i + lane % 16, 2 * slab + lane / 16));
          round_operand(left[i]);
        }
#pragma unroll
        for (int j = 0; j < kWide; j += 2) {
          uint32_t right[4];
          load_matrices(right, chunk_address(b, b_row + 8 * j + lane % 8 + lane / 16 * 8,
                                             2 * slab + lane / 8 % 2));
          round_operand(right);
#pragma unroll
          for (int i = 0; i < kHigh; ++i) {
            multiply_add<T>(at[i][j], left[i], right[0], right[1]);
            multiply_add<T>(at[i][j + 1], left[i], right[2], right[3]);
          }
        }
      }
    }
  }

  // Adds aᵀ b, both tiles with the summed dimension down their kDepth rows. A tile is as many
  // panels, kDepth rows of 128 bytes each with turned places, as its columns need.
  template <int kDepth>
  __device__ __forceinline__ void add_columns(uint32_t a, int a_column, uint32_t b, int b_column,
                                              int lane) {
    if constexpr (kArithmetic == Arithmetic::kIeee) {
      add_columns_ieee<kDepth>(a, a_column, b, b_column, lane);
    } else {
      constexpr int kSlab = 32 / sizeof(T);
#pragma unroll
      for (int slab = 0; slab < kDepth / kSlab; ++slab) {
        uint32_t left[kHigh][4];
#pragma unroll
        for (int i = 0; i < kHigh; ++i) {
          load_left<kDepth>(left[i], a, kSlab * slab, a_column + 16 * i, lane);
        }
#pragma unroll
        for (int j = 0; j < kWide; j += 2) {
          uint32_t right[4];
          load_right<kDepth>(right, b, kSlab * slab, b_column + 8 * j, lane);
#pragma unroll
          for (int i = 0; i < kHigh; ++i) {
            multiply_add<T>(at[i][j], left[i], right[0], right[1]);
            multiply_add<T>(at[i][j + 1], left[i], right[2], right[3]);
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void round_operand(uint32_t (&operand)[4]) {
    if constexpr (kArithmetic == Arithmetic::kTf32) {
      for (uint32_t& x : operand) {
        x = round_to_tf32(x);
      }
    }
  }

  template <int kDepth>
  static __device__ __forceinline__ uint32_t panel_address(uint32_t tile, int row, int column) {
    constexpr int kEach = kChunkElements<T>;
    const int panel = column / kRowElements<T>, along = column % kRowElements<T>;
    return chunk_address<true>(tile + panel * kDepth * kRowBytes, row, along / kEach) +
           (along % kEach) * sizeof(T);
  }

  // 16 columns of a tile as the rows of the left operand of mma.sync, its rows as their elements.
  template <int kDepth>
  static __device__ __forceinline__ void load_left(uint32_t (&to)[4], uint32_t tile, int row,
                                                   int column, int lane) {
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(to, panel_address<kDepth>(tile, row + lane % 8 + lane / 16 * 8,
                                                         column + lane / 8 % 2 * 8));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i] = load_shared<uint32_t>(
            panel_address<kDepth>(tile, row + lane % 4 + i / 2 * 4, column + lane / 4 + i % 2 * 8));
      }
      round_operand(to);
    }
  }

  // 16 columns as those of the right operands of two.
  template <int kDepth>
  static __device__ __forceinline__ void load_right(uint32_t (&to)[4], uint32_t tile, int row,
                                                    int column, int lane) {
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(
          to, panel_address<kDepth>(tile, row + lane % 16, column + lane / 16 * 8));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i] = load_shared<uint32_t>(
            panel_address<kDepth>(tile, row + lane % 4 + i % 2 * 4, column + lane / 4 + i / 2 * 8));
      }
      round_operand(to);
    }
  }

  // Each tile is summed up by itself first: many short sums round less than a long one.
  __device__ __forceinline__ void add_rows_ieee(uint32_t a, int a_row, uint32_t b, int b_row,
                                                int lane) {
    WarpSums part;
    part.clear();
#pragma unroll 1
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
      float4 right[2 * kWide];
#pragma unroll
      for (int j = 0; j < 2 * kWide; ++j) {
        const int row = b_row + 8 * (j / 2) + 2 * (lane % 4) + j % 2;
        right[j] = load_shared<float4>(chunk_address(b, row, chunk));
      }
#pragma unroll
      for (int i = 0; i < 2 * kHigh; ++i) {
        const int row = a_row + 8 * i + lane / 4;
        const auto left = load_shared<float4>(chunk_address(a, row, chunk));
#pragma unroll
        for (int j = 0; j < 2 * kWide; ++j) {
          float& sum = part.at[i / 2][j / 2][i % 2 * 2 + j % 2];
          sum = fmaf(left.x, right[j].x, sum);
          sum = fmaf(left.y, right[j].y, sum);
          sum = fmaf(left.z, right[j].z, sum);
          sum = fmaf(left.w, right[j].w, sum);
        }
      }
    }
    add(part);
  }

  template <int kDepth>
  __device__ __forceinline__ void add_columns_ieee(uint32_t a, int a_column, uint32_t b,
                                                   int b_column, int lane) {
    WarpSums part;
    part.clear();
#pragma unroll 1
    for (int row = 0; row < kDepth; ++row) {
      float2 right[kWide];
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const int column = b_column + 8 * j + 2 * (lane % 4);
        right[j] = load_shared<float2>(panel_address<kDepth>(b, row, column));
      }
#pragma unroll
      for (int i = 0; i < 2 * kHigh; ++i) {
        const int column = a_column + 8 * i + lane / 4;
        const auto left = load_shared<float>(panel_address<kDepth>(a, row, column));
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          float* sums = &part.at[i / 2][j][i % 2 * 2];
          sums[0] = fmaf(left, right[j].x, sums[0]);
          sums[1] = fmaf(left, right[j].y, sums[1]);
        }
      }
    }
    add(part);
  }

  __device__ __forceinline__ void add(const WarpSums& other) {
#pragma unroll
    for (int i = 0; i < kHigh; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          at[i][j][e] += other.at[i][j][e];
        }
      }
    }
  }
};

}  // namespace fastvit

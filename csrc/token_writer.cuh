// SPDX-License-Identifier: Apache-2.0
// The epilogue: sums of products become tokens, with bias and position, behind the class token.
#pragma once

#include "tile.cuh"

namespace fastvit {

template <typename T>
__device__ __forceinline__ float4 load_quad(const T* from) {
  if constexpr (sizeof(T) == 4) {
    return load_global(reinterpret_cast<const float4*>(from));
  } else {
    const uint2 packed = load_global(reinterpret_cast<const uint2*>(from));
    const auto value = [](uint32_t bits) { return element_value(T{static_cast<uint16_t>(bits)}); };
    return {value(packed.x & 0xffffu), value(packed.x >> 16), value(packed.y & 0xffffu),
            value(packed.y >> 16)};
  }
}

template <typename T>
__device__ __forceinline__ void store_quad(T* to, float4 x) {
  if constexpr (sizeof(T) == 4) {
    store_global(reinterpret_cast<float4*>(to), x);
  } else {
    store_global(reinterpret_cast<uint2*>(to), uint2{pack<T>(x.x, x.y), pack<T>(x.z, x.w)});
  }
}

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Writes the tokens of kRows patches, kColumns outputs of each, by kThreads threads.
template <typename T, int kRows, int kColumns, int kThreads>
class TokenWriter {
 public:
  // Sums lie in rows of floats. With 8 more than are used, the pairs that half a warp writes fall
  // into different banks.
  static constexpr int kPitch = kColumns + 8;
  static constexpr int kBytes = kRows * kPitch * 4;

  __device__ TokenWriter(const ForwardArgs& args, int thread, int32_t first_row,
                         int32_t first_output)
      : args_(args),
        thread_(thread),
        first_row_(first_row),
        first_output_(first_output),
        before_(args.cls_token == nullptr ? 0 : 1),
        rows_(static_cast<int32_t>(args.pixels.grid.images * args.pixels.grid.patches())) {}

  static __device__ __forceinline__ void store_pair(uint32_t sums, int row, int column, float first,
                                                    float second) {
    store_shared<float2>(sums + (row * kPitch + column) * 4, float2{first, second});
  }

  // Adds bias and position to the sums in shared memory, and writes tokens.
  __device__ void write_patches(uint32_t sums) const {
    // Loads of several tokens are under way at once.
    constexpr int kAll = kRows * kColumns / 4 / kThreads, kTogether = kAll < 4 ? kAll : 4;
    static_assert(kRows * kColumns % (4 * kThreads * kTogether) == 0);
    for (int i = thread_; i < kAll * kThreads; i += kTogether * kThreads) {
      if (args_.quads) {
        write_quads<kTogether>(sums, i);
      } else {
        for (int j = 0; j < kTogether; ++j) {
          write_elements(sums, place(i + j * kThreads));
        }
      }
    }
  }

  // The class tokens of the images whose first patch is in this block.
  __device__ void write_classes() const {
    if (before_ == 0) {
      return;
    }
    const int32_t patches = args_.pixels.grid.patches();
    const int32_t end = first_row_ + kRows < rows_ ? first_row_ + kRows : rows_;
    for (int32_t image = (first_row_ + patches - 1) / patches; image * patches < end; ++image) {
      for (int i = thread_; i < kColumns; i += kThreads) {
        const int32_t n = first_output_ + i;
        if (n < args_.outputs) {
          const float x = element_value(load_global(static_cast<const T*>(args_.cls_token) + n));
          store_global(token(image, 0) + n, round_element<T>(args_.pos_of_class ? x + pos(n) : x));
        }
      }
    }
  }

 private:
  // Four neighbouring outputs of one token.
  struct Place {
    int row, column;
    bool inside;
    int32_t n;
    int64_t pos;
    T* out;
  };

  __device__ Place place(int i) const {
    constexpr int kQuads = kColumns / 4;
    const PatchGrid& grid = args_.pixels.grid;
    Place at;
    at.row = i / kQuads;
    at.column = i % kQuads * 4;
    const int32_t m = first_row_ + at.row;
    at.n = first_output_ + at.column;
    at.inside = m < rows_ && at.n < args_.outputs;
    const int32_t image = grid.by_patches.quotient(at.inside ? m : 0);
    const int32_t patch = grid.by_patches.remainder(at.inside ? m : 0, image);
    at.pos = (static_cast<int64_t>(args_.pos_of_class) + patch) * args_.outputs + at.n;
    at.out = token(image, before_ + patch) + at.n;
    return at;
  }

  __device__ float4 sum(uint32_t sums, const Place& at) const {
    return load_shared<float4>(sums + (at.row * kPitch + at.column) * 4);
  }

  template <int kTogether>
  __device__ __forceinline__ void write_quads(uint32_t sums, int i) const {
    Place at[kTogether];
    float4 x[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      at[j] = place(i + j * kThreads);
      if (at[j].inside) {
        x[j] = sum_of(sum_of(sum(sums, at[j]), bias_quad(at[j].n)), pos_quad(at[j].pos));
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (at[j].inside) {
        store_quad(at[j].out, x[j]);
      }
    }
  }

  __device__ void write_elements(uint32_t sums, const Place& at) const {
    if (!at.inside) {
      return;
    }
    const float4 quad = sum(sums, at);
    const float each[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (at.n + e < args_.outputs) {
        store_global(at.out + e, round_element<T>(each[e] + bias(at.n + e) + pos(at.pos + e)));
      }
    }
  }

  __device__ T* token(int32_t image, int32_t token) const {
    const int32_t tokens = before_ + args_.pixels.grid.patches();
    return static_cast<T*>(args_.out) +
           (static_cast<int64_t>(image) * tokens + token) * args_.outputs;
  }
  __device__ float bias(int32_t n) const {
    if (args_.bias == nullptr) {
      return 0.0f;
    }
    return args_.float_bias ? load_global(static_cast<const float*>(args_.bias) + n)
                            : element_value(load_global(static_cast<const T*>(args_.bias) + n));
  }
  __device__ float4 bias_quad(int32_t n) const {
    if (args_.bias == nullptr) {
      return {0.0f, 0.0f, 0.0f, 0.0f};
    }
    return args_.float_bias ? load_quad(static_cast<const float*>(args_.bias) + n)
                            : load_quad(static_cast<const T*>(args_.bias) + n);
  }
  __device__ float pos(int64_t at) const {
    if (args_.pos_embed == nullptr) {
      return 0.0f;
    }
    return element_value(load_global(static_cast<const T*>(args_.pos_embed) + at));
  }
  __device__ float4 pos_quad(int64_t at) const {
    if (args_.pos_embed == nullptr) {
      return {0.0f, 0.0f, 0.0f, 0.0f};
    }
    return load_quad(static_cast<const T*>(args_.pos_embed) + at);
  }

  const ForwardArgs& args_;
  const int thread_;
  const int32_t first_row_, first_output_, before_, rows_;
};

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of the patch embedding: what they are given and how they are launched.
#pragma once

#include <cstdint>
#include <optional>

#include "patch_grid.h"
#include "uint8_fold.h"

namespace fastvit {

// The numbers that a product is made of. kTf32 and kIeee take float32 operands, rounded to 10 bits
// for the tensor cores or as they are.
enum class Arithmetic : int32_t { kHalf, kBfloat16, kTf32, kIeee };

// How the rows of an operand may be copied: 16 bytes of shared memory at once, 4, or one element.
enum class Access : int32_t { kChunks, kWords, kElements };

// uint8 pixels u enter the product as (u - offset of their channel) * unit. The kernels take the
// offsets as arguments, of which there is little room.
constexpr int kMaxPixelChannels = 128;

struct Pixels {
  const void* data;  // float, Half, Bfloat16 as the arithmetic, or uint8_t
  PatchGrid grid;
  Access access;
  float unit;
  float offsets[kMaxPixelChannels];
};

struct WeightFoldArgs {
  const void* weight;    // (D, C, ph, pw), contiguous
  const void* bias;      // (D), or null
  PatchGrid grid;        // of the patch; the sizes of the images do not matter
  void* folded;          // (D, K) in the order of the columns, over the unit
  int64_t folded_pitch;  // elements from one row of it to the next
  float* folded_bias;    // (D)
  int32_t outputs;       // D
  double inverse_unit;
  FoldedChannel channels[kMaxPixelChannels];
};

struct ForwardArgs {
  Pixels pixels;
  const void* weight;  // (D, K), contiguous
  Access weight_access;
  const void* bias;  // (D), float if float_bias, else like the weight; or null
  bool float_bias;
  const void* pos_embed;  // (N, D), or (N + 1, D) with the class token's in front; or null
  bool pos_of_class;
  const void* cls_token;  // (D), or null
  void* out;              // (B, N [+ 1], D), contiguous
  int32_t outputs;        // D
  bool quads;             // whether 4 neighbouring outputs may be read and written at once
  int32_t stages;         // set by the launch: 2, 3 or 4 tiles in flight
};

struct WeightGradientArgs {
  Pixels pixels;
  const void* grad;  // of the patch tokens, (B, N, D); a row's elements follow each other
  int64_t grad_image_stride, grad_token_stride;
  Access grad_access;
  float* partial;          // (splits, D, K)
  int32_t outputs;         // D
  int32_t rows_per_split;  // patches, of all images, that one block sums up
  int32_t splits;
  int32_t stages;  // set by the launch
};

struct SumArgs {
  const float* partial;  // (splits, D, K)
  int32_t splits, outputs;
  const float* dbias;  // (D), for uint8; or null
  PatchGrid grid;
  void* dweight;  // (D, K) in the order of the columns
  // uint8: dweight = (sum * inverse_unit + dbias * shift) * scale, by channel.
  float inverse_unit;
  float shift[kMaxPixelChannels], scale[kMaxPixelChannels];
};

// All queue on `stream` (a cudaStream_t) of CUDA device `device` and throw
// std::runtime_error with CUDA's text where a launch fails. `raw` says that the pixels are uint8;
// `small_tile` overrides the choice by the size of the problem, for tests.
void launch_weight_fold(const WeightFoldArgs& args, Arithmetic arithmetic, int device,
                        void* stream);
void launch_patch_embed(ForwardArgs args, Arithmetic arithmetic, bool raw,
                        std::optional<bool> small_tile, int device, void* stream);
// The forward for compute capability 9.0, the rows of whose weight may have gaps; whether it takes
// a call; and whether it would if these rows began at multiples of 16 bytes: with work for every
// multiprocessor.
void launch_patch_embed_hopper(const ForwardArgs& args, int64_t weight_pitch, Arithmetic arithmetic,
                               bool raw, int device, void* stream);
bool hopper_takes(const ForwardArgs& args, int64_t weight_pitch, Arithmetic arithmetic, int device);
bool hopper_has_work(int64_t rows, int64_t outputs, int device);
void launch_weight_gradient(WeightGradientArgs args, Arithmetic arithmetic, bool raw, int device,
                            void* stream);
void launch_weight_gradient_sum(const SumArgs& args, Arithmetic arithmetic, int device,
                                void* stream);

// Whether the current device has code for them: 0 (cudaSuccess) or CUDA's error number.
int probe_patch_embed();

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
// The centred fold of an image normalisation into the weight and bias of a patch embedding.
//
// A pixel u in 0..255 is to be normalised to (u / 255 - mean) / std. With a centre
// c = round(255 mean) the weight w that would multiply it becomes
//
//     w (u / 255 - mean) / std  =  w' (u - c)  +  w' (c - 255 mean),      w' = w / (255 std),
//
// where u - c is an integer of magnitude at most 255, so exact even in bfloat16, and the last term
// does not depend on the image and joins the bias.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTVIT_HOST_DEVICE __host__ __device__
#else
#define FASTVIT_HOST_DEVICE
#endif

namespace fastvit {

// One image channel of the fold, in double: the products are rounded once, to the weight's type.
struct FoldedChannel {
  double scale;  // 1 / (255 std)
  double shift;  // c - 255 mean

  FASTVIT_HOST_DEVICE double weight(double w) const { return w * scale; }
  // What one weight, or the sum of several of this channel, adds to the bias.
  FASTVIT_HOST_DEVICE double bias(double w) const { return w * scale * shift; }
};

// mean and std are in units of 0..1. Halves round to the even integer, as Python's round does.
FoldedChannel fold_channel(double mean, double std);

template <typename T>
struct FoldArgs {
  const T* weight;   // [outputs, channels, area]
  const T* bias;     // [outputs], or null for no bias
  T* folded_weight;  // [outputs, channels, area]
  T* folded_bias;    // [outputs]
  int64_t outputs;   // rows of the weight
  int64_t channels;  // image channels
  int64_t area;      // pixels of a patch
};

// The device code takes its channels as a kernel argument, of which there are at most 4 KB.
constexpr int kMaxDeviceFoldChannels = 128;

// Queues the fold on `stream` (a cudaStream_t) of CUDA device `device`. `channels` is host memory
// of args.channels entries, no more than kMaxDeviceFoldChannels. Throws std::runtime_error with
// CUDA's text where the launch fails.
template <typename T>
void launch_uint8_fold(const FoldArgs<T>& args, const FoldedChannel* channels, int device,
                       void* stream);

// Whether the current device has code for the fold: 0 (cudaSuccess) or CUDA's error number.
int probe_uint8_fold();

}  // namespace fastvit

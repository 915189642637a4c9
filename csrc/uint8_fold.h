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

#include "host_device.h"

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

}  // namespace fastvit

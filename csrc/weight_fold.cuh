// SPDX-License-Identifier: Apache-2.0
// The uint8 normalisation folded into the weight and bias, see uint8_fold.h, and the weight's
// columns put into the order of the patches.
#pragma once

#include "patch_embed.h"
#include "ptx.cuh"

namespace fastvit {

constexpr int kFoldThreads = 256;
constexpr int kFoldBytes = kFoldThreads * sizeof(double);

// One block for each output. Every thread sums its own share of the bias and the shares are added
// as a tree: a fixed order, so the bias is bitwise repeatable.
template <typename T>
__global__ void __launch_bounds__(kFoldThreads)
    weight_fold_kernel(const __grid_constant__ WeightFoldArgs args) {
  const int32_t area = args.grid.patch_height * args.grid.patch_width;
  const int32_t columns = args.grid.columns();
  const int64_t row = int64_t{blockIdx.x} * columns;
  double bias = 0;
  for (int32_t k = threadIdx.x; k < columns; k += kFoldThreads) {
    const int32_t c = args.grid.channel(k);
    const int32_t from = args.grid.interleaved ? c * area + k / args.grid.channels : k;
    const double w = element_value(load_global(static_cast<const T*>(args.weight) + row + from));
    const FoldedChannel channel = args.channels[c];
    const double folded = channel.weight(w) * args.inverse_unit;
    store_global(static_cast<T*>(args.folded) + blockIdx.x * args.folded_pitch + k,
                 round_element<T>(static_cast<float>(folded)));
    bias += channel.bias(w);
  }

  const uint32_t shares = shared_memory();
  const uint32_t own = shares + threadIdx.x * sizeof(double);
  store_shared<double>(own, bias);
  for (int half = kFoldThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      const auto other = load_shared<double>(own + half * sizeof(double));
      store_shared<double>(own, load_shared<double>(own) + other);
    }
  }
  if (threadIdx.x == 0) {
    double sum = load_shared<double>(shares);
    if (args.bias != nullptr) {
      sum += element_value(load_global(static_cast<const T*>(args.bias) + blockIdx.x));
    }
    store_global(args.folded_bias + blockIdx.x, static_cast<float>(sum));
  }
}

}  // namespace fastvit

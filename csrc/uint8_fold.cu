// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda_support.h"
#include "uint8_fold.h"

namespace fastvit {
namespace {

constexpr int kThreads = 256;

struct FoldedChannels {
  FoldedChannel at[kMaxDeviceFoldChannels];
};

// One block for each output. Every thread sums its own strided share and the shares are added as
// a tree: a fixed order, so the bias is bitwise repeatable.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    uint8_fold_kernel(FoldArgs<T> args, const __grid_constant__ FoldedChannels channels) {
  const int64_t d = blockIdx.x;
  const int64_t row = d * args.channels * args.area;
  double bias = 0;
  for (int64_t c = 0; c < args.channels; ++c) {
    const FoldedChannel channel = channels.at[c];
    for (int64_t i = threadIdx.x; i < args.area; i += kThreads) {
      const int64_t at = row + c * args.area + i;
      const double w = args.weight[at];
      args.folded_weight[at] = static_cast<T>(channel.weight(w));
      bias += channel.bias(w);
    }
  }

  __shared__ double shares[kThreads];
  shares[threadIdx.x] = bias;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      shares[threadIdx.x] += shares[threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0) {
    const double own = args.bias ? static_cast<double>(args.bias[d]) : 0.0;
    args.folded_bias[d] = static_cast<T>(own + shares[0]);
  }
}

}  // namespace

template <typename T>
void launch_uint8_fold(const FoldArgs<T>& args, const FoldedChannel* channels, int device,
                       void* stream) {
  const DeviceGuard guard(device);
  if (args.outputs == 0) {
    return;
  }
  FoldedChannels by_value{};
  std::copy_n(channels, args.channels, by_value.at);
  uint8_fold_kernel<T>
      <<<static_cast<unsigned>(args.outputs), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          args, by_value);
  check_cuda(cudaGetLastError(), "launch of uint8_fold_kernel");
}

template void launch_uint8_fold(const FoldArgs<float>&, const FoldedChannel*, int, void*);
template void launch_uint8_fold(const FoldArgs<double>&, const FoldedChannel*, int, void*);

int probe_uint8_fold() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, uint8_fold_kernel<float>);
}

}  // namespace fastvit

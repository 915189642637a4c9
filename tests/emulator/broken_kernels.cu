// SPDX-License-Identifier: Apache-2.0
// Wrong kernels, each of which the emulator must refuse, and a right one.
#include "broken_kernels.h"

#include "cuda_support.h"
#include "ptx.cuh"

namespace fastvit {
namespace {

constexpr int kThreads = 64, kFloats = kThreads;

struct Args {
  const float* in;  // kFloats of them, and so many are `out`
  float* out;
  Fault fault;
};

// Sends the floats through shared memory in 16 bytes of every fourth thread, as the real kernels
// do, then through registers; each thread reads what its neighbour copied.
__global__ void copy_kernel(const Args args) {
  const int thread = static_cast<int>(threadIdx.x), neighbour = (thread + 1) % kThreads;
  const Fault fault = args.fault;
  const uint32_t memory = shared_memory(), copied = memory + kFloats * 4;
  const auto place = [](uint32_t array, int i) { return array + 4 * static_cast<uint32_t>(i); };

  const bool copies = thread % 4 == 0;
  if (copies) {
    const auto* from = reinterpret_cast<const char*>(args.in + thread);
    copy_async<16>(place(copied, thread), from + (fault == Fault::kMisalignedCopy ? 4 : 0),
                   fault != Fault::kMisalignedCopy);
  }
  commit_copies();
  // A second group, of nothing.
  commit_copies();
  if (fault == Fault::kTooFewGroups) {
    wait_for_copies<2>();
  } else if (fault != Fault::kNoWait) {
    wait_for_copies<1>();
  }

  const int shift = fault == Fault::kReadBeyond ? kFloats : 0;
  const int misaligned = fault == Fault::kMisalignedRead && thread == 0 ? 2 : 0;
  const float x = load_global(reinterpret_cast<const float*>(
      reinterpret_cast<const char*>(args.in + thread + shift) + misaligned));
  if (fault == Fault::kSharedBeyond) {
    store_shared<float>(place(memory, thread + 2 * kFloats), x);
  }
  if (fault == Fault::kMisalignedShared) {
    store_shared<float>(place(memory, thread) + 2, x);
  }
  if (fault == Fault::kSharedWrapsAround) {
    load_shared<float4>(0xfffffff0u);
  }
  if (fault != Fault::kUnwrittenShared) {
    store_shared<float>(place(memory, thread), x);
  }
  if (fault == Fault::kStoreOverCopy && copies) {
    copy_async<4>(place(copied, thread), args.in, true);
    store_shared<float>(place(copied, thread), x);
  }
  if (fault == Fault::kTwoWriters) {
    store_shared<float>(memory, x);
  }

  if (fault == Fault::kTwoBarriers) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault != Fault::kNoBarrier) {
    __syncthreads();
  }
  const float near = load_shared<float>(place(memory, neighbour));
  const float far = load_shared<float>(place(copied, neighbour));
  if (fault == Fault::kCopyOverRead && copies) {
    copy_async<16>(place(copied, thread), args.in + thread, true);
  }
  if (fault != Fault::kNoBarrierBeforeWrite) {
    __syncthreads();
  }
  store_shared<float>(place(memory, thread), near + far);

  if (fault == Fault::kReadOfOutput) {
    load_global(args.out + thread);
  }
  if (fault == Fault::kWriteToInput) {
    store_global(const_cast<float*>(args.in) + thread, x);
  }
  const int to = fault == Fault::kWriteBeyond ? thread + kFloats : thread;
  store_global(args.out + to, load_shared<float>(place(memory, thread)));
  if (fault == Fault::kSecondWrite && thread == 7) {
    store_global(args.out + thread, x);
  }
  if (fault == Fault::kSkippedBarrier && thread != 5) {
    __syncthreads();
  }
}

// The sum of eight numbers times two, by the tensor cores; every number is the first input.
__global__ void multiply_kernel(const Args args) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t x = float_bits(load_global(args.in));
  const uint32_t rounded = args.fault == Fault::kUnrounded ? x : round_to_tf32(x);
  const uint32_t a[4] = {rounded, rounded, rounded, rounded};
  const uint32_t two = float_bits(2.0f);
  float sum[4] = {};
  if (args.fault != Fault::kSkippedInstruction || lane != 3) {
    multiply_add<float>(sum, a, two, two);
  }
  if (args.fault == Fault::kDifferentInstructions) {
    if (lane == 3) {
      multiply_add<Half>(sum, a, two, two);
    } else {
      multiply_add<float>(sum, a, two, two);
    }
  }
  store_global(args.out + threadIdx.x, sum[0]);
}

}  // namespace

void run_broken(Fault fault, const float* in, float* out) {
  const Args args{in, out, fault};
  const bool multiplies = fault == Fault::kUnrounded || fault == Fault::kSkippedInstruction ||
                          fault == Fault::kDifferentInstructions || fault == Fault::kNoneOfProduct;
  const int64_t rows = fault == Fault::kTooManyBlocks ? 65536 : 1;
  const int threads = fault == Fault::kTooManyThreads ? 1056 : kThreads;
  const int bytes = fault == Fault::kTooMuchShared ? 227 * 1024 + 16 : 2 * kFloats * 4;
  launch_kernel(multiplies ? multiply_kernel : copy_kernel, {1, rows}, threads, bytes, 0, nullptr,
                multiplies ? "multiply_kernel" : "copy_kernel", args);
}

}  // namespace fastvit

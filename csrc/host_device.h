// SPDX-License-Identifier: Apache-2.0
#pragma once

// For what the processor's code and the GPU's share.
#ifdef __CUDACC__
#define FASTVIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTVIT_HOST_DEVICE inline
#endif

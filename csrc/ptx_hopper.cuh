// SPDX-License-Identifier: Apache-2.0
// The instructions of sm_90a that the Hopper kernel uses, see ptx.cuh: barriers in shared memory,
// copies of whole tiles by the tensor memory accelerator (TMA), and products by warpgroups (wgmma).
#pragma once

#include "ptx.cuh"

// What describes a matrix in global memory to the TMA; made on the host, see tensor_map.h.
#ifdef FASTVIT_EMULATED
#include "emulated_hopper.h"
#else

#include <cuda.h>

namespace fastvit {

using TensorMap = CUtensorMap;

// A barrier is 8 bytes of shared memory. It completes a phase when `count` threads have arrived and
// all bytes that were announced have come; the phases are told apart by their parity.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes the barriers known to the TMA; all threads meet afterwards.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that the TMA will bring.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies the box of `map` that begins at element `column` of row `row`; zeros beyond the matrix.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What this thread wrote to shared memory may be read by wgmma once others learn of it.
__device__ __forceinline__ void publish_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Waits for the `threads` threads that name the same barrier, 1 to 15.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers of each thread of this warpgroup from here on.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Before the first product, and after registers of the sums were touched.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until no more than kGroups of the latest groups are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// sum += a bᵀ for a warpgroup's 64 rows of a and kColumns rows of b, 32 bytes of each, described as
// by tile_descriptor.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_add_tiles(float (&sum)[kColumns / 8][4], uint64_t a,
                                                   uint64_t b);

}  // namespace fastvit

#include "wgmma.cuh"

#endif

namespace fastvit {

// A tile of rows of 128 bytes whose chunk c of row r lies at place c ^ (r % 8), as the TMA and
// wgmma have it; it begins at a multiple of 1024 bytes. Groups of 8 rows are 1024 bytes apart; the
// other offset, 1, means nothing with this swizzle. The hardware swizzles by the bits of addresses,
// so the 32 bytes of a product may also begin 32, 64 or 96 bytes into the rows.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t tile) {
  constexpr uint64_t kGroupBytes = 1024, kSwizzle128 = 1;
  return (uint64_t{tile} & 0x3ffff) >> 4 | uint64_t{1} << 16 | (kGroupBytes >> 4) << 32 |
         kSwizzle128 << 62;
}

}  // namespace fastvit

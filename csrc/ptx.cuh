// SPDX-License-Identifier: Apache-2.0
// The machine instructions that the kernels use beyond C++: one function each, so that the same
// kernels run in the emulator of the tests (tests/emulator), which has functions of these names.
//
// Shared memory is addressed by 32-bit offsets. All asynchronous copies of a thread between two
// calls of commit_copies form a group.
#pragma once

#include "element.h"

#ifdef FASTVIT_EMULATED
#include "emulated_ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastvit {

// Where the dynamic shared memory of the block begins.
__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

template <typename T>
__device__ __forceinline__ T load_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

template <typename T>
__device__ __forceinline__ void store_shared(uint32_t address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

template <typename T>
__device__ __forceinline__ T load_global(const T* pointer) {
  return __ldg(pointer);
}
template <>
__device__ __forceinline__ Half load_global(const Half* pointer) {
  return {__ldg(&pointer->bits)};
}
template <>
__device__ __forceinline__ Bfloat16 load_global(const Bfloat16* pointer) {
  return {__ldg(&pointer->bits)};
}

template <typename T>
__device__ __forceinline__ void store_global(T* pointer, T value) {
  *pointer = value;
}

// Starts a copy of kBytes (4 or 16) from global to shared memory; zeros unless `valid`. Copies of
// 16 bytes pass by the first-level cache: nobody else on the multiprocessor reads the same.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 16);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until no more than kGroups of the latest groups of this thread are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane l passes the address of row l % 8 of matrix l / 8 and
// receives, of each, 4 bytes of row l / 4 from byte 4 (l % 4).
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// The same transposed, as 8 x 8 matrices of 16-bit elements.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// sum += a b for a of 16 x 32 bytes and b of 8 x 32 bytes (transposed), by the tensor cores.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<Half>(float (&sum)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<Bfloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// float as tf32, to which the operands must have been rounded.
template <>
__device__ __forceinline__ void multiply_add<float>(float (&sum)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t round_to_tf32(uint32_t x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(x));
  return rounded;
}

__device__ __forceinline__ void stop() { asm volatile("trap;"); }

// The same number, of which the compiler does not know that it is the same at every turn of a loop:
// what follows from it is computed again, where it would otherwise fill registers.
__device__ __forceinline__ int32_t anew(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// One element rounded, and two packed into 32 bits, the first in the lower half.
template <typename T>
__device__ __forceinline__ T round_element(float x);
template <>
__device__ __forceinline__ float round_element(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half round_element(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ Bfloat16 round_element(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float first, float second) {
  const __half2 packed = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&packed);
}
template <>
__device__ __forceinline__ uint32_t pack<Bfloat16>(float first, float second) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

__device__ __forceinline__ float element_value(float x) { return x; }
__device__ __forceinline__ float element_value(Half x) {
  return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ float element_value(Bfloat16 x) { return x.value(); }

}  // namespace fastvit

#endif

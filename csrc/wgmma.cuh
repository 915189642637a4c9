// SPDX-License-Identifier: Apache-2.0
// multiply_add_tiles of ptx_hopper.cuh: the instruction names each of its 96 registers.
#pragma once

#define FASTVIT_WGMMA_REGISTERS                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, " \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTVIT_WGMMA_SUMS(sum)                                                                 \
  "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]),          \
      "+f"(sum[1][1]), "+f"(sum[1][2]), "+f"(sum[1][3]), "+f"(sum[2][0]), "+f"(sum[2][1]),      \
      "+f"(sum[2][2]), "+f"(sum[2][3]), "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]),      \
      "+f"(sum[3][3]), "+f"(sum[4][0]), "+f"(sum[4][1]), "+f"(sum[4][2]), "+f"(sum[4][3]),      \
      "+f"(sum[5][0]), "+f"(sum[5][1]), "+f"(sum[5][2]), "+f"(sum[5][3]), "+f"(sum[6][0]),      \
      "+f"(sum[6][1]), "+f"(sum[6][2]), "+f"(sum[6][3]), "+f"(sum[7][0]), "+f"(sum[7][1]),      \
      "+f"(sum[7][2]), "+f"(sum[7][3]), "+f"(sum[8][0]), "+f"(sum[8][1]), "+f"(sum[8][2]),      \
      "+f"(sum[8][3]), "+f"(sum[9][0]), "+f"(sum[9][1]), "+f"(sum[9][2]), "+f"(sum[9][3]),      \
      "+f"(sum[10][0]), "+f"(sum[10][1]), "+f"(sum[10][2]), "+f"(sum[10][3]), "+f"(sum[11][0]), \
      "+f"(sum[11][1]), "+f"(sum[11][2]), "+f"(sum[11][3]), "+f"(sum[12][0]), "+f"(sum[12][1]), \
      "+f"(sum[12][2]), "+f"(sum[12][3]), "+f"(sum[13][0]), "+f"(sum[13][1]), "+f"(sum[13][2]), \
      "+f"(sum[13][3]), "+f"(sum[14][0]), "+f"(sum[14][1]), "+f"(sum[14][2]), "+f"(sum[14][3]), \
      "+f"(sum[15][0]), "+f"(sum[15][1]), "+f"(sum[15][2]), "+f"(sum[15][3]), "+f"(sum[16][0]), \
      "+f"(sum[16][1]), "+f"(sum[16][2]), "+f"(sum[16][3]), "+f"(sum[17][0]), "+f"(sum[17][1]), \
      "+f"(sum[17][2]), "+f"(sum[17][3]), "+f"(sum[18][0]), "+f"(sum[18][1]), "+f"(sum[18][2]), \
      "+f"(sum[18][3]), "+f"(sum[19][0]), "+f"(sum[19][1]), "+f"(sum[19][2]), "+f"(sum[19][3]), \
      "+f"(sum[20][0]), "+f"(sum[20][1]), "+f"(sum[20][2]), "+f"(sum[20][3]), "+f"(sum[21][0]), \
      "+f"(sum[21][1]), "+f"(sum[21][2]), "+f"(sum[21][3]), "+f"(sum[22][0]), "+f"(sum[22][1]), \
      "+f"(sum[22][2]), "+f"(sum[22][3]), "+f"(sum[23][0]), "+f"(sum[23][1]), "+f"(sum[23][2]), \
      "+f"(sum[23][3])

// The last operands: that the sums are added to, signs of a and b, and that neither is transposed.
#define FASTVIT_WGMMA(T, type)                                                                    \
  template <>                                                                                     \
  __device__ __forceinline__ void multiply_add_tiles<T, 192>(float (&sum)[24][4], uint64_t a,     \
                                                             uint64_t b) {                        \
    asm volatile(                                                                                 \
        "{\n"                                                                                     \
        ".reg .pred add;\n"                                                                       \
        "setp.eq.b32 add, 0, 0;\n"                                                                \
        "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {" FASTVIT_WGMMA_REGISTERS \
        "}, %96, %97, add, 1, 1, 0, 0;\n"                                                         \
        "}"                                                                                       \
        : FASTVIT_WGMMA_SUMS(sum)                                                                 \
        : "l"(a), "l"(b));                                                                        \
  }

namespace fastvit {

FASTVIT_WGMMA(Half, "f16")
FASTVIT_WGMMA(Bfloat16, "bf16")

}  // namespace fastvit

#undef FASTVIT_WGMMA
#undef FASTVIT_WGMMA_SUMS
#undef FASTVIT_WGMMA_REGISTERS

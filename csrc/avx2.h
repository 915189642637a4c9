// SPDX-License-Identifier: Apache-2.0
// Wheels are compiled for any x86-64. Functions marked FASTVIT_AVX2 are compiled for newer
// processors, and called where has_avx2().
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FASTVIT_HAS_AVX2_CODE 1
#define FASTVIT_AVX2 __attribute__((target("avx2")))
namespace fastvit {
inline bool has_avx2() { return __builtin_cpu_supports("avx2"); }
}  // namespace fastvit
#else
#define FASTVIT_HAS_AVX2_CODE 0
#define FASTVIT_AVX2
namespace fastvit {
inline bool has_avx2() { return false; }
}  // namespace fastvit
#endif

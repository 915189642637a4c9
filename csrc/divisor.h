// SPDX-License-Identifier: Apache-2.0
// Division by a number that is known only at run time but the same for many dividends: a multiply
// and a shift, where the GPU's own integer division takes some twenty instructions.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastvit {

// For dividends and divisors from 0 (divisors: 1) to 2^31 - 1.
//
// With s = ceil(log2 d) and m = floor(2^32 (2^s - d) / d) + 1, the quotient n / d is
// (hi(m n) + n) >> s, where hi is the upper half of the 64-bit product (Granlund and Montgomery
// 1994, figure 4.1). hi(m n) + n fits 32 bits because n < 2^31.
struct Divisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) {
      ++shift;
    }
    const uint64_t excess = (uint64_t{1} << shift) - divisor;
    multiplier = static_cast<uint32_t>((excess << 32) / divisor + 1);
  }

  FASTVIT_HOST_DEVICE int32_t quotient(int32_t n) const {
    const auto dividend = static_cast<uint32_t>(n);
    const auto high = static_cast<uint32_t>((uint64_t{multiplier} * dividend) >> 32);
    return static_cast<int32_t>((high + dividend) >> shift);
  }
  FASTVIT_HOST_DEVICE int32_t remainder(int32_t n, int32_t quotient) const {
    return n - quotient * static_cast<int32_t>(divisor);
  }
};

}  // namespace fastvit

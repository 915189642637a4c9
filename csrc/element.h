// SPDX-License-Identifier: Apache-2.0
// The 16-bit floating types as the processor's code and the GPU's share them: bits with conversions
// from and to float, rounding to nearest even as both do.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastvit {

FASTVIT_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTVIT_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Bfloat16 {
  uint16_t bits;

  FASTVIT_HOST_DEVICE static Bfloat16 round(float x) {
    const uint32_t b = float_bits(x);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    // A NaN whose payload the sum would carry away stays one.
    const bool nan = (b & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? (b >> 16) | 0x40u : rounded)};
  }
  FASTVIT_HOST_DEVICE float value() const {
    return float_from_bits(static_cast<uint32_t>(bits) << 16);
  }
};

struct Half {
  uint16_t bits;

  FASTVIT_HOST_DEVICE static Half round(float x) {
    const uint32_t b = float_bits(x);
    const uint32_t sign = (b >> 16) & 0x8000u;
    const uint32_t magnitude = b & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      return {static_cast<uint16_t>(sign | 0x7e00u)};
    }
    if (magnitude >= 0x477ff000u) {  // 65520, from where it rounds to infinity
      return {static_cast<uint16_t>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {
      // Below 2^-14 halves are multiples of 2^-24, the ulp of floats in [0.5, 1).
      const uint32_t sum = float_bits(float_from_bits(magnitude) + 0.5f);
      return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
  }
  FASTVIT_HOST_DEVICE float value() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude < 0x0400u) {
      // A multiple of 2^-24, exact in float.
      const float small = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
      return float_from_bits(sign | float_bits(small));
    }
    const uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
    return float_from_bits(sign | ((magnitude << 13) + exponent));
  }
};

template <typename T>
FASTVIT_HOST_DEVICE T round_to(float x) {
  return T::round(x);
}
template <>
FASTVIT_HOST_DEVICE float round_to<float>(float x) {
  return x;
}

template <typename T>
FASTVIT_HOST_DEVICE float to_float(T x) {
  return x.value();
}
template <>
FASTVIT_HOST_DEVICE float to_float(float x) {
  return x;
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
// What the launches of the patch embedding's kernels share.
#pragma once

#include <type_traits>

#include "cuda_support.h"
#include "product.cuh"

namespace fastvit {

// Calls body(constant, pixel), where constant::value is the arithmetic and pixel a value of the
// type of the pixels at hand.
template <typename Body>
void visit(Arithmetic arithmetic, bool raw, const Body& body) {
  const auto with = [&](auto constant) {
    constexpr Arithmetic kArithmetic = decltype(constant)::value;
    if (raw) {
      body(constant, uint8_t{});
    } else {
      body(constant, typename ElementOf<kArithmetic>::type{});
    }
  };
  switch (arithmetic) {
    case Arithmetic::kHalf:
      return with(std::integral_constant<Arithmetic, Arithmetic::kHalf>{});
    case Arithmetic::kBfloat16:
      return with(std::integral_constant<Arithmetic, Arithmetic::kBfloat16>{});
    case Arithmetic::kTf32:
      return with(std::integral_constant<Arithmetic, Arithmetic::kTf32>{});
    case Arithmetic::kIeee:
      return with(std::integral_constant<Arithmetic, Arithmetic::kIeee>{});
  }
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many stages as leave room for `blocks` blocks on a multiprocessor; where none do, for one.
template <typename Bytes>
int choose_stages(const DeviceLimits& limits, int blocks, const Bytes& bytes) {
  // The system keeps 1 KB of each block's shared memory.
  const auto fit = [&](int stages, int count) {
    return bytes(stages) <= limits.shared_bytes_of_block &&
           count * (bytes(stages) + 1024) <= limits.shared_bytes_of_multiprocessor;
  };
  for (int count : {blocks, 1}) {
    for (int stages : {4, 3, 2}) {
      if (fit(stages, count)) {
        return stages;
      }
    }
  }
  return 2;
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
// Describes a matrix to Hopper's tensor memory accelerator.
#pragma once

#ifdef FASTVIT_EMULATED
#include "emulated_hopper.h"
#else

#include <cudaTypedefs.h>

#include <cstdint>

#include "cuda_support.h"

namespace fastvit {

// A matrix (rows, columns) of 16-bit elements, its rows `pitch` elements apart, of which boxes of
// `box_rows` rows and 128 bytes are copied in the places that tile_descriptor of ptx_hopper.cuh
// describes.
inline CUtensorMap make_tensor_map(const void* data, bool bfloat16, int64_t rows, int64_t columns,
                                   int64_t pitch, int box_rows) {
  static const auto encode =
      driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", 12000);
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(pitch) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: expected success, got error " +
                             std::to_string(status));
  }
  return map;
}

}  // namespace fastvit

#endif

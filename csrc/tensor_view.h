// SPDX-License-Identifier: Apache-2.0
// A torch tensor as the kernels see it, read through DLPack's C exchange API (DLPack 1.3), so that
// the module needs neither libtorch nor its headers.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "dlpack.h"
#include "element.h"

namespace fastvit {

// The DLPack name of a C++ element type.
template <typename T>
struct ElementType;
template <>
struct ElementType<float> {
  static constexpr DLDataType value{kDLFloat, 32, 1};
};
template <>
struct ElementType<double> {
  static constexpr DLDataType value{kDLFloat, 64, 1};
};
template <>
struct ElementType<Half> {
  static constexpr DLDataType value{kDLFloat, 16, 1};
};
template <>
struct ElementType<Bfloat16> {
  static constexpr DLDataType value{kDLBfloat, 16, 1};
};
template <>
struct ElementType<uint8_t> {
  static constexpr DLDataType value{kDLUInt, 8, 1};
};

// Borrows the memory of a tensor: valid while the Python call that passed the tensor lasts, also
// with the GIL released, since nothing here refers to Python objects once constructed.
//
// DLPack does not report the lazy conjugate and negative bits. Only the implementation of a
// registered op may build a view: there the dispatcher has already resolved them.
//
// Each expect_* throws TypeError (dtype) or ValueError (the rest) with a message
// "name: expected ..., got ...".
class TensorView {
 public:
  static constexpr int kMaxRank = 8;

  // Throws TypeError where `tensor` has no DLPack C API, and ValueError where it holds no memory
  // that a kernel could read (meta, fake and sparse tensors).
  TensorView(pybind11::handle tensor, const char* name);

  const std::string& name() const { return name_; }
  int rank() const { return rank_; }
  int64_t size(int dim) const { return shape_[dim]; }
  int64_t stride(int dim) const { return strides_[dim]; }  // in elements
  int64_t numel() const;
  DLDevice device() const { return device_; }
  DLDataType dtype() const { return dtype_; }
  bool is_cuda() const { return device_.device_type == kDLCUDA; }

  void expect_dtype(std::initializer_list<DLDataType> allowed) const;
  void expect_rank(int rank) const;
  void expect_shape(std::initializer_list<int64_t> shape) const;
  void expect_contiguous() const;
  void expect_cpu() const;
  void expect_cuda() const;
  void expect_device_of(const TensorView& other) const;
  void expect_like(const TensorView& other) const;  // the same dtype, on the same device

  // The elements, of the dtype that was checked.
  void* raw_data() const { return data_; }

  // The elements; throws std::logic_error if the dtype was not checked to be T beforehand.
  template <typename T>
  T* data() const {
    if (!has_dtype(ElementType<T>::value)) {
      throw std::logic_error(name_ + ": read with an element type that was not checked");
    }
    return static_cast<T*>(data_);
  }

  // The stream on which the tensor's framework queues work for the tensor's device (null on CPU).
  void* current_stream() const;

  bool has_dtype(DLDataType dtype) const;

 private:
  std::string shape_text() const;

  std::string name_;
  const DLPackExchangeAPI* api_;
  void* data_;
  DLDevice device_;
  DLDataType dtype_;
  int rank_;
  std::array<int64_t, kMaxRank> shape_;
  std::array<int64_t, kMaxRank> strides_;
};

// Calls `body` with a null T*, where T is the C++ type of a view checked to be float32 or float64.
template <typename Body>
void visit_float_type(const TensorView& view, Body&& body) {
  if (view.dtype().bits == ElementType<double>::value.bits) {
    std::forward<Body>(body)(static_cast<double*>(nullptr));
  } else {
    std::forward<Body>(body)(static_cast<float*>(nullptr));
  }
}

// The same for a view checked to be float32, float16 or bfloat16.
template <typename Body>
void visit_token_type(const TensorView& view, Body&& body) {
  if (view.has_dtype(ElementType<Half>::value)) {
    std::forward<Body>(body)(static_cast<Half*>(nullptr));
  } else if (view.has_dtype(ElementType<Bfloat16>::value)) {
    std::forward<Body>(body)(static_cast<Bfloat16*>(nullptr));
  } else {
    std::forward<Body>(body)(static_cast<float*>(nullptr));
  }
}

}  // namespace fastvit

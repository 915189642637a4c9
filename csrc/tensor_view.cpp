// SPDX-License-Identifier: Apache-2.0
#include "tensor_view.h"

namespace py = pybind11;

namespace fastvit {
namespace {

[[noreturn]] void throw_value_error(const std::string& name, const std::string& expected,
                                    const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

[[noreturn]] void throw_type_error(const std::string& name, const std::string& expected,
                                   const std::string& got) {
  throw py::type_error(name + ": expected " + expected + ", got " + got);
}

// As torch prints a shape: "(2, 3)", "(4,)", "()".
template <typename Sizes>
std::string tuple_text(const Sizes& sizes, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) {
    text += (i ? ", " : "") + std::to_string(*(sizes.begin() + i));
  }
  return text + (count == 1 ? ",)" : ")");
}

std::string dtype_text(DLDataType dtype) {
  const std::string bits = std::to_string(dtype.bits);
  switch (dtype.code) {
    case kDLInt:
      return "int" + bits;
    case kDLUInt:
      return "uint" + bits;
    case kDLFloat:
      return "float" + bits;
    case kDLBfloat:
      return "bfloat" + bits;
    case kDLComplex:
      return "complex" + bits;
    case kDLBool:
      return "bool";
    default:
      return "DLPack type code " + std::to_string(dtype.code) + " of " + bits + " bits";
  }
}

std::string device_text(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
      return "cpu";
    case kDLCUDA:
      return "cuda:" + std::to_string(device.device_id);
    default:
      return "DLPack device type " + std::to_string(device.device_type);
  }
}

// Takes the pending Python error. Of torch's texts the first line: a stack trace follows.
std::string pending_error_text() {
  const std::string text = py::str(py::error_already_set().value());
  return text.substr(0, text.find('\n'));
}

// The table of C functions that the tensor's class publishes. Looked up on the class at each call:
// a cache would save 0.1 us and have to own the class.
const DLPackExchangeAPI* exchange_api(py::handle tensor, const std::string& name) {
  const py::handle type = py::type::handle_of(tensor);
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) {
    throw_type_error(name, "a torch.Tensor (of torch 2.11 or later)",
                     py::str(type.attr("__qualname__")));
  }
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (pointer == nullptr) {
    throw py::error_already_set();
  }
  // Newer major versions may chain to the older ones that they still serve.
  auto* header = static_cast<const DLPackExchangeAPIHeader*>(pointer);
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION) {
    header = header->prev_api;
  }
  auto* api = reinterpret_cast<const DLPackExchangeAPI*>(header);
  if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr) {
    throw_type_error(name,
                     "a tensor class that lends its memory through DLPack " +
                         std::to_string(DLPACK_MAJOR_VERSION) + ".x",
                     py::str(type.attr("__qualname__")));
  }
  return api;
}

}  // namespace

TensorView::TensorView(py::handle tensor, const char* name)
    : name_(name), api_(exchange_api(tensor, name_)) {
  DLTensor borrowed;
  if (api_->dltensor_from_py_object_no_sync(tensor.ptr(), &borrowed) != 0) {
    // Sparse, meta and the like.
    throw_value_error(name_, "a dense tensor with memory behind it",
                      "\"" + pending_error_text() + "\" from its framework");
  }
  if (borrowed.ndim > kMaxRank) {
    throw_value_error(name_, "at most " + std::to_string(kMaxRank) + " dimensions",
                      std::to_string(borrowed.ndim));
  }
  device_ = borrowed.device;
  dtype_ = borrowed.dtype;
  rank_ = borrowed.ndim;
  for (int i = 0; i < rank_; ++i) {
    shape_[i] = borrowed.shape[i];
    strides_[i] = borrowed.strides[i];
  }
  if (borrowed.data == nullptr) {
    if (numel() != 0) {
      throw_value_error(name_, "a dense tensor with memory behind it",
                        "one of shape " + shape_text() + " without any (a fake tensor?)");
    }
    data_ = nullptr;
    return;
  }
  data_ = static_cast<char*>(borrowed.data) + borrowed.byte_offset;
  const uintptr_t bytes = (dtype_.bits * dtype_.lanes + 7) / 8;
  if (reinterpret_cast<uintptr_t>(data_) % bytes != 0) {
    throw_value_error(name_, "memory aligned to its " + std::to_string(bytes) + "-byte elements",
                      "a misaligned address");
  }
}

int64_t TensorView::numel() const {
  int64_t count = 1;
  for (int i = 0; i < rank_; ++i) {
    count *= shape_[i];
  }
  return count;
}

bool TensorView::has_dtype(DLDataType dtype) const {
  return dtype_.code == dtype.code && dtype_.bits == dtype.bits && dtype_.lanes == dtype.lanes;
}

std::string TensorView::shape_text() const { return tuple_text(shape_, rank_); }

void TensorView::expect_dtype(std::initializer_list<DLDataType> allowed) const {
  std::string names;
  for (DLDataType dtype : allowed) {
    if (has_dtype(dtype)) {
      return;
    }
    names += (names.empty() ? "" : " or ") + dtype_text(dtype);
  }
  throw_type_error(name_, names, dtype_text(dtype_));
}

void TensorView::expect_rank(int rank) const {
  if (rank_ != rank) {
    throw_value_error(name_, std::to_string(rank) + " dimensions", "shape " + shape_text());
  }
}

void TensorView::expect_shape(std::initializer_list<int64_t> shape) const {
  bool equal = rank_ == static_cast<int>(shape.size());
  for (int i = 0; equal && i < rank_; ++i) {
    equal = shape_[i] == shape.begin()[i];
  }
  if (!equal) {
    throw_value_error(name_, "shape " + tuple_text(shape, static_cast<int>(shape.size())),
                      shape_text());
  }
}

void TensorView::expect_contiguous() const {
  if (numel() == 0) {
    return;
  }
  int64_t due = 1;
  for (int i = rank_ - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != due) {
      throw_value_error(name_, "a contiguous tensor",
                        "shape " + shape_text() + " with strides " + tuple_text(strides_, rank_));
    }
    due *= shape_[i];
  }
}

void TensorView::expect_cpu() const {
  if (device_.device_type != kDLCPU) {
    throw_value_error(name_, "a tensor on cpu", device_text(device_));
  }
}

void TensorView::expect_cuda() const {
  if (!is_cuda()) {
    throw_value_error(name_, "a tensor on cuda", device_text(device_));
  }
}

void TensorView::expect_like(const TensorView& other) const {
  if (!has_dtype(other.dtype_)) {
    throw_type_error(name_, dtype_text(other.dtype_) + " like " + other.name_, dtype_text(dtype_));
  }
  expect_device_of(other);
}

void TensorView::expect_device_of(const TensorView& other) const {
  if (device_.device_type != other.device_.device_type ||
      device_.device_id != other.device_.device_id) {
    throw_value_error(name_, "a tensor on " + device_text(other.device_) + " like " + other.name_,
                      device_text(device_));
  }
}

void* TensorView::current_stream() const {
  void* stream = nullptr;
  if (api_->current_work_stream(device_.device_type, device_.device_id, &stream) != 0) {
    throw std::runtime_error(name_ + ": no current stream for " + device_text(device_) + ": " +
                             pending_error_text());
  }
  return stream;
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
#include "uint8_fold.h"

#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <vector>

#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastvit {

FoldedChannel fold_channel(double mean, double std) {
  return {1.0 / (255.0 * std), std::nearbyint(255.0 * mean) - 255.0 * mean};
}

namespace {

// Sums in double and in a fixed order; the independent lanes let the compiler vectorise.
template <typename T>
double fold_row(const T* weight, T* folded, int64_t area, FoldedChannel channel) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= area; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double w = weight[i + lane];
      folded[i + lane] = static_cast<T>(channel.weight(w));
      lanes[lane] += w;
    }
  }
  double sum = 0;
  for (; i < area; ++i) {
    folded[i] = static_cast<T>(channel.weight(weight[i]));
    sum += weight[i];
  }
  for (double lane : lanes) {
    sum += lane;
  }
  return sum;
}

template <typename T>
void fold_on_cpu(const FoldArgs<T>& args, const FoldedChannel* channels) {
  for (int64_t d = 0; d < args.outputs; ++d) {
    double bias = args.bias ? static_cast<double>(args.bias[d]) : 0.0;
    for (int64_t c = 0; c < args.channels; ++c) {
      const int64_t row = (d * args.channels + c) * args.area;
      const double sum =
          fold_row(args.weight + row, args.folded_weight + row, args.area, channels[c]);
      bias += channels[c].bias(sum);
    }
    args.folded_bias[d] = static_cast<T>(bias);
  }
}

// One double for each image channel, out of any Python sequence of numbers.
std::vector<double> channel_values(py::handle values, const char* name, int64_t channels) {
  std::vector<double> result;
  try {
    // Converted here, not by the binding, whose message would print the tensors in full.
    result = values.cast<std::vector<double>>();
  } catch (const py::cast_error&) {
    throw py::type_error(std::string(name) + ": expected a sequence of numbers, got " +
                         std::string(py::str(py::type::handle_of(values).attr("__qualname__"))));
  }
  if (static_cast<int64_t>(result.size()) != channels) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(channels) +
                          " values, one for each image channel of weight, got " +
                          std::to_string(result.size()));
  }
  return result;
}

std::vector<FoldedChannel> fold_channels(py::handle means, py::handle stds, int64_t channels) {
  const std::vector<double> mean = channel_values(means, "mean", channels);
  const std::vector<double> std = channel_values(stds, "std", channels);
  std::vector<FoldedChannel> folded;
  folded.reserve(mean.size());
  for (size_t c = 0; c < mean.size(); ++c) {
    if (std[c] == 0) {
      throw py::value_error("std: expected values other than 0, got 0 for channel " +
                            std::to_string(c));
    }
    folded.push_back(fold_channel(mean[c], std[c]));
  }
  return folded;
}

void expect_cuda_can_fold(const TensorView& weight) {
#if FASTVIT_WITH_CUDA
  if (weight.size(1) > kMaxDeviceFoldChannels) {
    throw py::value_error(weight.name() + ": expected at most " +
                          std::to_string(kMaxDeviceFoldChannels) +
                          " image channels on a GPU, got " + std::to_string(weight.size(1)));
  }
#else
  throw std::runtime_error(weight.name() +
                           ": expected a tensor on cpu, since this build of fastvit has no CUDA "
                           "code, got cuda:" +
                           std::to_string(weight.device().device_id) +
                           "; install again with FASTVIT_CUDA=1 where there is an nvcc");
#endif
}

void fold_uint8(py::handle weight_tensor,      // [D, C, ph, pw], float32 or float64
                py::handle bias_tensor,        // [D], or None
                py::handle mean,               // [C] numbers
                py::handle std,                // [C] numbers
                py::handle out_weight_tensor,  // [D, C, ph, pw]
                py::handle out_bias_tensor) {  // [D]
  const TensorView weight(weight_tensor, "weight");
  const TensorView out_weight(out_weight_tensor, "out_weight");
  const TensorView out_bias(out_bias_tensor, "out_bias");
  std::optional<TensorView> bias;
  if (!bias_tensor.is_none()) {
    bias.emplace(bias_tensor, "bias");
  }

  weight.expect_dtype({ElementType<float>::value, ElementType<double>::value});
  weight.expect_cpu_or_cuda();
  weight.expect_rank(4);
  weight.expect_contiguous();
  const auto expect_fit = [&weight](const TensorView& view, std::initializer_list<int64_t> shape) {
    view.expect_like(weight);
    view.expect_shape(shape);
    view.expect_contiguous();
  };
  expect_fit(out_weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  expect_fit(out_bias, {weight.size(0)});
  if (bias) {
    expect_fit(*bias, {weight.size(0)});
  }
  const std::vector<FoldedChannel> channels = fold_channels(mean, std, weight.size(1));
  void* stream = nullptr;
  if (weight.is_cuda()) {
    expect_cuda_can_fold(weight);
    stream = weight.current_stream();
  }

  visit_float_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const FoldArgs<T> args{
        weight.data<T>(),
        bias ? bias->data<T>() : nullptr,
        out_weight.data<T>(),
        out_bias.data<T>(),
        weight.size(0),
        weight.size(1),
        weight.size(2) * weight.size(3),
    };
    py::gil_scoped_release release;
#if FASTVIT_WITH_CUDA
    if (weight.is_cuda()) {
      launch_uint8_fold(args, channels.data(), weight.device().device_id, stream);
      return;
    }
#endif
    fold_on_cpu(args, channels.data());
  });
}

}  // namespace

void register_uint8_fold(py::module_& m) {
  m.def("fold_uint8", &fold_uint8, py::arg("weight"), py::arg("bias"), py::arg("mean"),
        py::arg("std"), py::arg("out_weight"), py::arg("out_bias"),
        "Folds the normalisation (u / 255 - mean) / std of uint8 pixels u into a patch "
        "embedding's weight (D, C, ph, pw) and bias (D,) or None. Writes out_weight and out_bias, "
        "to be applied to u - round(255 * mean). All contiguous, all float32 or all float64, on "
        "one device.");
}

}  // namespace fastvit

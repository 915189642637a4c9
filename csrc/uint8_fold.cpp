// SPDX-License-Identifier: Apache-2.0
#include "uint8_fold.h"

#include <cmath>
#include <optional>
#include <vector>

#include "bindings.h"
#include "normalization.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastvit {

FoldedChannel fold_channel(double mean, double std) {
  return {1.0 / (255.0 * std), std::nearbyint(255.0 * mean) - 255.0 * mean};
}

namespace {

template <typename T>
struct FoldArgs {
  const T* weight;   // [outputs, channels, area]
  const T* bias;     // [outputs], or null for no bias
  T* folded_weight;  // [outputs, channels, area]
  T* folded_bias;    // [outputs]
  int64_t outputs;   // rows of the weight
  int64_t channels;  // image channels
  int64_t area;      // pixels of a patch
};

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

std::vector<FoldedChannel> fold_channels(const Normalization& normalization) {
  std::vector<FoldedChannel> folded;
  for (size_t c = 0; c < normalization.mean.size(); ++c) {
    folded.push_back(fold_channel(normalization.mean[c], normalization.std[c]));
  }
  return folded;
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
  weight.expect_cpu();
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
  const std::vector<FoldedChannel> channels = fold_channels(read_normalization(mean, std, weight));

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
    fold_on_cpu(args, channels.data());
  });
}

}  // namespace

void register_uint8_fold(py::module_& m) {
  m.def(
      "fold_uint8", &fold_uint8, py::arg("weight"), py::arg("bias"), py::arg("mean"),
      py::arg("std"), py::arg("out_weight"), py::arg("out_bias"),
      "Folds the normalisation (u / 255 - mean) / std of uint8 pixels u into a patch "
      "embedding's weight (D, C, ph, pw) and bias (D,) or None. Writes out_weight and out_bias, "
      "to be applied to u - round(255 * mean). All contiguous, all float32 or all float64, on the "
      "processor.");
}

}  // namespace fastvit

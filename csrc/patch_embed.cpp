// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of the patch embedding, as Python calls them: tensors are checked, and launched.
#include "patch_embed.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "bindings.h"
#include "normalization.h"
#include "patch_view.h"

namespace py = pybind11;

namespace fastvit {
namespace {

constexpr DLDataType kFloat32 = ElementType<float>::value, kFloat16 = ElementType<Half>::value,
                     kBfloat16 = ElementType<Bfloat16>::value, kUint8 = ElementType<uint8_t>::value;

// The emulator of the tests runs the kernels on tensors of the processor.
void expect_device(const TensorView& view) {
#ifdef FASTVIT_EMULATED
  view.expect_cpu();
#else
  view.expect_cuda();
#endif
}

Arithmetic arithmetic_of(const TensorView& operand, bool tf32) {
  operand.expect_dtype({kFloat32, kFloat16, kBfloat16});
  if (operand.has_dtype(kFloat16)) {
    return Arithmetic::kHalf;
  }
  if (operand.has_dtype(kBfloat16)) {
    return Arithmetic::kBfloat16;
  }
  return tf32 ? Arithmetic::kTf32 : Arithmetic::kIeee;
}

// What uint8 pixels are multiplied by. A weight over 255 std can be subnormal in float16, where
// the pixels stay exact over 256.
float pixel_unit(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kHalf ? 1.0f / 256.0f : 1.0f;
}

// Elements of the operands in 16 bytes.
int chunk_elements(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kHalf || arithmetic == Arithmetic::kBfloat16 ? 8 : 4;
}

bool is_aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

// Whether `count` neighbouring columns, from a multiple of it on, lie together and aligned in every
// patch; their elements have `size` bytes.
bool lie_together(const Pixels& pixels, int count, int64_t size) {
  const PatchGrid& grid = pixels.grid;
  const auto fits = [count](int64_t stride, int64_t steps) {
    return steps <= 1 || stride % count == 0;
  };
  return grid.run() % count == 0 && is_aligned(pixels.data, count * size) &&
         fits(grid.image_stride, grid.images) &&
         fits(grid.channel_stride, grid.interleaved ? 1 : grid.channels) &&
         fits(grid.row_stride, int64_t{grid.patch_height} * grid.grid_rows) &&
         fits(grid.patch_width * grid.pixel_stride, grid.grid_columns);
}

Access pixel_access(const Pixels& pixels, Arithmetic arithmetic, bool raw) {
  const int chunk = chunk_elements(arithmetic);
  const int64_t size = raw ? 1 : 16 / chunk;
  if (lie_together(pixels, chunk, size)) {
    return Access::kChunks;
  }
  // Bytes that do not lie together are converted one by one.
  return !raw && lie_together(pixels, chunk / 4, size) ? Access::kWords : Access::kElements;
}

// The same for the rows of a matrix.
Access row_access(const void* data, int64_t columns, Arithmetic arithmetic,
                  std::initializer_list<int64_t> strides) {
  const int chunk = chunk_elements(arithmetic);
  const auto fits = [&](int count) {
    for (int64_t stride : strides) {
      if (stride % count != 0) {
        return false;
      }
    }
    return columns % count == 0 && is_aligned(data, 16 / chunk * count);
  };
  return fits(chunk) ? Access::kChunks : fits(chunk / 4) ? Access::kWords : Access::kElements;
}

// Images (B, C, H, W) of the operand's dtype or uint8; mean and std are for the latter alone.
Pixels read_pixels(const TensorView& images, const TensorView& operand, int64_t patch_height,
                   int64_t patch_width, bool interleaved, py::handle mean, py::handle std,
                   Arithmetic arithmetic) {
  images.expect_dtype({operand.dtype(), kUint8});
  images.expect_device_of(operand);
  const bool raw = images.has_dtype(kUint8);
  Pixels pixels{};
  pixels.data = images.raw_data();
  pixels.grid = patch_grid(images, patch_height, patch_width, interleaved);
  pixels.access = pixel_access(pixels, arithmetic, raw);
  pixels.unit = pixel_unit(arithmetic);
  if (pixels.grid.images * pixels.grid.patches() == 0 || pixels.grid.columns() == 0) {
    throw py::value_error("images: expected at least one patch with a channel, got none");
  }
  if (!raw && !(mean.is_none() && std.is_none())) {
    throw py::value_error("mean, std: expected None for images that are not uint8, got numbers");
  }
  if (raw) {
    const Normalization normalization = read_normalization(mean, std, images);
    if (normalization.mean.size() > kMaxPixelChannels) {
      throw py::value_error("images: expected at most " + std::to_string(kMaxPixelChannels) +
                            " channels of uint8 on a GPU, got " +
                            std::to_string(normalization.mean.size()));
    }
    for (size_t c = 0; c < normalization.mean.size(); ++c) {
      pixels.offsets[c] = static_cast<float>(std::nearbyint(255.0 * normalization.mean[c]));
    }
  }
  return pixels;
}

// D, which kernels count by 31 bits.
int32_t read_outputs(const TensorView& view, int dim) {
  if (view.size(dim) > int64_t{1} << 30) {
    throw py::value_error(view.name() + ": expected at most 2^30 outputs, got " +
                          std::to_string(view.size(dim)));
  }
  return static_cast<int32_t>(view.size(dim));
}

// A small tensor of the weight's dtype and device, or null.
const void* read_like(const std::optional<TensorView>& view, const TensorView& weight,
                      std::initializer_list<int64_t> shape) {
  if (!view) {
    return nullptr;
  }
  view->expect_shape(shape);
  view->expect_like(weight);
  view->expect_contiguous();
  return view->raw_data();
}

// The elements from one row of a matrix to the next, which may have gaps between them.
int64_t row_pitch(const TensorView& view) {
  view.expect_rank(2);
  const bool rows_lie_together = view.size(1) == 1 || view.stride(1) == 1;
  if (view.size(0) < 2 || !rows_lie_together || view.stride(0) < view.size(1)) {
    view.expect_contiguous();
    return view.size(1);
  }
  return view.stride(0);
}

void expect_output(const TensorView& view, const TensorView& weight,
                   std::initializer_list<int64_t> shape) {
  read_like(view, weight, shape);
}

// A float32 tensor, whatever the weight's dtype.
float* read_floats(const TensorView& view, const TensorView& weight,
                   std::initializer_list<int64_t> shape) {
  view.expect_dtype({kFloat32});
  view.expect_device_of(weight);
  view.expect_shape(shape);
  view.expect_contiguous();
  return view.data<float>();
}

void patch_embed(py::handle images_tensor, py::handle weight_tensor, py::handle bias_tensor,
                 py::handle pos_tensor, py::handle cls_tensor, py::handle mean, py::handle std,
                 int64_t patch_height, int64_t patch_width, bool interleaved, bool tf32,
                 py::handle out_tensor, std::optional<bool> small_tile, bool hopper) {
  const TensorView images(images_tensor, "images"), weight(weight_tensor, "weight");
  const TensorView out(out_tensor, "out");
  const auto bias = optional_view(bias_tensor, "bias");
  const auto pos = optional_view(pos_tensor, "pos_embed");
  const auto cls = optional_view(cls_tensor, "cls_token");

  expect_device(weight);
  const Arithmetic arithmetic = arithmetic_of(weight, tf32);
  const bool raw = images.has_dtype(kUint8);
  ForwardArgs args{};
  args.pixels =
      read_pixels(images, weight, patch_height, patch_width, interleaved, mean, std, arithmetic);
  const PatchGrid& grid = args.pixels.grid;
  int64_t weight_pitch = grid.columns();
  // Planar images have their columns in the order of a weight (D, C, ph, pw).
  if (weight.rank() == 4 && !interleaved) {
    weight.expect_shape({weight.size(0), grid.channels, grid.patch_height, grid.patch_width});
    weight.expect_contiguous();
  } else {
    weight.expect_rank(2);
    weight.expect_shape({weight.size(0), grid.columns()});
    weight_pitch = row_pitch(weight);
  }
  const int64_t outputs = read_outputs(weight, 0), patches = grid.patches();
  args.weight = weight.raw_data();
  args.weight_access = row_access(args.weight, grid.columns(), arithmetic, {grid.columns()});
  if (bias) {
    args.float_bias = bias->has_dtype(kFloat32);
    args.bias = args.float_bias ? read_floats(*bias, weight, {outputs})
                                : read_like(bias, weight, {outputs});
  }
  args.cls_token = read_like(cls, weight, {1, 1, outputs});
  args.pos_of_class = cls && pos && pos->rank() == 3 && pos->size(1) == patches + 1;
  args.pos_embed = read_like(pos, weight, {1, patches + args.pos_of_class, outputs});
  expect_output(out, weight, {grid.images, patches + (cls ? 1 : 0), outputs});
  args.out = out.raw_data();
  args.outputs = static_cast<int32_t>(outputs);
  const int64_t quad = 64 / chunk_elements(arithmetic);
  args.quads = outputs % 4 == 0 && is_aligned(args.out, quad) && is_aligned(args.pos_embed, quad) &&
               is_aligned(args.bias, args.float_bias ? 16 : quad);

  const int device = weight.device().device_id;
  void* stream = weight.current_stream();
  const bool takes_hopper =
      hopper && outputs != 0 && hopper_takes(args, weight_pitch, arithmetic, device);
  if (!takes_hopper) {
    weight.expect_contiguous();
  }
  py::gil_scoped_release release;
  if (outputs == 0) {
    return;
  }
  if (takes_hopper) {
    launch_patch_embed_hopper(args, weight_pitch, arithmetic, raw, device, stream);
  } else {
    launch_patch_embed(args, arithmetic, raw, small_tile, device, stream);
  }
}

void fold_patch_weight(py::handle weight_tensor, py::handle bias_tensor, py::handle mean,
                       py::handle std, bool interleaved, py::handle folded_tensor,
                       py::handle folded_bias_tensor) {
  const TensorView weight(weight_tensor, "weight"), folded(folded_tensor, "folded");
  const TensorView folded_bias(folded_bias_tensor, "folded_bias");
  const auto bias = optional_view(bias_tensor, "bias");

  expect_device(weight);
  weight.expect_rank(4);
  weight.expect_contiguous();
  const Arithmetic arithmetic = arithmetic_of(weight, false);
  const int64_t outputs = read_outputs(weight, 0);
  WeightFoldArgs args{};
  args.grid = patch_shape(weight, interleaved);
  const Normalization normalization = read_normalization(mean, std, weight);
  if (args.grid.channels > kMaxPixelChannels) {
    throw py::value_error("weight: expected at most " + std::to_string(kMaxPixelChannels) +
                          " channels of uint8 on a GPU, got " + std::to_string(args.grid.channels));
  }
  for (int c = 0; c < args.grid.channels; ++c) {
    args.channels[c] = fold_channel(normalization.mean[c], normalization.std[c]);
  }
  args.weight = weight.raw_data();
  args.bias = read_like(bias, weight, {outputs});
  folded.expect_shape({outputs, args.grid.columns()});
  folded.expect_like(weight);
  args.folded = folded.raw_data();
  args.folded_pitch = row_pitch(folded);
  args.folded_bias = read_floats(folded_bias, weight, {outputs});
  args.outputs = static_cast<int32_t>(outputs);
  args.inverse_unit = 1.0 / pixel_unit(arithmetic);

  const int device = weight.device().device_id;
  void* stream = weight.current_stream();
  py::gil_scoped_release release;
  if (outputs != 0) {
    launch_weight_fold(args, arithmetic, device, stream);
  }
}

void patch_weight_gradient(py::handle images_tensor, py::handle grad_tensor, py::handle mean,
                           py::handle std, py::handle dbias_tensor, int64_t patch_height,
                           int64_t patch_width, bool interleaved, bool tf32,
                           py::handle partial_tensor, py::handle dweight_tensor) {
  const TensorView images(images_tensor, "images"), grad(grad_tensor, "grad");
  const TensorView partial(partial_tensor, "partial"), dweight(dweight_tensor, "dweight");
  const auto dbias = optional_view(dbias_tensor, "dbias");

  expect_device(grad);
  const Arithmetic arithmetic = arithmetic_of(grad, tf32);
  const bool raw = images.has_dtype(kUint8);
  WeightGradientArgs args{};
  args.pixels =
      read_pixels(images, grad, patch_height, patch_width, interleaved, mean, std, arithmetic);
  const PatchGrid& grid = args.pixels.grid;
  grad.expect_rank(3);
  const int64_t outputs = read_outputs(grad, 2);
  grad.expect_shape({grid.images, grid.patches(), outputs});
  if (outputs > 1 && grad.stride(2) != 1) {
    throw py::value_error("grad: expected contiguous rows, got a stride of " +
                          std::to_string(grad.stride(2)));
  }
  partial.expect_rank(3);
  const int64_t splits = partial.size(0), rows = grid.images * grid.patches();
  args.partial = read_floats(partial, grad, {splits, outputs, grid.columns()});
  const int64_t most = std::min<int64_t>(rows, 65535);
  if (splits < 1 || splits > most) {
    throw py::value_error("partial: expected 1 to " + std::to_string(most) + " shares, got " +
                          std::to_string(splits));
  }
  args.grad = grad.raw_data();
  args.grad_image_stride = grad.stride(0);
  args.grad_token_stride = grad.stride(1);
  args.grad_access = row_access(args.grad, outputs, arithmetic, {grad.stride(0), grad.stride(1)});
  args.outputs = static_cast<int32_t>(outputs);
  args.splits = static_cast<int32_t>(splits);
  args.rows_per_split = static_cast<int32_t>((rows + splits - 1) / splits);

  SumArgs sum{};
  sum.partial = args.partial;
  sum.splits = args.splits;
  sum.outputs = args.outputs;
  sum.grid = grid;
  expect_output(dweight, grad, {outputs, grid.columns()});
  sum.dweight = dweight.raw_data();
  if (raw != dbias.has_value()) {
    throw py::value_error(std::string("dbias: expected ") + (raw ? "a tensor" : "None") +
                          ", since the images are " + (raw ? "uint8" : "not uint8"));
  }
  if (raw) {
    sum.dbias = read_floats(*dbias, grad, {outputs});
    sum.inverse_unit = 1.0f / args.pixels.unit;
    const Normalization normalization = read_normalization(mean, std, images);
    for (int c = 0; c < grid.channels; ++c) {
      const FoldedChannel channel = fold_channel(normalization.mean[c], normalization.std[c]);
      sum.shift[c] = static_cast<float>(channel.shift);
      sum.scale[c] = static_cast<float>(channel.scale);
    }
  }

  const int device = grad.device().device_id;
  void* stream = grad.current_stream();
  py::gil_scoped_release release;
  if (outputs != 0) {
    launch_weight_gradient(args, arithmetic, raw, device, stream);
    launch_weight_gradient_sum(sum, arithmetic, device, stream);
  }
}

}  // namespace

void register_patch_embed(py::module_& m) {
  m.def("patch_embed", &patch_embed, py::arg("images"), py::arg("weight"), py::arg("bias"),
        py::arg("pos_embed"), py::arg("cls_token"), py::arg("mean"), py::arg("std"),
        py::arg("patch_height"), py::arg("patch_width"), py::arg("interleaved"), py::arg("tf32"),
        py::arg("out"), py::arg("small_tile") = py::none(), py::arg("hopper") = false,
        "Tokens of images (B, C, H, W), float like weight or uint8, into out (B, N[+1], D). weight "
        "(D, K) has its columns in the order of the patches, or is (D, C, ph, pw) for images that "
        "are not interleaved, and for uint8 is what fold_patch_weight made of it, with bias (D) in "
        "float32 then. For hopper its rows may have gaps. pos_embed (1, N or N+1, D), "
        "cls_token (1, 1, D).");
  m.def("fold_patch_weight", &fold_patch_weight, py::arg("weight"), py::arg("bias"),
        py::arg("mean"), py::arg("std"), py::arg("interleaved"), py::arg("folded"),
        py::arg("folded_bias"),
        "Folds the normalisation of uint8 pixels into weight (D, C, ph, pw) and bias (D) or None: "
        "folded (D, K), its columns in the order of the patches, its rows perhaps with gaps, and "
        "folded_bias (D) in float32.");
  m.def("hopper_has_work", &hopper_has_work, py::arg("rows"), py::arg("outputs"), py::arg("device"),
        "Whether that many patches, of all images, and outputs give every multiprocessor of a CUDA "
        "device a tile of the kernel for compute capability 9.0, which is used only then.");
  m.attr("MOST_PIXEL_CHANNELS") = kMaxPixelChannels;
  m.def("patch_weight_gradient", &patch_weight_gradient, py::arg("images"), py::arg("grad"),
        py::arg("mean"), py::arg("std"), py::arg("dbias"), py::arg("patch_height"),
        py::arg("patch_width"), py::arg("interleaved"), py::arg("tf32"), py::arg("partial"),
        py::arg("dweight"),
        "The gradient of the weight into dweight (D, K), from grad (B, N, D) of the patch tokens. "
        "partial (splits, D, K) in float32 is scratch; dbias (D) in float32 is for uint8.");
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
// Patch tokens with their positions and the class token, on the processor.
#include <pybind11/pybind11.h>

#include <cstring>
#include <optional>

#include "avx2.h"
#include "bindings.h"
#include "parallel.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastvit {
namespace {

// out = x + position; x may be out.
template <typename T>
inline void add(const T* x, const T* position, T* out, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    out[i] = round_to<T>(to_float(x[i]) + to_float(position[i]));
  }
}

// Rounding to 16 bits is three times as fast with AVX2.
template <typename T>
FASTVIT_AVX2 void add_avx2(const T* x, const T* position, T* out, int64_t width) {
  add(x, position, out, width);
}

// out = x + position, or x where there is no position; x may be out.
template <typename T>
void write_token(const T* x, const T* position, T* out, int64_t width) {
  static const bool avx2 = has_avx2();
  if (position == nullptr) {
    if (x != out) {
      std::memcpy(static_cast<void*>(out), x, sizeof(T) * width);
    }
  } else if (avx2) {
    add_avx2(x, position, out, width);
  } else {
    add(x, position, out, width);
  }
}

template <typename T>
struct Tokens {
  const T* x;             // [images, patches, width], images apart by x_stride
  const T* cls_token;     // [width], or null
  const T* positions;     // [patches, width], or null
  const T* cls_position;  // [width], or null
  T* out;                 // [images, patches + (cls_token ? 1 : 0), width]
  int64_t images, patches, width, x_stride;
};

template <typename T>
void place(const Tokens<T>& t, int64_t threads) {
  const int64_t prefix = t.cls_token != nullptr;
  const int64_t length = t.patches + prefix;
  parallel_for(t.images * length, sizeof(T) * t.width, threads, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const int64_t image = m / length, patch = m % length - prefix;
      T* out = t.out + m * t.width;
      if (patch < 0) {
        write_token(t.cls_token, t.cls_position, out, t.width);
      } else {
        write_token(t.x + image * t.x_stride + patch * t.width,
                    t.positions ? t.positions + patch * t.width : nullptr, out, t.width);
      }
    }
  });
}

void expect_gapless_images(const TensorView& x) {
  const bool within = x.size(2) == 1 || x.stride(2) == 1;
  const bool between = x.size(1) == 1 || x.stride(1) == x.size(2);
  if (x.numel() != 0 && !(within && between)) {
    throw py::value_error(x.name() +
                          ": expected the tokens of an image to follow each other, got "
                          "strides " +
                          std::to_string(x.stride(1)) + " and " + std::to_string(x.stride(2)));
  }
}

void place_tokens(py::handle x_tensor,          // [B, N, D]
                  py::handle pos_embed_tensor,  // [1, N, D] or, with a class token, [1, N + 1, D]
                  py::handle cls_token_tensor,  // [1, 1, D]
                  py::handle out_tensor,        // [B, N, D] or, with a class token, [B, N + 1, D]
                  int64_t threads) {
  const TensorView x(x_tensor, "x"), out(out_tensor, "out");
  std::optional<TensorView> pos_embed, cls_token;
  if (!pos_embed_tensor.is_none()) {
    pos_embed.emplace(pos_embed_tensor, "pos_embed");
  }
  if (!cls_token_tensor.is_none()) {
    cls_token.emplace(cls_token_tensor, "cls_token");
  }
  x.expect_dtype(
      {ElementType<float>::value, ElementType<Half>::value, ElementType<Bfloat16>::value});
  x.expect_cpu();
  x.expect_rank(3);
  expect_gapless_images(x);
  const int64_t images = x.size(0), patches = x.size(1), width = x.size(2);
  const auto expect_fit = [&x](const TensorView& view, std::initializer_list<int64_t> shape) {
    view.expect_like(x);
    view.expect_shape(shape);
    view.expect_contiguous();
  };
  expect_fit(out, {images, patches + (cls_token ? 1 : 0), width});
  if (cls_token) {
    expect_fit(*cls_token, {1, 1, width});
  }
  bool positions_of_all = false;
  if (pos_embed) {
    pos_embed->expect_rank(3);
    positions_of_all = cls_token && pos_embed->size(1) == patches + 1;
    expect_fit(*pos_embed, {1, patches + (positions_of_all ? 1 : 0), width});
  }
  if (out.numel() == 0) {
    return;
  }
  visit_token_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* positions = pos_embed ? pos_embed->data<T>() : nullptr;
    const Tokens<T> tokens{
        x.data<T>(),
        cls_token ? cls_token->data<T>() : nullptr,
        positions_of_all ? positions + width : positions,
        positions_of_all ? positions : nullptr,
        out.data<T>(),
        images,
        patches,
        width,
        x.stride(0),
    };
    const py::gil_scoped_release release;
    place(tokens, threads);
  });
}

}  // namespace

void register_place_tokens(py::module_& m) {
  m.def("place_tokens", &place_tokens, py::arg("x"), py::arg("pos_embed"), py::arg("cls_token"),
        py::arg("out"), py::arg("threads"),
        "Writes out (B, N[+1], D), contiguous: the class token (1, 1, D), or None, then tokens x "
        "(B, N, D); with the positions (1, N, D), of the tokens, or (1, N + 1, D), of all, or None "
        "added in float32. x may be where its tokens go in out, otherwise they share no memory. "
        "All float32, float16 or bfloat16. On up to `threads` threads.");
}

}  // namespace fastvit

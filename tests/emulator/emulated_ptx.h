// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/ptx.cuh for the emulator, after the descriptions of the instructions in
// NVIDIA's PTX ISA, "Warp Level Matrix Instructions" and "Asynchronous copy".
#pragma once

#include <cstring>

#include "element.h"
#include "emulated_cuda.h"
#include "emulator.h"

namespace fastvit {

inline uint32_t shared_memory() { return 0; }

template <typename T>
T load_shared(uint32_t address) {
  T value;
  emulator::read_shared(address, &value, sizeof value);
  return value;
}

template <typename T>
void store_shared(uint32_t address, T value) {
  emulator::write_shared(address, &value, sizeof value);
}

template <typename T>
T load_global(const T* pointer) {
  emulator::check_global_read(pointer, sizeof *pointer);
  return *pointer;
}

template <typename T>
void store_global(T* pointer, T value) {
  emulator::check_global_write(pointer, sizeof *pointer);
  *pointer = value;
}

template <int kBytes>
void copy_async(uint32_t to, const void* from, bool valid) {
  emulator::copy_async(to, from, kBytes, valid);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  emulator::wait_for_copies(kGroups);
}

// A row of 16 bytes that a lane brings to a matrix load.
struct EmulatedRow {
  uint32_t address;
  uint16_t elements[8];
};

template <bool kTransposed>
void emulated_matrices(const void* const inputs[32], void* const outputs[32]) {
  const auto row = [&](int lane) { return static_cast<const EmulatedRow*>(inputs[lane]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    // The 8 rows are read at once: each must lie in four banks of its own.
    uint32_t banks = 0;
    for (int i = 0; i < 8; ++i) {
      banks |= 1u << row(8 * matrix + i)->address / 16 % 8;
    }
    if (banks != 0xffu) {
      emulator::count_bank_conflict();
    }
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t packed = 0;
      for (int j = 0; j < 2; ++j) {
        const int r = kTransposed ? 2 * (lane % 4) + j : lane / 4;
        const int c = kTransposed ? lane / 4 : 2 * (lane % 4) + j;
        packed |= static_cast<uint32_t>(row(8 * matrix + r)->elements[c]) << 16 * j;
      }
      static_cast<uint32_t*>(outputs[lane])[matrix] = packed;
    }
  }
}

template <bool kTransposed>
void emulated_load_matrices(uint32_t (&to)[4], uint32_t address) {
  EmulatedRow row{address, {}};
  emulator::read_shared(address, row.elements, sizeof row.elements);
  emulator::whole_warp(&emulated_matrices<kTransposed>, &row, to);
}
inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  emulated_load_matrices<false>(to, row);
}
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  emulated_load_matrices<true>(to, row);
}

struct EmulatedOperands {
  uint32_t a[4], b[2];
};

// Element `index` of 32 bits that hold one float or two 16-bit elements.
template <typename T>
float emulated_element(uint32_t bits, int index) {
  if constexpr (sizeof(T) == 4) {
    return float_from_bits(bits);
  } else {
    return T{static_cast<uint16_t>(bits >> 16 * index)}.value();
  }
}

// Of a tf32 operand the tensor cores ignore what is behind 10 bits: it must have been rounded.
template <typename T>
void emulated_check_operand(uint32_t bits) {
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  if (sizeof(T) == 4 && !nan && (bits & 0x1fffu) != 0) {
    emulator::refuse("operand of the tensor cores that was not rounded to tf32");
  }
}

template <typename T>
void emulated_multiply_add(const void* const inputs[32], void* const outputs[32]) {
  constexpr int kEach = 4 / sizeof(T);  // elements in a register
  constexpr int kDepth = 8 * kEach;
  float a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& held = *static_cast<const EmulatedOperands*>(inputs[lane]);
    for (int e = 0; e < kEach; ++e) {
      const int g = lane / 4, k = lane % 4 * kEach + e;
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][k + i / 2 * kDepth / 2] = emulated_element<T>(held.a[i], e);
      }
      for (int i = 0; i < 2; ++i) {
        b[g][k + i * kDepth / 2] = emulated_element<T>(held.b[i], e);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* sums = static_cast<float*>(outputs[lane]);
    for (int i = 0; i < 4; ++i) {
      double sum = sums[i];
      for (int k = 0; k < kDepth; ++k) {
        sum += static_cast<double>(a[lane / 4 + i / 2 * 8][k]) * b[2 * (lane % 4) + i % 2][k];
      }
      sums[i] = static_cast<float>(sum);
    }
  }
}

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const EmulatedOperands operands{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  for (uint32_t bits : {a[0], a[1], a[2], a[3], b0, b1}) {
    emulated_check_operand<T>(bits);
  }
  emulator::whole_warp(&emulated_multiply_add<T>, &operands, sum);
}

// To the nearest with 10 bits behind the point, halves away from zero.
inline uint32_t round_to_tf32(uint32_t x) {
  if ((x & 0x7fffffffu) > 0x7f800000u) {
    return 0x7fffffffu;
  }
  // A carry out of the largest numbers makes them infinite; infinity has nothing to carry.
  return (x + 0x1000u) & ~0x1fffu;
}

inline int32_t anew(int32_t x) { return x; }

template <typename T>
T round_element(float x) {
  return round_to<T>(x);
}

template <typename T>
uint32_t pack(float first, float second) {
  return T::round(first).bits | static_cast<uint32_t>(T::round(second).bits) << 16;
}

template <typename T>
float element_value(T x) {
  return to_float(x);
}

}  // namespace fastvit

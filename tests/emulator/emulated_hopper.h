// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/ptx_hopper.cuh for the emulator, after NVIDIA's PTX ISA, "mbarrier",
// "cp.async.bulk.tensor" and "Asynchronous warpgroup level matrix instructions".
//
// Everything asynchronous comes as late as it may: tiles of the TMA when somebody waits for their
// barrier, products when their warpgroup waits for them; they read shared memory only then.
#pragma once

#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "emulated_ptx.h"

namespace fastvit {

// A matrix (rows, columns) of 16-bit elements, its rows `pitch` elements apart, copied in boxes of
// box_rows rows and 128 bytes.
struct TensorMap {
  const uint16_t* data;
  int64_t rows, columns, pitch;
  int box_rows;
};

inline TensorMap make_tensor_map(const void* data, bool, int64_t rows, int64_t columns,
                                 int64_t pitch, int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || pitch % 8 != 0) {
    throw std::runtime_error("tensor map of rows that do not begin at multiples of 16 bytes");
  }
  return {static_cast<const uint16_t*>(data), rows, columns, pitch, box_rows};
}

inline void prefetch_map(const TensorMap&) {}

struct EmulatedBox {
  uint32_t to;
  std::vector<unsigned char> bytes;
};

struct EmulatedBarrier {
  int count = 0, missing = 0;
  int64_t missing_bytes = 0, phases = 0;
  std::vector<EmulatedBox> boxes;  // under way
};

struct EmulatedMeeting {
  int present = 0;
  int64_t held = 0;
};

// What one block, the current, knows.
struct EmulatedHopper {
  int64_t block = -1;
  std::map<uint32_t, EmulatedBarrier> barriers;
  std::map<int, EmulatedMeeting> meetings;
};

inline EmulatedHopper& emulated_hopper() {
  static EmulatedHopper hopper;
  if (hopper.block != emulator::current_block()) {
    hopper = EmulatedHopper{};
    hopper.block = emulator::current_block();
  }
  return hopper;
}

inline EmulatedBarrier& emulated_barrier(uint32_t address) {
  auto& barriers = emulated_hopper().barriers;
  const auto found = barriers.find(address);
  if (found == barriers.end()) {
    emulator::refuse("use of a barrier that was not initialised");
  }
  return found->second;
}

inline void init_barrier(uint32_t barrier, int count) {
  if (barrier % 8 != 0) {
    emulator::refuse("misaligned barrier");
  }
  const unsigned char opaque[8] = {};
  emulator::write_shared(barrier, opaque, sizeof opaque);
  emulated_hopper().barriers[barrier] = {count, count, 0, 0, {}};
}

inline void publish_barriers() {}

inline void emulated_complete(EmulatedBarrier& barrier) {
  if (barrier.missing == 0 && barrier.missing_bytes == 0) {
    barrier.missing = barrier.count;
    ++barrier.phases;
    emulator::note_progress();
  }
}

inline void arrive_expecting(uint32_t address, int bytes) {
  EmulatedBarrier& barrier = emulated_barrier(address);
  if (barrier.missing == 0) {
    emulator::refuse("more threads arrive at a barrier than it counts");
  }
  barrier.missing_bytes += bytes;
  --barrier.missing;
  emulated_complete(barrier);
}

inline void arrive(uint32_t address) { arrive_expecting(address, 0); }

inline void wait_for_phase(uint32_t address, uint32_t parity) {
  EmulatedBarrier& barrier = emulated_barrier(address);
  while (static_cast<uint32_t>(barrier.phases % 2) == parity) {
    for (const EmulatedBox& box : std::exchange(barrier.boxes, {})) {
      emulator::end_copy(box.to, box.bytes.data(), static_cast<int>(box.bytes.size()));
      barrier.missing_bytes -= static_cast<int64_t>(box.bytes.size());
      emulated_complete(barrier);
    }
    if (static_cast<uint32_t>(barrier.phases % 2) == parity) {
      emulator::pause();
    }
  }
}

// Where the 128-byte swizzle puts a byte: bits 4 to 6 of its address change by bits 7 to 9.
inline uint32_t emulated_swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t address) {
  if (to % 1024 != 0) {
    emulator::refuse("box for an address that is no multiple of 1024");
  }
  EmulatedBox box{to, std::vector<unsigned char>(static_cast<size_t>(map.box_rows) * 128)};
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      uint16_t element = 0;
      if (row + r < map.rows && column + c < map.columns) {
        const uint16_t* from = map.data + (row + r) * map.pitch + column + c;
        emulator::check_global_read(from, sizeof element);
        element = *from;
      }
      std::memcpy(&box.bytes[emulated_swizzle(r * 128 + c * 2)], &element, sizeof element);
    }
  }
  emulator::begin_copy(to, static_cast<int>(box.bytes.size()));
  emulated_barrier(address).boxes.push_back(std::move(box));
}

// Order between the two ways to shared memory cannot go wrong here.
inline void publish_writes() {}

inline void meet(int barrier, int threads) {
  EmulatedMeeting& meeting = emulated_hopper().meetings[barrier];
  const int64_t held = meeting.held;
  if (++meeting.present == threads) {
    meeting.present = 0;
    ++meeting.held;
    emulator::note_progress();
  }
  while (meeting.held == held) {
    emulator::pause();
  }
}

template <int>
void take_registers() {}
template <int>
void leave_registers() {}

// The products of one thread that were not waited for, by group; the last is open.
struct EmulatedProduct {
  uint64_t a, b;
  float* sums;
  void (*execute)(const EmulatedProduct&, float* const sums[128]);
};
using EmulatedGroups = std::vector<std::vector<EmulatedProduct>>;

inline EmulatedGroups& emulated_groups() {
  static std::map<int, EmulatedGroups> groups;
  static int64_t block = -1;
  if (block != emulator::current_block()) {
    groups.clear();
    block = emulator::current_block();
  }
  EmulatedGroups& own = groups[static_cast<int>(threadIdx.x)];
  if (own.empty()) {
    own.emplace_back();
  }
  return own;
}

inline void begin_products() {}

// Element (row, column) of a tile of 16-bit elements with 128-byte swizzle, as its descriptor says.
template <typename T>
float emulated_tile_element(uint64_t descriptor, int row, int column) {
  if (descriptor >> 62 != 1) {
    emulator::refuse("expected a tile with 128-byte swizzle");
  }
  const uint32_t start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  uint16_t bits;
  emulator::read_shared(emulated_swizzle(start + row / 8 * group + row % 8 * 128 + column * 2),
                        &bits, sizeof bits);
  return T{bits}.value();
}

template <typename T, int kColumns>
void emulated_tile_product(const EmulatedProduct& product, float* const sums[128]) {
  static float a[64][16], b[kColumns][16];
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 64; ++m) {
      a[m][k] = emulated_tile_element<T>(product.a, m, k);
    }
    for (int n = 0; n < kColumns; ++n) {
      b[n][k] = emulated_tile_element<T>(product.b, n, k);
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kColumns / 2; ++i) {
      const int m = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const int n = i / 4 * 8 + 2 * (thread % 4) + i % 2;
      double sum = sums[thread][i];
      for (int k = 0; k < 16; ++k) {
        sum += static_cast<double>(a[m][k]) * b[n][k];
      }
      sums[thread][i] = static_cast<float>(sum);
    }
  }
}

template <typename T, int kColumns>
void multiply_add_tiles(float (&sum)[kColumns / 8][4], uint64_t a, uint64_t b) {
  emulated_groups().back().push_back({a, b, &sum[0][0], &emulated_tile_product<T, kColumns>});
}

inline void commit_products() { emulated_groups().emplace_back(); }

// Executes what the 128 threads of a warpgroup have waited for.
inline void emulated_execute(const void* const* inputs, void* const*) {
  const auto products = [&](int thread) -> const std::vector<EmulatedProduct>& {
    return *static_cast<const std::vector<EmulatedProduct>*>(inputs[thread]);
  };
  for (size_t i = 0; i < products(0).size(); ++i) {
    float* sums[128];
    for (int thread = 0; thread < 128; ++thread) {
      if (products(thread).size() != products(0).size() ||
          products(thread)[i].a != products(0)[i].a || products(thread)[i].b != products(0)[i].b ||
          products(thread)[i].execute != products(0)[i].execute) {
        emulator::refuse("threads of a warpgroup execute different products");
      }
      sums[thread] = products(thread)[i].sums;
    }
    products(0)[i].execute(products(0)[i], sums);
  }
}

template <int kGroups>
void wait_for_products() {
  EmulatedGroups& groups = emulated_groups();
  std::vector<EmulatedProduct> due;
  while (static_cast<int>(groups.size()) - 1 > kGroups) {
    due.insert(due.end(), groups.front().begin(), groups.front().end());
    groups.erase(groups.begin());
  }
  emulator::whole_warpgroup(&emulated_execute, &due, nullptr);
}

}  // namespace fastvit

// SPDX-License-Identifier: Apache-2.0
#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulated_cuda.h"

EmulatedIndex threadIdx, blockIdx;

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr int kNobody = -1, kSeveral = -2;

struct Copy {
  uint32_t to;
  unsigned char bytes[16];
  int count;
};

enum class State { kReady, kPaused, kAtBarrier, kAtCollective, kDone };

struct Thread {
  int index = 0;
  State state = State::kReady;
  ucontext_t context;
  std::vector<Copy> open;                // copies that no commit has closed yet
  std::deque<std::vector<Copy>> groups;  // closed and not waited for, the oldest first
  const void* input = nullptr;
  void* output = nullptr;
  Collective collective = nullptr;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
};

// What happened to one byte of shared memory, counted in barriers.
struct Byte {
  int writer = kNobody, reader = kNobody;
  int64_t written = -1, read = -1;
  bool under_way = false;
};

constexpr int kUnwritten = -1;

struct Range {
  uintptr_t end;
  bool writable;
  std::vector<int> written;  // by which launch since clear_tensors, for each byte of an output
};

std::map<uintptr_t, Range> tensors;  // by where they begin; they do not overlap
int launches = 0;
int64_t blocks = 0;
const char* latest = "";
int64_t conflicts = 0;
Device current_device{132, 227 * 1024, 228 * 1024};
std::mt19937 orders{0};
std::vector<std::unique_ptr<char[]>> stacks;

class Block {
 public:
  explicit Block(const Launch& launch) : launch_(launch), threads_(launch.threads) {
    for (int i = 0; i < launch.threads; ++i) {
      threads_[i].index = i;
    }
    // Kept from launch to launch: pages cost more than what runs on them.
    while (stacks.size() < threads_.size()) {
      stacks.emplace_back(new char[kStackBytes]);
    }
  }

  void run(unsigned x, unsigned y);

  // Ends the current thread's turn; it goes on when it is ready again.
  void yield(State state) {
    Thread& thread = *current_;
    thread.state = state;
    swapcontext(&thread.context, &scheduler_);
    threadIdx.x = static_cast<unsigned>(thread.index);
  }

  // There is no way back from an error: the other threads are dropped where they are.
  [[noreturn]] void refuse(const std::string& what) {
    error_ = what + " (thread " + std::to_string(current_->index) + ")";
    yield(State::kDone);
    std::abort();
  }

  Thread& current() { return *current_; }
  Thread& thread(int index) { return threads_[index]; }

  void touch(uint32_t address, int bytes);
  void note_read(Byte& byte);
  void note_write(Byte& byte, bool under_way);

  int64_t epoch = 0;
  bool progress = false;
  std::vector<unsigned char> shared;
  std::vector<Byte> shadow;

 private:
  static void enter() {
    Block& block = *active;
    block.launch_.thread();
    block.yield(State::kDone);
  }

  const Launch& launch_;
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  ucontext_t scheduler_;
  std::string error_;

 public:
  static Block* active;
};

Block* Block::active = nullptr;

void Block::run(unsigned x, unsigned y) {
  ++blocks;
  const auto fail = [&](const std::string& what) {
    throw std::runtime_error(std::string(launch_.name) + ", block " + std::to_string(x) + ", " +
                             std::to_string(y) + ": " + what);
  };
  blockIdx = {x, y, 0};
  active = this;
  epoch = 0;
  shared.assign(launch_.shared_bytes, 0xff);
  shadow.assign(launch_.shared_bytes, Byte{});
  std::vector<Thread*> order;
  for (Thread& thread : threads_) {
    thread.state = State::kReady;
    thread.open.clear();
    thread.groups.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks[thread.index].get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::enter, 0);
    order.push_back(&thread);
  }
  while (true) {
    std::shuffle(order.begin(), order.end(), orders);
    bool moved = false;
    for (Thread* thread : order) {
      if (thread->state != State::kReady && thread->state != State::kPaused) {
        continue;
      }
      thread->state = State::kReady;
      current_ = thread;
      threadIdx = {static_cast<unsigned>(thread->index), 0, 0};
      swapcontext(&scheduler_, &thread->context);
      if (!error_.empty()) {
        fail(error_);
      }
      moved |= thread->state != State::kPaused;
    }
    moved |= progress;
    progress = false;
    if (!moved) {
      const auto all = [this](State state) {
        return std::all_of(threads_.begin(), threads_.end(),
                           [state](const Thread& thread) { return thread.state == state; });
      };
      if (all(State::kDone)) {
        return;
      }
      const auto elsewhere = [this](const Thread& thread) {
        return thread.barrier_line != threads_[0].barrier_line ||
               std::strcmp(thread.barrier_file, threads_[0].barrier_file) != 0;
      };
      if (!all(State::kAtBarrier)) {
        fail("some threads wait for others that never come");
      } else if (std::any_of(threads_.begin(), threads_.end(), elsewhere)) {
        fail("threads wait at different barriers");
      }
      ++epoch;
      for (Thread& thread : threads_) {
        thread.state = State::kReady;
      }
    }
  }
}

void Block::touch(uint32_t address, int bytes) {
  if (address % bytes != 0) {
    refuse("misaligned access to shared memory at " + std::to_string(address));
  }
  if (uint64_t{address} + bytes > shared.size()) {
    refuse("access beyond shared memory at " + std::to_string(address));
  }
}

void Block::note_read(Byte& byte) {
  const int self = current_->index;
  if (byte.under_way) {
    refuse("read of shared memory before the copy to it was waited for");
  }
  if (byte.writer == kNobody) {
    refuse("read of shared memory that nobody wrote");
  }
  if (byte.written == epoch && byte.writer != self) {
    refuse("read of shared memory that thread " + std::to_string(byte.writer) +
           " wrote without a barrier since");
  }
  byte.reader = byte.read == epoch && byte.reader != self ? kSeveral : self;
  byte.read = epoch;
}

void Block::note_write(Byte& byte, bool under_way) {
  const int self = current_->index;
  if (byte.under_way && under_way) {
    refuse("copy to shared memory to which another is under way");
  }
  if (byte.written == epoch && byte.writer != self && byte.writer != kNobody) {
    refuse("write to shared memory that thread " + std::to_string(byte.writer) +
           " wrote without a barrier since");
  }
  if (byte.read == epoch && byte.reader != self) {
    refuse("write to shared memory that others read without a barrier since");
  }
  byte.writer = self;
  byte.written = epoch;
  byte.under_way = under_way;
}

// The tensor that holds all the bytes, and where in it they begin.
Range* range_of(const void* pointer, int bytes, size_t& at) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto range = tensors.upper_bound(address);
  if (range == tensors.begin() || (--range)->second.end < address + bytes) {
    return nullptr;
  }
  at = address - range->first;
  return &range->second;
}

void allow(const void* data, int64_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + bytes;
  const auto next = tensors.lower_bound(begin);
  const bool apart = (next == tensors.end() || end <= next->first) &&
                     (next == tensors.begin() || std::prev(next)->second.end <= begin);
  if (!apart) {
    throw std::invalid_argument("memory that was allowed already");
  }
  tensors[begin] = {end, writable, std::vector<int>(writable ? bytes : 0, kUnwritten)};
}

void check_alignment(const void* pointer, int bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    Block::active->refuse("misaligned access of " + std::to_string(bytes) +
                          " bytes to global memory");
  }
}

}  // namespace

void run(const Launch& launch) {
  latest = launch.name;
  const auto expect = [&launch](const char* what, int64_t least, int64_t got, int64_t most) {
    if (got < least || got > most) {
      throw std::runtime_error(std::string(launch.name) + ": launched with " + std::to_string(got) +
                               " " + what);
    }
  };
  expect("blocks", 1, launch.blocks_x, 0x7fffffff);
  expect("rows of blocks", 1, launch.blocks_y, 65535);
  expect("threads", 1, launch.threads, 1024);
  expect("bytes of shared memory", 0, launch.shared_bytes, current_device.shared_bytes_of_block);
  if (launch.threads % kWarp != 0) {
    throw std::runtime_error(std::string(launch.name) + ": launched with part of a warp");
  }
  ++launches;
  Block block(launch);
  for (int64_t y = 0; y < launch.blocks_y; ++y) {
    for (int64_t x = 0; x < launch.blocks_x; ++x) {
      block.run(static_cast<unsigned>(x), static_cast<unsigned>(y));
    }
  }
}

void allow_reads(const void* data, int64_t bytes) { allow(data, bytes, false); }
void allow_writes(void* data, int64_t bytes) { allow(data, bytes, true); }
void clear_tensors() { tensors.clear(); }

Device device() { return current_device; }
void set_device(const Device& device) { current_device = device; }
void set_shuffle(unsigned seed) { orders.seed(seed); }

void refuse(const char* what) { Block::active->refuse(what); }

void read_shared(uint32_t address, void* to, int bytes) {
  Block& block = *Block::active;
  block.touch(address, bytes);
  for (int i = 0; i < bytes; ++i) {
    block.note_read(block.shadow[address + i]);
  }
  std::memcpy(to, &block.shared[address], bytes);
}

void write_shared(uint32_t address, const void* from, int bytes) {
  Block& block = *Block::active;
  block.touch(address, bytes);
  for (int i = 0; i < bytes; ++i) {
    if (block.shadow[address + i].under_way) {
      block.refuse("write to shared memory to which a copy is under way");
    }
    block.note_write(block.shadow[address + i], false);
  }
  std::memcpy(&block.shared[address], from, bytes);
}

void check_global_read(const void* pointer, int bytes) {
  check_alignment(pointer, bytes);
  size_t at = 0;
  const Range* range = range_of(pointer, bytes, at);
  if (range == nullptr) {
    refuse("read of global memory outside the tensors");
  }
  for (int i = 0; range->writable && i < bytes; ++i) {
    const int written = range->written[at + i];
    if (written == kUnwritten || written == launches) {
      refuse("read of an output that no earlier launch wrote");
    }
  }
}

void check_global_write(void* pointer, int bytes) {
  check_alignment(pointer, bytes);
  size_t at = 0;
  Range* range = range_of(pointer, bytes, at);
  if (range == nullptr || !range->writable) {
    refuse("write to global memory outside the outputs");
  }
  for (int i = 0; i < bytes; ++i) {
    if (range->written[at + i] != kUnwritten) {
      refuse("second write to a byte of the output");
    }
    range->written[at + i] = launches;
  }
}

void copy_async(uint32_t to, const void* from, int bytes, bool valid) {
  Block& block = *Block::active;
  block.touch(to, bytes);
  Copy copy{to, {}, bytes};
  check_alignment(from, bytes);
  if (valid) {
    check_global_read(from, bytes);
    std::memcpy(copy.bytes, from, bytes);
  }
  for (int i = 0; i < bytes; ++i) {
    block.note_write(block.shadow[to + i], true);
    block.shared[to + i] = 0xff;
  }
  block.current().open.push_back(copy);
}

void commit_copies() {
  Thread& thread = Block::active->current();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void wait_for_copies(int groups) {
  Block& block = *Block::active;
  Thread& thread = block.current();
  while (static_cast<int>(thread.groups.size()) > groups) {
    for (const Copy& copy : thread.groups.front()) {
      for (int i = 0; i < copy.count; ++i) {
        block.shadow[copy.to + i].under_way = false;
        block.shadow[copy.to + i].written = block.epoch;
        block.shared[copy.to + i] = copy.bytes[i];
      }
    }
    thread.groups.pop_front();
  }
}

namespace {

template <int kCount>
void together(Collective whole, const void* input, void* output) {
  Block& block = *Block::active;
  Thread& self = block.current();
  self.input = input;
  self.output = output;
  self.collective = whole;
  const int first = self.index / kCount * kCount;
  const void* inputs[kCount];
  void* outputs[kCount];
  for (int lane = 0; lane < kCount; ++lane) {
    Thread& other = block.thread(first + lane);
    if (&other != &self && other.state != State::kAtCollective) {
      block.yield(State::kAtCollective);
      return;
    }
    if (other.collective != whole) {
      block.refuse("lanes of a warp execute different instructions");
    }
    inputs[lane] = other.input;
    outputs[lane] = other.output;
  }
  // The last to arrive does it for all.
  whole(inputs, outputs);
  for (int lane = 0; lane < kCount; ++lane) {
    block.thread(first + lane).state = State::kReady;
  }
}

}  // namespace

void whole_warp(Collective whole, const void* input, void* output) {
  together<kWarp>(whole, input, output);
}

void whole_warpgroup(Collective whole, const void* input, void* output) {
  together<4 * kWarp>(whole, input, output);
}

int64_t current_block() { return blocks; }

void pause() { Block::active->yield(State::kPaused); }

void note_progress() {
  // Whoever waited goes on after what others did before.
  Block::active->progress = true;
  ++Block::active->epoch;
}

void begin_copy(uint32_t to, int bytes) {
  Block& block = *Block::active;
  for (int i = 0; i < bytes; ++i) {
    block.touch(to + i, 1);
    block.note_write(block.shadow[to + i], true);
    block.shared[to + i] = 0xff;
  }
}

void end_copy(uint32_t to, const void* from, int bytes) {
  Block& block = *Block::active;
  for (int i = 0; i < bytes; ++i) {
    block.shadow[to + i].under_way = false;
    block.shadow[to + i].written = block.epoch;
  }
  std::memcpy(&block.shared[to], from, bytes);
}

void barrier(const char* file, int line) {
  Block& block = *Block::active;
  block.current().barrier_file = file;
  block.current().barrier_line = line;
  block.yield(State::kAtBarrier);
}

const char* last_launch() { return latest; }

int64_t bank_conflicts() { return conflicts; }
void count_bank_conflict() { ++conflicts; }

}  // namespace emulator

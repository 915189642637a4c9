// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a processor, one thread after another, and looks for what a GPU would not
// tell: each thread of a block is a coroutine that runs until it meets a barrier or an instruction
// that the whole warp executes. The order of threads is shuffled anew at every turn.
//
// Refused, with the kernel, block and thread, is
//  - a race in shared memory: two threads at the same byte without a barrier between them, at least
//    one writing, or anybody while an asynchronous copy to it has not been waited for;
//  - reading shared memory that nobody wrote, and any access beyond what the launch asked for;
//  - an access to global memory outside the tensors of the call or not aligned to its size, a
//  second
//    write to a byte of an output, and reading one that no earlier launch wrote;
//  - a barrier or warp instruction that some thread never reaches;
//  - a launch that asks for more than a GPU has.
// Asynchronous copies arrive as late as they may: when their thread waits for them. Until then the
// bytes are garbage. Sums of the tensor cores are exact here up to one rounding for each
// instruction; those of a GPU round more often.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Launch {
  const char* name;
  int64_t blocks_x, blocks_y;
  int threads;
  int shared_bytes;
  std::function<void()> thread;
};

// The GPU that kernels believe to run on; an H100 unless set.
struct Device {
  int multiprocessors, shared_bytes_of_block, shared_bytes_of_multiprocessor;
};
Device device();
void set_device(const Device& device);

// Begins another sequence of thread orders.
void set_shuffle(unsigned seed);

// Runs all blocks; throws std::runtime_error at the first refusal.
void run(const Launch& launch);

// The name of the latest.
const char* last_launch();

// What a call may touch, until clear_tensors().
void allow_reads(const void* data, int64_t bytes);
void allow_writes(void* data, int64_t bytes);
void clear_tensors();

// Threads of the current launch call these.
[[noreturn]] void refuse(const char* what);
void read_shared(uint32_t address, void* to, int bytes);
void write_shared(uint32_t address, const void* from, int bytes);
void check_global_read(const void* pointer, int bytes);
void check_global_write(void* pointer, int bytes);
// Reads nothing unless `valid`, but the address must be aligned all the same.
void copy_async(uint32_t to, const void* from, int bytes, bool valid);
void commit_copies();
void wait_for_copies(int groups);

// Calls `whole(inputs, outputs)` once for the 32 lanes of the warp, each of which passes pointers
// to what it contributes and receives.
using Collective = void (*)(const void* const inputs[32], void* const outputs[32]);
void whole_warp(Collective whole, const void* input, void* output);

// The same for a warpgroup, 128 threads.
void whole_warpgroup(Collective whole, const void* input, void* output);

// For what is not a barrier of the whole block, such as those of Hopper in shared memory.
int64_t current_block();  // counts the blocks that were run
void pause();             // lets others run; called until what the thread waits for has come
void note_progress();     // something came that others may have waited for
void begin_copy(uint32_t to, int bytes);  // the bytes are garbage until end_copy
void end_copy(uint32_t to, const void* from, int bytes);

// Phases in which matrix loads met a bank conflict, since the start of the process.
int64_t bank_conflicts();
void count_bank_conflict();

}  // namespace emulator

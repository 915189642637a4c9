// SPDX-License-Identifier: Apache-2.0
#pragma once

// name(value in C++, what Python calls it)
#define FASTVIT_FAULTS(name)                                                                       \
  name(kNone, "none") name(kNoneOfProduct, "none_of_product") name(kNoBarrier, "no_barrier") name( \
      kNoBarrierBeforeWrite, "no_barrier_before_write") name(kTwoWriters, "two_writers")           \
      name(kNoWait, "no_wait") name(kTooFewGroups, "too_few_groups")                               \
          name(kCopyOverRead, "copy_over_read") name(kStoreOverCopy, "store_over_copy") name(      \
              kMisalignedCopy, "misaligned_copy") name(kUnwrittenShared, "unwritten_shared")       \
              name(kSharedBeyond, "shared_beyond") name(kSharedWrapsAround, "shared_wraps_around") \
                  name(kMisalignedShared, "misaligned_shared") name(kReadBeyond, "read_beyond")    \
                      name(kMisalignedRead, "misaligned_read") name(kWriteBeyond, "write_beyond")  \
                          name(kWriteToInput, "write_to_input") name(kSecondWrite, "second_write") \
                              name(kReadOfOutput, "read_of_output")                                \
                                  name(kSkippedBarrier, "skipped_barrier")                         \
                                      name(kTwoBarriers, "two_barriers")                           \
                                          name(kSkippedInstruction, "skipped_instruction") name(   \
                                              kDifferentInstructions, "different_instructions")    \
                                              name(kUnrounded, "unrounded")                        \
                                                  name(kTooManyBlocks, "too_many_blocks")          \
                                                      name(kTooManyThreads, "too_many_threads")    \
                                                          name(kTooMuchShared, "too_much_shared")

namespace fastvit {

#define FASTVIT_FAULT(value, text) value,
enum class Fault { FASTVIT_FAULTS(FASTVIT_FAULT) };
#undef FASTVIT_FAULT

void run_broken(Fault fault, const float* in, float* out);

}  // namespace fastvit

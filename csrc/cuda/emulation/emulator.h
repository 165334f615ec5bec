// What tests set and read of the emulation, beside launch.h.
#pragma once
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

namespace fastlm::cuda {

/// In which order threads run between barriers, and blocks.
enum class Order { forward, reversed, shuffled };

/// Emulates a GPU with these properties; order: "forward", "reversed", "shuffled".
void emulate(const std::string& order, Device device);

/// op, dtype, kernel_variant, blocks x, blocks y, threads, cluster, bytes of shared memory.
using Recorded = std::tuple<std::string, int, std::string, int64_t, int64_t, int, int, int64_t>;
/// While on, launches are checked and noted, and nothing runs: pointers may be anything.
void record(bool on);
std::vector<Recorded> records();

/// Of each launch only the last so many blocks run, 0 for all: the end of tensors that no memory holds.
void tail(int64_t blocks);

/// block (x + grid x * y), thread, what, a, b, c: what a thread asks of barriers, copies and products, at that moment.
/// Addresses are of shared memory, as shared_address() gives them; what is not named is 0.
///   launch BLOCKS THREADS SHARED (block and thread -1)
///   init BARRIER ARRIVALS, init_done, arrive BARRIER, expect BARRIER BYTES, wait BARRIER PARITY
///   named_sync NUMBER THREADS (0: __syncthreads), named_arrive NUMBER THREADS, syncwarp,
///   registers COUNT (1: up)
///   load TO BYTES BARRIER (tile_load, bulk_load), store FROM BYTES (tile_store, bulk_add),
///   bulk_commit, bulk_wait_read PENDING, bulk_wait PENDING
///   multiply FROM BYTES: whole rows, by each warp's first lane, its rows of A and all of B, an event for each stretch
///   warpgroup_fence, warpgroup_commit, warpgroup_wait PENDING, fence_async
///   read FROM BYTES, write TO BYTES, copy TO BYTES (copy_async), copy_commit, copy_wait PENDING: of what takes an
///   address in shared memory; accesses through pointers are not known
///   await_turn POINTER MINE, pass_turn POINTER NEXT, count POINTER BEFORE (atomicAdd of an int)
using Traced = std::tuple<int64_t, int, std::string, int64_t, int64_t, int64_t>;
/// While on, all of that is noted, in the order in which the emulation did it; forgets what was.
void trace(bool on);
std::vector<Traced> traces();

/// Every kernel there is, as "op/dtype/kernel_variant".
std::vector<std::string> instances();

}  // namespace fastlm::cuda

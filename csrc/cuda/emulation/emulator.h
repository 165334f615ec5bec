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

/// While on, what threads ask of barriers, copies and products is noted; traces() has a text for each block that ran:
///   block X Y THREADS
///   THREAD KIND A B FROM-TO FROM-TO ...     in the order of threads, then of what a thread did
/// Addresses and FROM-TO are of shared memory; what has no A or B has 0.
///   init BARRIER ARRIVALS, init_done, arrive BARRIER, expect BARRIER BYTES, wait BARRIER PARITY
///   named_sync NUMBER THREADS, named_arrive NUMBER THREADS, syncthreads, registers COUNT (1: up)
///   load BARRIER BYTES written: tile_load and bulk_load
///   store 0 BYTES read: tile_store and bulk_add; bulk_commit, bulk_wait_read PENDING, bulk_wait PENDING
///   multiply N ADD read (of a warp's first lane: its rows of A, and B), warpgroup_fence, warpgroup_commit,
///   warpgroup_wait PENDING, fence_async
///   read 0 0 read, write 0 0 written, copy 0 0 written (copy_async; copy_commit, copy_wait PENDING): as many as follow
///   each other, of what takes an address in shared memory; accesses through pointers are not known
void trace(bool on);
std::vector<std::string> traces();

/// Every kernel there is, as "op/dtype/kernel_variant".
std::vector<std::string> instances();

}  // namespace fastlm::cuda

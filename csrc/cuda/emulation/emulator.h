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

/// Every kernel there is, as "op/dtype/kernel_variant".
std::vector<std::string> instances();

}  // namespace fastlm::cuda

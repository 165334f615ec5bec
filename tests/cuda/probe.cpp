// Starts the kernels of probe*.cu from Python's ctypes: a library of its own with an emulation of its own.
#include <exception>
#include <stdexcept>

#include "cuda/emulation/emulator.h"

using namespace fastlm;
using namespace fastlm::cuda;

namespace {
struct ProbeArguments {
  const void* in;
  void* out;
  int64_t n;
};

Kernel& kernel(const std::string& op) {
  static Kernel kernels[] = {{"probe", "probe"}, {"probe_mma", "probe_mma"}};
  for (Kernel& k : kernels)
    if (op == k.name()) return k;
  throw std::invalid_argument("no probe " + op);
}
}  // namespace

/// Null, or what went wrong. The kernel has the name of its file.
extern "C" __attribute__((visibility("default"))) const char* probe(const char* op, const char* order, int dtype,
                                                                    int variant, int64_t blocks, int threads,
                                                                    int cluster, int64_t shared, int arch,
                                                                    const void* in, void* out, int64_t n) {
  static std::string message;
  try {
    emulate(order, {arch, 4, 227 << 10, 228 << 10, 50 << 20});
    kernel(op).launch(static_cast<DType>(dtype), variant, Grid{blocks, threads, cluster, shared},
                      ProbeArguments{in, out, n}, 0, 0);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

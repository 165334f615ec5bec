// Starts the kernels of probe.cu from Python's ctypes: a library of its own with an emulation of its own.
#include <exception>

#include "cuda/emulation/emulator.h"

using namespace fastlm;
using namespace fastlm::cuda;

namespace {
struct ProbeArguments {
  const void* in;
  void* out;
  int64_t n;
};
}  // namespace

/// Null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* probe(const char* order, int dtype, int variant,
                                                                    int64_t blocks, int threads, int cluster,
                                                                    int64_t shared, int arch, const void* in, void* out,
                                                                    int64_t n) {
  static Kernel kernel("probe", "probe");
  static std::string message;
  try {
    emulate(order, {arch, 4, 227 << 10, 228 << 10, 50 << 20});
    kernel.launch(static_cast<DType>(dtype), variant, Grid{blocks, threads, cluster, shared},
                  ProbeArguments{in, out, n}, 0, 0);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// Starts the kernels of probe*.cu from Python's ctypes: a library of its own with an emulation of its own.
#include <algorithm>
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
  static Kernel kernels[] = {{"probe", "probe"}, {"probe_mma", "probe_mma"}, {"probe_hopper", "probe_hopper"}};
  for (Kernel& k : kernels)
    if (op == k.name()) return k;
  throw std::invalid_argument("no probe " + op);
}
struct TileArguments {
  TensorMap maps[3];
  float* out;
  int64_t n, fault;
};

template <class F>
const char* message_of(F run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
}  // namespace

/// Null, or what went wrong. The kernel has the name of its file.
extern "C" __attribute__((visibility("default"))) const char* probe(const char* op, const char* order, int dtype,
                                                                    int variant, int64_t blocks, int threads,
                                                                    int cluster, int64_t shared, int arch,
                                                                    const void* in, void* out, int64_t n) {
  return message_of([&] {
    emulate(order, {arch, 4, 227 << 10, 228 << 10, 50 << 20});
    kernel(op).launch(static_cast<DType>(dtype), variant, Grid{blocks, threads, cluster, shared},
                      ProbeArguments{in, out, n}, 0, 0);
  });
}

/// Of probe_hopper.cu. maps: of each of three tensors its address, sizes, strides, box and swizzle.
extern "C" __attribute__((visibility("default"))) const char* probe_tiles(const char* order, int dtype, int variant,
                                                                          int threads, int64_t shared,
                                                                          const int64_t* maps, float* out, int64_t n,
                                                                          int64_t fault) {
  return message_of([&] {
    emulate(order, {90, 4, 227 << 10, 228 << 10, 50 << 20});
    TileArguments arguments{{}, out, n, fault};
    for (int i = 0; i < 3; ++i) {
      const int64_t* m = maps + 16 * i;
      std::array<int64_t, 5> sizes;
      std::array<int64_t, 4> strides;
      std::array<int, 5> box;
      std::copy(m + 1, m + 6, sizes.begin());
      std::copy(m + 6, m + 10, strides.begin());
      std::copy(m + 10, m + 15, box.begin());
      arguments.maps[i] = tensor_map(static_cast<DType>(dtype), reinterpret_cast<const void*>(m[0]), sizes, strides,
                                     box, static_cast<int>(m[15]));
    }
    kernel("probe_hopper").launch(static_cast<DType>(dtype), variant, Grid{1, threads, 1, shared}, arguments, 0, 0);
  });
}

/// Notes what the kernels ask for, from here on or no longer.
extern "C" __attribute__((visibility("default"))) void probe_trace(bool on) { trace(on); }
/// What they asked for, a line each: block, thread, what, a, b, c.
extern "C" __attribute__((visibility("default"))) const char* probe_traced() {
  static std::string text;
  text.clear();
  for (const auto& [block, thread, what, a, b, c] : traces())
    text += std::to_string(block) + " " + std::to_string(thread) + " " + what + " " + std::to_string(a) + " " +
            std::to_string(b) + " " + std::to_string(c) + "\n";
  return text.c_str();
}

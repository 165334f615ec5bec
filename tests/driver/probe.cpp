// Launches through csrc/cuda/driver.cpp, for Python's ctypes. Two kernels of one file; binaries are named after what is
// asked for.
#include <algorithm>

#include "cuda/launch.h"

using namespace fastlm;
using namespace fastlm::cuda;

namespace {
Kernel first("probe", "first"), second("probe", "second");

template <class Function>
const char* said(Function function) {
  static thread_local std::string message;
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
}  // namespace

extern "C" {

void set_loads(bool on) {
  if (!on) return set_loader({});
  set_loader([](const std::string& op, const std::string& dtype, int arch) {
    return op + "." + dtype + "." + std::to_string(arch);
  });
}

/// Null, or what went wrong.
const char* launch(int kernel, int dtype, int variant, int64_t x, int64_t y, int threads, int cluster, int64_t shared,
                   int64_t argument, int device, uint64_t stream) {
  return said([&] {
    (kernel ? second : first)
        .launch(static_cast<DType>(dtype), variant, Grid{x, threads, cluster, shared, y}, argument, device, stream);
  });
}

/// 1234 in `first` is what the fake driver writes.
const char* map(int dtype, int64_t base, const int64_t* sizes, const int64_t* strides, const int* box, int swizzle,
                uint64_t* first) {
  return said([&] {
    std::array<int64_t, 5> s;
    std::array<int64_t, 4> t;
    std::array<int, 5> b;
    std::copy(sizes, sizes + 5, s.begin());
    std::copy(strides, strides + 4, t.begin());
    std::copy(box, box + 5, b.begin());
    *first = tensor_map(static_cast<DType>(dtype), reinterpret_cast<void*>(base), s, t, b, swizzle).opaque[0];
  });
}

const char* properties(int index, int64_t* out) {
  return said([&] {
    const Device& d = device(index);
    const int64_t values[] = {d.arch, d.sms, d.shared, d.shared_sm, d.l2};
    for (int i = 0; i < 5; ++i) out[i] = values[i];
  });
}
}

// A CUDA driver without a GPU: libcuda.so.1 for tests. It keeps a line per call that matters, and fails where told to.
//
//   fake_fail("cuModuleLoadData", 209)   from now on this function returns 209; 0 lets it work again
//   fake_text()                          the lines since the last time
//
// With -DFAKE_QUIET, for timing what is above it (bench/launch_cuda.py), it only counts: fake_launched().
//
// Two GPUs of compute capability 9.0. Contexts are 0x100 + device, modules and functions are counted from 1.
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {
std::mutex mutex;
std::ostringstream text;
std::map<std::string, int> failures;
int modules, functions;
thread_local std::vector<void*> stack;
thread_local int capture_mode = 0;

long launched = 0;

template <class... Parts>
int note(const char* function, const Parts&... parts) {
#ifdef FAKE_QUIET
  launched += std::strncmp(function, "cuLaunch", 8) == 0;
  return 0;
#endif
  const std::lock_guard<std::mutex> guard(mutex);
  if (const int failure = failures[function]) return failure;
  text << function;
  ((text << ' ' << parts), ...);
  text << '\n';
  return 0;
}

void* numbered(int number) { return reinterpret_cast<void*>(static_cast<intptr_t>(number)); }

std::string contexts() { return stack.empty() ? "none" : std::to_string(reinterpret_cast<intptr_t>(stack.back())); }
}  // namespace

extern "C" {

void fake_fail(const char* function, int result) {
  const std::lock_guard<std::mutex> guard(mutex);
  failures[function] = result;
}
const char* fake_text() {
  static std::string taken;
  const std::lock_guard<std::mutex> guard(mutex);
  taken = text.str();
  text.str("");
  return taken.c_str();
}
long fake_launched() { return launched; }
int fake_depth() { return static_cast<int>(stack.size()); }

int cuInit(unsigned) { return note("cuInit"); }
int cuDeviceGet(int* device, int index) {
  *device = index;
  return index < 2 ? note("cuDeviceGet", index) : 101;
}
int cuDeviceGetAttribute(int* value, int which, int) {
  static const std::map<int, int> known = {{16, 132}, {38, 50 << 20}, {75, 9}, {76, 0}, {81, 233472}, {97, 232448}};
  *value = known.at(which);
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = numbered(0x100 + device);
  return note("cuDevicePrimaryCtxRetain", device);
}
int cuCtxGetCurrent(void** context) {
  *context = stack.empty() ? nullptr : stack.back();
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  stack.push_back(context);
  return note("push", contexts());
}
int cuCtxPopCurrent_v2(void** context) {
  if (stack.empty()) return 201;
  *context = stack.back();
  stack.pop_back();
  return note("pop");
}
#if !defined(FAKE_OLD) && !defined(FAKE_BEFORE_12)
int cuTensorMapEncodeTiled(void* map, int dtype, unsigned rank, void* base, const uint64_t* sizes,
                           const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave,
                           int swizzle, int promotion, int out_of_bounds) {
  std::ostringstream shape;
  for (unsigned i = 0; i < rank; ++i) shape << (i ? "," : "") << sizes[i] << "/" << box[i] << "/" << steps[i];
  for (unsigned i = 0; i + 1 < rank; ++i) shape << (i ? "," : " ") << strides[i];
  *static_cast<uint64_t*>(map) = 1234;
  return note("cuTensorMapEncodeTiled", dtype, base, shape.str(), interleave, swizzle, promotion, out_of_bounds,
              "aligned", reinterpret_cast<uintptr_t>(map) % 64, "context", contexts());
}
#endif
#ifndef FAKE_OLD
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void**) {
  struct Config {
    unsigned grid[3], block[3], shared;
    void* stream;
    struct {
      int id;
      char padding[4];
      unsigned cluster[16];
    }* attributes;
    unsigned count;
  } c;
  std::memcpy(&c, config, sizeof c);
  const auto& a = c.attributes[0];
  return note("cuLaunchKernelEx", function, c.grid[0], c.grid[1], c.grid[2], c.block[0], c.block[1], c.block[2],
              c.shared, c.stream, "attributes", c.count, "id", a.id, "cluster", a.cluster[0], a.cluster[1],
              a.cluster[2], "argument", *static_cast<int64_t*>(parameters[0]), "context", contexts());
}
#endif
int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // long enough for other threads to come by
  const int result =
      note("cuModuleLoadData", static_cast<const char*>(image), "capture", capture_mode, "context", contexts());
  const std::lock_guard<std::mutex> guard(mutex);
  *module = numbered(result ? 666 : ++modules);
  return result;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  const int result = note("cuModuleGetFunction", module, name);
  const std::lock_guard<std::mutex> guard(mutex);
  *function = numbered(result ? 666 : ++functions);
  return result;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return note("cuFuncSetAttribute", function, attribute, value);
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  return note("cuLaunchKernel", function, x, y, z, bx, by, bz, shared, stream, "argument",
              *static_cast<int64_t*>(parameters[0]), "context", contexts(), extra ? "extra" : "");
}
int cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names = {{100, "CUDA_ERROR_NO_DEVICE"},
                                                   {101, "CUDA_ERROR_INVALID_DEVICE"},
                                                   {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                                                   {500, "CUDA_ERROR_NOT_FOUND"},
                                                   {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}};
  const auto found = names.find(error);
  if (found == names.end()) return 1;
  *name = found->second;
  return 0;
}
}

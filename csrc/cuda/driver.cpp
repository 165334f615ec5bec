// launch.h over the CUDA driver. libcuda is opened at the first use, by name: the module loads where there is none, one
// build serves every driver since CUDA 11.8, and there is no CUDA runtime whose version could differ from torch's. The
// few declarations needed stand here, so that a C++ compiler alone builds this.
//
// A kernel runs in the primary context of the tensor's GPU, which torch's runtime uses too; it is made current for the
// launch when another one is, so callers need no device guard. Binaries come from the loader (fastlm/cuda/_binaries.py)
// at the first launch of each kernel.
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "cuda/launch.h"

namespace fastlm::cuda {
namespace {

using Result = int;
struct Attribute {  // CUlaunchAttribute
  int id;
  char padding[4];
  union {
    char whole[64];
    struct {
      unsigned x, y, z;
    } cluster;
  };
};
struct Config {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};
constexpr int CLUSTER_DIMENSION = 4;   // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
constexpr int MAX_DYNAMIC_SHARED = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int MULTIPROCESSORS = 16, L2_SIZE = 38, MAJOR = 75, MINOR = 76, SHARED_SM = 81, SHARED_BLOCK = 97;

#define FASTLM_DRIVER(X)                                                                                  \
  X(cuInit, "cuInit", (unsigned))                                                                         \
  X(cuDeviceGet, "cuDeviceGet", (int*, int))                                                              \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, int))                                       \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void**, int))                                  \
  X(cuCtxGetCurrent, "cuCtxGetCurrent", (void**))                                                         \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (void*))                                                     \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (void**))                                                      \
  X(cuModuleLoadData, "cuModuleLoadData", (void**, const void*))                                          \
  X(cuModuleGetFunction, "cuModuleGetFunction", (void**, void*, const char*))                             \
  X(cuFuncSetAttribute, "cuFuncSetAttribute", (void*, int, int))                                          \
  X(cuLaunchKernel, "cuLaunchKernel",                                                                     \
    (void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**)) \
  X(cuLaunchKernelEx, "cuLaunchKernelEx", (const Config*, void*, void**, void**))                         \
  X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int*))                       \
  X(cuGetErrorName, "cuGetErrorName", (int, const char**))

/// cuTensorMapEncodeTiled: map, dtype, dimensions, base, sizes, strides in bytes, box, steps within the box,
/// interleave, swizzle, L2 promotion, what is out of bounds.
using EncodeTiled = Result (*)(TensorMap*, int, unsigned, void*, const uint64_t*, const uint64_t*, const unsigned*,
                               const unsigned*, int, int, int, int);
constexpr int MAP_FLOAT16 = 6, MAP_BFLOAT16 = 9;  // CU_TENSOR_MAP_DATA_TYPE_*
constexpr int INTERLEAVE_NONE = 0, ZEROS_OUT_OF_BOUNDS = 0;
constexpr int SWIZZLE_64B = 2, SWIZZLE_128B = 3, L2_PROMOTION_128B = 2;

struct Driver {
  EncodeTiled cuTensorMapEncodeTiled;  // null before 12.0
#define X(name, symbol, parameters) Result(*name) parameters = nullptr;
  FASTLM_DRIVER(X)
#undef X
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
#define X(name, symbol, parameters)                                      \
  name = reinterpret_cast<Result(*) parameters>(dlsym(library, symbol)); \
  if (name == nullptr) throw std::runtime_error("the CUDA driver is older than 11.8: it has no " symbol);
    FASTLM_DRIVER(X)
#undef X
    cuTensorMapEncodeTiled = reinterpret_cast<EncodeTiled>(dlsym(library, "cuTensorMapEncodeTiled"));
    if (const Result result = cuInit(0)) fail(result, "cuInit");
  }
  [[noreturn]] void fail(Result result, const std::string& what) const {
    const char* name = nullptr;
    if (cuGetErrorName(result, &name) != 0 || name == nullptr) name = "an unknown error";
    throw std::runtime_error(what + ": " + name + " (" + std::to_string(result) + ")");
  }
};

const Driver& driver() {
  static const Driver opened;  // one that throws is tried again at the next call
  return opened;
}

void check(Result result, const std::string& what) {
  if (result != 0) driver().fail(result, what);
}

struct Gpu {
  Device properties;
  void* context;
  std::map<std::tuple<std::string, DType>, void*> modules;
};

std::recursive_mutex mutex;    // the loader may come back here
Loader& loader = *new Loader;  // never destroyed: at exit the interpreter that it may hold on to is gone

Gpu& gpu(int index) {
  static std::atomic<Gpu*> gpus[MAX_DEVICES];
  if (index < 0 || index >= MAX_DEVICES)
    throw std::invalid_argument("device must be in [0, " + std::to_string(MAX_DEVICES) + "), got " +
                                std::to_string(index));
  if (Gpu* found = gpus[index].load(std::memory_order_acquire)) return *found;
  const std::lock_guard<std::recursive_mutex> guard(mutex);
  if (Gpu* found = gpus[index].load()) return *found;
  const Driver& cuda = driver();
  int handle = 0;
  check(cuda.cuDeviceGet(&handle, index), "GPU " + std::to_string(index));
  const auto attribute = [&](int which) {
    int value = 0;
    check(cuda.cuDeviceGetAttribute(&value, which, handle), "an attribute of GPU " + std::to_string(index));
    return value;
  };
  auto made = std::make_unique<Gpu>();
  made->properties = {10 * attribute(MAJOR) + attribute(MINOR), attribute(MULTIPROCESSORS), attribute(SHARED_BLOCK),
                      attribute(SHARED_SM), attribute(L2_SIZE)};
  check(cuda.cuDevicePrimaryCtxRetain(&made->context, handle), "the context of GPU " + std::to_string(index));
  gpus[index].store(made.get(), std::memory_order_release);
  return *made.release();  // for as long as the process lives, as the context
}

/// The GPU's context is current while this lives.
class Current {
 public:
  explicit Current(void* context) {
    void* now = nullptr;
    check(driver().cuCtxGetCurrent(&now), "cuCtxGetCurrent");
    pushed_ = now != context;
    if (pushed_) check(driver().cuCtxPushCurrent(context), "cuCtxPushCurrent");
  }
  ~Current() {
    void* gone;
    if (pushed_) driver().cuCtxPopCurrent(&gone);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  bool pushed_;
};

/// While this lives the thread may do what a stream capture of torch's forbids: load a module in the middle of one.
class CaptureRelaxed {
 public:
  CaptureRelaxed() { check(driver().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode"); }
  ~CaptureRelaxed() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  CaptureRelaxed(const CaptureRelaxed&) = delete;
  CaptureRelaxed& operator=(const CaptureRelaxed&) = delete;

 private:
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED; then what it was before
};

/// The kernel's function on this GPU; its context is current.
void* load(Gpu& gpu, const std::string& op, DType dtype, const std::string& instance) {
  const std::lock_guard<std::recursive_mutex> guard(mutex);
  const CaptureRelaxed relaxed;
  void*& module = gpu.modules[{op, dtype}];
  const std::string what = op + " for " + name_of(dtype);
  if (module == nullptr) {
    if (!loader) throw std::runtime_error("no loader of compiled kernels is set");
    const std::string binary = loader(op, name_of(dtype), gpu.properties.arch);
    void* loaded = nullptr;
    check(driver().cuModuleLoadData(&loaded, binary.data()), "loading the kernels of " + what);
    module = loaded;
  }
  void* function = nullptr;
  check(driver().cuModuleGetFunction(&function, module, instance.c_str()), "finding " + instance + " of " + what);
  const int most = static_cast<int>(gpu.properties.shared);
  check(driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, most), "the shared memory of " + instance);
  return function;
}

}  // namespace

const Device& device(int index) { return gpu(index).properties; }

TensorMap tensor_map(DType dtype, const void* base, const std::array<int64_t, 5>& sizes,
                     const std::array<int64_t, 4>& strides, const std::array<int, 5>& box, int swizzle) {
  check_tensor_map(dtype, base, sizes, strides, box, swizzle);
  const EncodeTiled encode = driver().cuTensorMapEncodeTiled;
  if (encode == nullptr)
    throw std::runtime_error("the CUDA driver is older than 12.0: it has no cuTensorMapEncodeTiled");
  uint64_t extents[5], bytes[4];
  unsigned boxes[5];
  const unsigned steps[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < 5; ++i) {
    extents[i] = static_cast<uint64_t>(sizes[i]);
    boxes[i] = static_cast<unsigned>(box[i]);
    if (i > 0) bytes[i - 1] = sizes[i] == 1 ? 16 : 2 * static_cast<uint64_t>(strides[i - 1]);
  }
  void* context = nullptr;  // any will do, but a thread that has used no GPU yet has none
  check(driver().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  const Current current(context != nullptr ? context : gpu(0).context);
  TensorMap map;
  check(encode(&map, dtype == DType::float16 ? MAP_FLOAT16 : MAP_BFLOAT16, 5, const_cast<void*>(base), extents, bytes,
               boxes, steps, INTERLEAVE_NONE, swizzle == 64 ? SWIZZLE_64B : SWIZZLE_128B, L2_PROMOTION_128B,
               ZEROS_OUT_OF_BOUNDS),
        "making a tensor map");
  return map;
}

void set_loader(Loader given) { loader = std::move(given); }

void Kernel::start(DType dtype, int variant, const Grid& grid, const void* arguments, size_t, int device,
                   Stream stream) {
  check_grid(*this, variant, grid);
  if (grid.x == 0 || grid.y == 0) return;
  Gpu& on = gpu(device);
  const Current current(on.context);
  std::atomic<void*>& handle = handles_[device][static_cast<int>(dtype)][variant];
  void* function = handle.load(std::memory_order_acquire);
  if (function == nullptr) {
    function = load(on, op_, dtype, name_ + ("_" + std::to_string(variant)));
    handle.store(function, std::memory_order_release);
  }
  void* parameters[] = {const_cast<void*>(arguments)};
  const unsigned x = static_cast<unsigned>(grid.x), y = static_cast<unsigned>(grid.y);
  const unsigned threads = static_cast<unsigned>(grid.threads), shared = static_cast<unsigned>(grid.shared);
  void* const queue = reinterpret_cast<void*>(stream);
  Result result;
  if (grid.cluster == 1) {
    result = driver().cuLaunchKernel(function, x, y, 1, threads, 1, 1, shared, queue, parameters, nullptr);
  } else {
    Attribute attribute{};
    attribute.id = CLUSTER_DIMENSION;
    attribute.cluster = {static_cast<unsigned>(grid.cluster), 1, 1};
    const Config config{x, y, 1, threads, 1, 1, shared, queue, &attribute, 1};
    result = driver().cuLaunchKernelEx(&config, function, parameters, nullptr);
  }
  if (result != 0) check(result, "launching " + std::string(name_) + "_" + std::to_string(variant));
}

}  // namespace fastlm::cuda

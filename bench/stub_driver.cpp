// A CUDA driver that starts nothing: what csrc/cuda/driver.cpp asks of libcuda.so.1, answered as an H200 would, so that
// the way from Python to the launch can be timed where there is no GPU (bench/launch_cuda.py).
namespace {
int context;
long launched;
}  // namespace

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int* value, int which, int) {
  switch (which) {
    case 16: return *value = 132, 0;         // multiprocessors
    case 38: return *value = 50 << 20, 0;    // L2 cache
    case 75: return *value = 9, 0;           // compute capability 9.0
    case 76: return *value = 0, 0;
    case 81: return *value = 228 << 10, 0;   // shared memory of a multiprocessor
    case 97: return *value = 227 << 10, 0;   // shared memory of a block
    default: return 1;                       // CUDA_ERROR_INVALID_VALUE
  }
}
int cuDevicePrimaryCtxRetain(void** made, int) { return *made = &context, 0; }
int cuCtxGetCurrent(void** found) { return *found = &context, 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuModuleLoadData(void** module, const void*) { return *module = &context, 0; }
int cuModuleGetFunction(void** function, void*, const char*) { return *function = &context, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  return ++launched, 0;
}
int cuLaunchKernelEx(const void*, void*, void**, void**) { return ++launched, 0; }
int cuGetErrorName(int, const char** name) { return *name = "an error of the stub", 0; }

long stub_launched() { return launched; }
}

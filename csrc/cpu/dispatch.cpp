// Which instruction sets this processor can run, and the table of kernels in use. Compiled for the baseline.
#include <stdexcept>

#include "fastlm.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm {

extern const Kernels kernels_generic, kernels_avx2, kernels_avx512, kernels_amx;

namespace {

#if defined(FASTLM_HAVE_AMX)
// Tiles must be asked for: the kernel hands out their 8 KiB of state per thread only to processes that want it.
bool amx_available() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), amx_bf16 = d & (1u << 22);
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool avx512_bf16 = a & (1u << 5);
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return tile && amx_bf16 && avx512_bf16 && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

#if defined(FASTLM_HAVE_AVX2)
bool f16c_available() {  // not among the names that every compiler's __builtin_cpu_supports knows
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
#endif

struct Isa {
  const char* name;
  const Kernels* kernels;
};

std::vector<Isa> detect() {
  std::vector<Isa> found{{"generic", &kernels_generic}};
#if defined(FASTLM_HAVE_AVX2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c_available())
    found.push_back({"avx2", &kernels_avx2});
#endif
#if defined(FASTLM_HAVE_AVX512)
  if (found.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back({"avx512", &kernels_avx512});
#endif
#if defined(FASTLM_HAVE_AMX)
  if (found.size() == 3 && amx_available()) found.push_back({"amx", &kernels_amx});
#endif
  return found;
}

const std::vector<Isa>& available() {
  static const std::vector<Isa> found = detect();
  return found;
}

const Isa* active = nullptr;

const Isa& current() {
  if (!active) active = &available().back();
  return *active;
}

}  // namespace

const Kernels& kernels() { return *current().kernels; }

std::string isa() { return current().name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : available()) names.push_back(isa.name);
  return names;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names{"generic"};
#if defined(FASTLM_HAVE_AVX2)
  names.push_back("avx2");
#endif
#if defined(FASTLM_HAVE_AVX512)
  names.push_back("avx512");
#endif
#if defined(FASTLM_HAVE_AMX)
  names.push_back("amx");
#endif
  return names;
}

void set_isa(const std::string& name) {
  for (const Isa& isa : available())
    if (name == isa.name) {
      active = &isa;
      return;
    }
  std::string allowed;
  for (const Isa& isa : available()) allowed += std::string(allowed.empty() ? "" : ", ") + isa.name;
  throw std::invalid_argument("isa must be one of " + allowed + ", got '" + name + "'");
}

}  // namespace fastlm

// Compiled once per instruction set: fills that set's table of kernels. A kernel that has no AMX variant keeps its
// AVX-512 one there.
#include "fastlm.h"

#define FASTLM_JOIN_(a, b) a##b
#define FASTLM_JOIN(a, b) FASTLM_JOIN_(a, b)

namespace fastlm {

#ifdef __AMX_BF16__
#define X(name, top)                      \
  namespace top {                         \
  extern decltype(FASTLM_ISA::name) name; \
  }
FASTLM_KERNELS(X)
#undef X
#define PICK(name, top) top::name,
#else
#define PICK(name, top) FASTLM_ISA::name,
#endif

extern const Kernels FASTLM_JOIN(kernels_, FASTLM_ISA);
const Kernels FASTLM_JOIN(kernels_, FASTLM_ISA) = {FASTLM_KERNELS(PICK)};

}  // namespace fastlm

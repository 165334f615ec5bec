// glu: what launcher and kernels share.
#pragma once
#include "cuda/elementwise.h"

namespace fastlm::cuda {

using GluForward = Elementwise<2, 1>;   // gate, up; y
using GluBackward = Elementwise<3, 2>;  // dy, gate, up; dgate, dup

}  // namespace fastlm::cuda

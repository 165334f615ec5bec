// gelu: what launcher and kernels share.
#pragma once
#include "cuda/elementwise.h"

namespace fastlm::cuda {

using GeluForward = Elementwise<1, 1>;   // x; y
using GeluBackward = Elementwise<2, 1>;  // dy, x; dx

}  // namespace fastlm::cuda

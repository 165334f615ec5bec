// The only file that includes pybind11. No logic: every kernel takes its pointers as integers, releases the GIL and
// calls the table of the instruction set in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fastlm.h"

namespace py = pybind11;
using namespace fastlm;

namespace {

template <class T>
struct Arg {  // what Python passes for a parameter of type T
  using type = T;
  static T cast(T value) { return value; }
};
template <class T>
struct Arg<T*> {
  using type = std::uintptr_t;
  static T* cast(std::uintptr_t value) { return reinterpret_cast<T*>(value); }
};
template <>
struct Arg<DType> {
  using type = int32_t;
  static DType cast(int32_t value) { return static_cast<DType>(value); }
};
template <>
struct Arg<Activation> {
  using type = int32_t;
  static Activation cast(int32_t value) { return static_cast<Activation>(value); }
};

template <class... A>
void bind(py::module_& m, const char* name, void (*Kernels::*kernel)(A...)) {
  m.def(
      name, [kernel](typename Arg<A>::type... args) { (kernels().*kernel)(Arg<A>::cast(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastlm's CPU kernels: raw pointers, sizes, strides, dtype values. See csrc/fastlm.h; use fastlm.ops.";
#define X(name, top) bind(m, #name, &Kernels::name);
  FASTLM_KERNELS(X)
#undef X
  m.def("isas", &isas);
  m.def("built_isas", &built_isas);
  m.def("isa", &isa);
  m.def("set_isa", &set_isa);
  m.def("norm_scratch", &norm_scratch);
  m.def("attention_forward_scratch", &attention_forward_scratch);
  m.def("attention_scratch", &attention_scratch);
  m.def("cross_entropy_room", &cross_entropy_room);
}

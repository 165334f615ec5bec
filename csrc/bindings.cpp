// The only file that includes pybind11. No logic: every kernel takes its pointers as integers, releases the GIL and
// calls the table of the instruction set in use. Compiled once for fastlm._C and, with FASTLM_CUDA, once for
// fastlm._cuda, which starts kernels on a GPU (with FASTLM_EMULATED too: on their emulation, for tests).
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "fastlm.h"
#ifdef FASTLM_CUDA
#include "cuda/launch.h"
#endif
#ifdef FASTLM_EMULATED
#include "cuda/emulation/emulator.h"
#endif

namespace py = pybind11;
using namespace fastlm;
using namespace pybind11::literals;

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
template <>
struct Arg<AttentionOptions> {  // None for what most calls ask: no option at all
  using Tuple = std::tuple<int64_t, float, std::uintptr_t, int64_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                           std::uintptr_t, bool, std::uintptr_t, std::uintptr_t, int64_t, int64_t, int64_t>;
  using type = std::optional<Tuple>;
  static AttentionOptions cast(const type& value) {
    if (!value) return {int64_t(1) << 40, 0.f, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    const auto& [left, softcap, alibi, alibi_batch, sinks, dsinks, documents_q, documents_k, wide, cu_q, cu_k,
                 sequences, longest_q, longest_k] = *value;
    const auto floats = [](std::uintptr_t p) { return reinterpret_cast<float*>(p); };
    const auto integers = [](std::uintptr_t p) { return reinterpret_cast<const int32_t*>(p); };
    return {left,
            softcap,
            floats(alibi),
            alibi_batch,
            floats(sinks),
            floats(dsinks),
            reinterpret_cast<const void*>(documents_q),
            reinterpret_cast<const void*>(documents_k),
            wide,
            integers(cu_q),
            integers(cu_k),
            sequences,
            longest_q,
            longest_k};
  }
};

#ifdef FASTLM_CUDA
template <>
struct Arg<cuda::AttentionCall> {
  using Address = std::uintptr_t;
  using type =
      std::tuple<int32_t, Address, Strides, Address, Strides, Address, Strides, Address, int32_t, Strides, Address,
                 std::array<int64_t, 7>, bool, int64_t, Arg<AttentionOptions>::type, float, double, bool>;
  static cuda::AttentionCall cast(const type& value) {
    const auto& [dtype, q, q_strides, k, k_strides, v, v_strides, mask, mask_type, mask_strides, seed, sizes,
                 bottom_right, right, options, scale, dropout, hopper] = value;
    const auto at = [](Address p) { return reinterpret_cast<const void*>(p); };
    const auto& [B, H, Hk, S, T, D, Dv] = sizes;
    return {static_cast<DType>(dtype),
            at(q),
            q_strides,
            at(k),
            k_strides,
            at(v),
            v_strides,
            at(mask),
            mask_type,
            mask_strides,
            static_cast<const int64_t*>(at(seed)),
            B,
            H,
            Hk,
            S,
            T,
            D,
            Dv,
            bottom_right,
            right,
            Arg<AttentionOptions>::cast(options),
            scale,
            dropout,
            hopper};
  }
};

template <class R, class... A>
void bind(py::module_& m, const char* name, R (*launcher)(A...)) {
  m.def(
      name, [launcher](typename Arg<A>::type... args) { return launcher(Arg<A>::cast(args)...); },
      py::call_guard<py::gil_scoped_release>());
}
#else
template <class... A>
void bind(py::module_& m, const char* name, void (*Kernels::*kernel)(A...)) {
  m.def(
      name, [kernel](typename Arg<A>::type... args) { (kernels().*kernel)(Arg<A>::cast(args)...); },
      py::call_guard<py::gil_scoped_release>());
}
#endif

}  // namespace

#ifdef FASTLM_CUDA
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastlm's CUDA launchers: raw pointers, sizes, strides, dtype values, GPU, stream. See csrc/fastlm.h.";
#define X(name) bind(m, #name, &cuda::name);
  FASTLM_CUDA_KERNELS(X)
#undef X
  m.def("device", [](int index) {
    const cuda::Device& d = [index]() -> const cuda::Device& {
      const py::gil_scoped_release unlocked;  // whoever holds the launchers' lock may be waiting for the interpreter's
      return cuda::device(index);
    }();
    return py::dict("arch"_a = d.arch, "sms"_a = d.sms, "shared"_a = d.shared, "shared_sm"_a = d.shared_sm,
                    "l2"_a = d.l2);
  });
  // Called without the lock of the interpreter; the wrapper that pybind11 makes of a callable takes it.
  m.def("set_loader", [](std::function<py::bytes(std::string, std::string, int)> loader) {
    cuda::set_loader([loader](const std::string& op, const std::string& dtype, int arch) {
      const py::gil_scoped_acquire lock;
      return std::string(loader(op, dtype, arch));
    });
  });
#ifdef FASTLM_EMULATED
  m.def(
      "emulate",
      [](const std::string& order, int arch, int sms, int64_t shared, int64_t shared_sm, int64_t l2) {
        cuda::emulate(order, {arch, sms, shared, shared_sm, l2});
      },
      "order"_a, "arch"_a = 90, "sms"_a = 4, "shared"_a = 227 << 10, "shared_sm"_a = 228 << 10, "l2"_a = 50 << 20);
  m.def("record", &cuda::record);
  m.def("records", &cuda::records);
  m.def("tail", &cuda::tail);
  m.def("trace", &cuda::trace);
  m.def("traces", &cuda::traces);
  m.def("instances", &cuda::instances);
#endif
}
#else
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
  m.def("attention_longest", [](std::uintptr_t cu_seqlens, int64_t sequences, int64_t total) {
    return attention_longest(reinterpret_cast<const int32_t*>(cu_seqlens), sequences, total);
  });
  m.def("cross_entropy_room", &cross_entropy_room);
  m.def("linear_room", &linear_room);
}
#endif

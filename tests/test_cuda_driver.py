"""csrc/cuda/driver.cpp over a CUDA driver that records what it is asked for (tests/driver/fake.cpp). No GPU.

Each test is a process of its own, because a process opens the driver once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastlm import cuda

ROOT = Path(__file__).resolve().parent.parent
if sys.platform != "linux" or shutil.which("g++") is None:
    pytest.skip("needs Linux and g++", allow_module_level=True)

PRELUDE = """
import ctypes, importlib.machinery, importlib.util, sys, threading

probe = ctypes.CDLL("{folder}/libprobe.so")
probe.launch.restype = probe.properties.restype = probe.map.restype = ctypes.c_char_p

def launch(kernel=0, dtype=1, variant=0, x=7, y=1, threads=128, cluster=1, shared=0, argument=42, device=0, stream=0):
    long = ctypes.c_int64
    said = probe.launch(kernel, dtype, variant, long(x), long(y), threads, cluster, long(shared), long(argument),
                        device, ctypes.c_uint64(stream))
    return said.decode() if said else None

def properties(index):
    values = (ctypes.c_int64 * 5)()
    said = probe.properties(index, values)
    return said.decode() if said else list(values)

def tensor_map(dtype=1, base=0x1000, sizes=(64, 1, 100, 8, 2), strides=(0, 512, 64, 51200), box=(64, 1, 128, 1, 1),
               swizzle=128):
    first, long = ctypes.c_uint64(), ctypes.c_int64
    said = probe.map(dtype, long(base), (long * 5)(*sizes), (long * 4)(*strides), (ctypes.c_int * 5)(*box), swizzle,
                     ctypes.byref(first))
    return said.decode() if said else first.value

def driver():  # the one that driver.cpp opens
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_text.restype = ctypes.c_char_p
    return library

def calls(*names):
    lines = driver().fake_text().decode().splitlines()
    return [line.strip() for line in lines if not names or line.split()[0] in names]

def extension():  # fastlm._cuda without fastlm, which would import torch
    loader = importlib.machinery.ExtensionFileLoader("fastlm._cuda", "{extension}")
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fastlm._cuda", loader))
    loader.exec_module(module)
    return module

probe.set_loads(True)
"""


def build(folder: Path, name: str, *arguments: object) -> None:
    command = ["g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
    subprocess.run([*command, "-o", folder / name, *map(str, arguments), "-ldl"], check=True)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    cuda_sources = [ROOT / "csrc" / "cuda" / name for name in ("driver.cpp", "launch.cpp")]
    build(folder, "libprobe.so", ROOT / "tests" / "driver" / "probe.cpp", *cuda_sources, f"-I{ROOT / 'csrc'}")
    for name, flags in (("fake", ()), ("old", ("-DFAKE_OLD",)), ("before_12", ("-DFAKE_BEFORE_12",))):
        (folder / name).mkdir()
        build(folder / name, "libcuda.so.1", ROOT / "tests" / "driver" / "fake.cpp", *flags)
    return folder


def run(libraries: Path, code: str, driver: str = "fake") -> None:
    """The asserts of the code, in a process that has this driver."""
    extension = ROOT / "fastlm" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    text = PRELUDE.replace("{folder}", str(libraries)).replace("{extension}", str(extension)) + code
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["LD_LIBRARY_PATH"] = str(libraries / driver)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_first_launch_loads_and_later_ones_only_launch(libraries: Path) -> None:
    run(
        libraries,
        """
assert launch(variant=3, x=5, y=2, threads=256, shared=1024, argument=77, stream=0xabc) is None
assert calls() == [
    "cuInit", "cuDeviceGet 0", "cuDevicePrimaryCtxRetain 0", "push 256",
    "cuModuleLoadData probe.bfloat16.90 capture 2 context 256", "cuModuleGetFunction 0x1 first_3",
    "cuFuncSetAttribute 0x1 8 232448",
    "cuLaunchKernel 0x1 5 2 1 256 1 1 1024 0xabc argument 77 context 256", "pop",
]
assert launch(variant=3) is None
assert calls() == ["push 256", "cuLaunchKernel 0x1 7 1 1 128 1 1 0 0 argument 42 context 256", "pop"]
""",
    )


def test_one_module_for_all_kernels_of_an_op_dtype_and_gpu(libraries: Path) -> None:
    run(
        libraries,
        """
for device in (0, 1):
    for dtype in (0, 1, 2):
        for kernel in (0, 1):
            for variant in (0, 63):
                assert launch(kernel, dtype, variant, device=device) is None
loads = calls("cuModuleLoadData", "cuModuleGetFunction", "cuDevicePrimaryCtxRetain")
assert sum("cuModuleLoadData" in line for line in loads) == 6, loads
assert sum("cuModuleGetFunction" in line for line in loads) == 24
assert sum("cuDevicePrimaryCtxRetain" in line for line in loads) == 2
assert {line.split()[1] for line in loads if "LoadData" in line} == {
    f"probe.{dtype}.90" for dtype in ("float32", "bfloat16", "float16")}
for device in (1, 0):
    assert launch(1, 2, 63, device=device) is None
    (line,) = calls("cuLaunchKernel")
    assert line.endswith(f"context {256 + device}"), line
""",
    )


def test_the_context_of_the_tensor_is_current_and_then_the_old_one_again(libraries: Path) -> None:
    run(
        libraries,
        """
assert launch(device=1) is None  # no context is current: torch has not touched a GPU in this thread
assert driver().fake_depth() == 0
cuda = driver()
calls()
cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(256))
assert launch(device=0) is None and launch(device=0) is None
assert calls("push", "pop") == ["push 256"]  # it was current already
assert launch(device=1) is None
assert calls("push", "pop") == ["push 257", "pop"] and cuda.fake_depth() == 1
cuda.fake_fail(b"cuLaunchKernel", 701)
assert "first_0: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701)" in launch(device=1)
assert calls("push", "pop") == ["push 257", "pop"] and cuda.fake_depth() == 1
""",
    )


def test_clusters(libraries: Path) -> None:
    run(
        libraries,
        """
assert launch(x=24, cluster=8, threads=512, shared=4096, stream=0xabc) is None
(line,) = calls("cuLaunchKernelEx", "cuLaunchKernel")
assert line == ("cuLaunchKernelEx 0x1 24 1 1 512 1 1 4096 0xabc attributes 1 id 4 cluster 8 1 1 argument 42 "
                "context 256"), line
driver().fake_fail(b"cuLaunchKernelEx", 701)
assert "launching first_0: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701)" == launch(x=8, cluster=8)
""",
    )


def test_nothing_is_launched_for_nothing(libraries: Path) -> None:
    run(
        libraries,
        """
assert launch(x=0) is None and launch(y=0) is None and not calls()
for wrong in ({"x": 2**31}, {"y": 65536}, {"threads": 33}, {"threads": 2048}, {"variant": 64}, {"cluster": 3},
              {"x": 7, "cluster": 2}, {"x": -1}, {"shared": -1}):
    assert "got" in launch(**wrong), wrong
assert not calls()
assert "device must be in [0, 16), got 16" == launch(device=16)
assert "got -1" in launch(device=-1)
""",
    )


def test_properties(libraries: Path) -> None:
    run(
        libraries,
        """
assert properties(1) == [90, 132, 232448, 233472, 50 << 20]
assert properties(2) == "GPU 2: CUDA_ERROR_INVALID_DEVICE (101)"
assert properties(16) == "device must be in [0, 16), got 16"
""",
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cuModuleLoadData", "loading the kernels of probe for float16: CUDA_ERROR_NO_BINARY_FOR_GPU (209)"),
        ("cuModuleGetFunction", "finding second_5 of probe for float16: CUDA_ERROR_NO_BINARY_FOR_GPU (209)"),
        ("cuFuncSetAttribute", "the shared memory of second_5: CUDA_ERROR_NO_BINARY_FOR_GPU (209)"),
        ("cuDevicePrimaryCtxRetain", "the context of GPU 1: CUDA_ERROR_NO_BINARY_FOR_GPU (209)"),
    ],
)
def test_what_fails_is_named_and_tried_again(function: str, message: str, libraries: Path) -> None:
    run(
        libraries,
        f"""
driver().fake_fail(b"{function}", 209)
for _ in range(2):
    said = launch(1, 2, 5, device=1)
    assert said == "{message}", said
driver().fake_fail(b"{function}", 0)
calls()
assert launch(1, 2, 5, device=1) is None
(line,) = calls("cuLaunchKernel")
assert "0x29a" not in line  # what a failing call left behind
""",
    )


def test_an_error_without_a_name(libraries: Path) -> None:
    run(
        libraries,
        """
driver().fake_fail(b"cuLaunchKernel", 12345)
assert launch() == "launching first_0: an unknown error (12345)"
""",
    )


def test_without_a_loader(libraries: Path) -> None:
    run(
        libraries,
        """
probe.set_loads(False)
assert launch() == "no loader of compiled kernels is set"
probe.set_loads(True)
assert launch() is None
""",
    )


def test_a_driver_without_gpus(libraries: Path) -> None:
    run(
        libraries,
        """
driver().fake_fail(b"cuInit", 100)
assert launch() == properties(0) == "cuInit: CUDA_ERROR_NO_DEVICE (100)"
driver().fake_fail(b"cuInit", 0)
assert launch() is None
""",
    )


def test_a_driver_that_is_too_old(libraries: Path) -> None:
    run(libraries, """
assert launch() == "the CUDA driver is older than 11.8: it has no cuLaunchKernelEx"
assert launch() == properties(0)
""", driver="old")  # fmt: skip


def test_a_tensor_map(libraries: Path) -> None:
    """The enums are those of cuda.h: bfloat16 9, float16 6; swizzles 2 and 3; 2 for an L2 promotion of 128 bytes."""
    run(
        libraries,
        """
cuda = driver()
cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(257))
calls()
assert tensor_map() == 1234
(line,) = calls("cuTensorMapEncodeTiled", "push")  # a dimension of size 1 gets a stride that the driver takes
assert line == ("cuTensorMapEncodeTiled 9 0x1000 64/64/1,1/1/1,100/128/1,8/1/1,2/1/1 16,1024,128,102400 0 3 2 0 "
                "aligned 0 context 257"), line
assert tensor_map(2, 0x20, (2**32, 4, 3, 2, 2), (2**39 - 8, 8, 16, 24), (32, 256, 1, 2, 3), 64) == 1234
(line,) = calls("cuTensorMapEncodeTiled", "push")
assert line == ("cuTensorMapEncodeTiled 6 0x20 4294967296/32/1,4/256/1,3/1/1,2/2/1,2/3/1 "
                "1099511627760,16,32,48 0 2 2 0 aligned 0 context 257"), line
cuda.fake_fail(b"cuTensorMapEncodeTiled", 101)
assert tensor_map() == "making a tensor map: CUDA_ERROR_INVALID_DEVICE (101)"
""",
    )


def test_a_tensor_map_needs_some_context(libraries: Path) -> None:
    run(
        libraries,
        """
assert tensor_map() == 1234
assert [line.split()[0] for line in calls()][-3:] == ["push", "cuTensorMapEncodeTiled", "pop"]
""",
    )


def test_what_the_copy_engine_does_not_take(libraries: Path) -> None:
    run(
        libraries,
        """
def changed(values, at, value):
    return (*values[:at], value, *values[at + 1:])
sizes, strides, box = (64, 2, 100, 8, 2), (64, 512, 64, 51200), (64, 1, 128, 1, 1)
wrong = {
    "the dtype must have 16 bits, got float32": {"dtype": 0},
    "the address must be a multiple of 16 bytes, got 4104": {"base": 0x1008},
    "the swizzle must be 64 or 128 bytes, got 32": {"swizzle": 32},
    "the size of dimension 2 must be in [1, 2^32], got 0": {"sizes": changed(sizes, 2, 0)},
    "the size of dimension 0 must be in [1, 2^32], got 4294967297": {"sizes": changed(sizes, 0, 2**32 + 1)},
    "the box of dimension 4 must be in [1, 256], got 0": {"box": changed(box, 4, 0)},
    "the box of dimension 2 must be in [1, 256], got 257": {"box": changed(box, 2, 257)},
    "a row of the box must be a multiple of 8 elements within the swizzle, got 72": {"box": changed(box, 0, 72)},
    "a row of the box must be a multiple of 8 elements within the swizzle, got 60": {"box": changed(box, 0, 60)},
}
for at, value in ((0, 0), (1, -512), (2, 68), (3, 2**39)):
    said = f"the stride of dimension {at + 1} must be a multiple of 8 elements in (0, 2^39), got {value}"
    wrong[said] = {"strides": changed(strides, at, value)}
for message, given in wrong.items():
    said = tensor_map(**{"sizes": sizes, "strides": strides, "box": box, **given})
    assert said == "a tensor map: " + message, said
said = tensor_map(sizes=sizes, strides=strides, box=box, swizzle=64)
assert said == "a tensor map: a row of the box must be a multiple of 8 elements within the swizzle, got 64"
assert not calls()
""",
    )


def test_a_driver_before_tensor_maps_does_the_rest(libraries: Path) -> None:
    run(libraries, """
assert tensor_map() == "the CUDA driver is older than 12.0: it has no cuTensorMapEncodeTiled"
assert launch() is None
""", driver="before_12")  # fmt: skip


def test_no_driver(libraries: Path) -> None:
    if any(Path(folder, "libcuda.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")):
        pytest.skip("this machine has one")
    run(libraries, """
assert "no CUDA driver: libcuda.so.1" in launch()
assert "no CUDA driver: libcuda.so.1" in properties(0)
assert launch(x=0) is None
""", driver="none")  # fmt: skip


def test_many_threads_at_once(libraries: Path) -> None:
    run(
        libraries,
        """
wrong = []
ready = threading.Barrier(16)
def work(i):
    ready.wait()
    for n in range(200):
        said = launch(n % 2, n % 3, n % 4, argument=i, device=n // 7 % 2)
        if said or driver().fake_depth():
            wrong.append(said)
threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
lines = calls("cuInit", "cuModuleLoadData", "cuLaunchKernel", "cuDevicePrimaryCtxRetain")
count = lambda name: sum(line.startswith(name + " ") or line == name for line in lines)
assert (count("cuInit"), count("cuDevicePrimaryCtxRetain"), count("cuModuleLoadData")) == (1, 2, 6)
assert count("cuLaunchKernel") == 16 * 200
""",
    )


# --- fastlm._cuda itself ---------------------------------------------------------------------------------------------

built = pytest.mark.skipif(not cuda.built(), reason=str(cuda.missing()))
WHERE = """
module = extension()
loads = []
def load(op, dtype, arch):
    loads.append((op, dtype, arch))
    return f"{op}.{dtype}.{arch}".encode()
"""


@built
def test_the_extension_launches(libraries: Path) -> None:
    run(libraries, WHERE + """
assert not calls()  # importing it opens no driver
module.set_loader(load)
assert module.device(0) == {"arch": 90, "sms": 132, "shared": 232448, "shared_sm": 233472, "l2": 50 << 20}
module.gelu_forward(1, 1, 0x1000, 0x2000, 4097, 1, 0xabc)
module.gelu_forward(1, 1, 0x1000, 0x2000, 4097, 1, 0xabc)
assert loads == [("gelu", "bfloat16", 90)]
lines = calls("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel")
assert lines[0] == "cuModuleLoadData gelu.bfloat16.90 capture 2 context 257"
assert lines[1].startswith("cuModuleGetFunction 0x1 gelu_forward_")
assert len(lines) == 4 and lines[2] == lines[3], lines
assert lines[2].startswith("cuLaunchKernel 0x1 ") and lines[2].endswith(" 0xabc argument 4096 context 257"), lines
""")  # fmt: skip


@built
def test_what_the_loader_raises_arrives(libraries: Path) -> None:
    run(
        libraries,
        WHERE
        + """
def refuse(op, dtype, arch):
    raise ImportError(f"none for {arch}")
module.set_loader(refuse)
for _ in range(2):
    try:
        module.gelu_forward(0, 1, 0, 0, 8, 0, 0)
        raise SystemExit("it was launched")
    except ImportError as error:
        assert str(error) == "none for 90"
assert driver().fake_depth() == 0
""",
    )


@built
def test_threads_that_load_do_not_wait_for_each_other_forever(libraries: Path) -> None:
    """The interpreter's lock and the launchers': device() once held the first while it waited for the second."""
    run(
        libraries,
        WHERE
        + """
import time
inside = threading.Event()
def slow(op, dtype, arch):
    inside.set()
    time.sleep(0.3)  # gives up the interpreter's lock, as compiling does
    return load(op, dtype, arch)
module.set_loader(slow)
first = threading.Thread(target=module.gelu_forward, args=(0, 1, 0, 0, 8, 0, 0))
first.start()
inside.wait()
others = [threading.Thread(target=module.device, args=(1,), daemon=True),
          threading.Thread(target=module.gelu_backward, args=(2, 1, 0, 0, 0, 8, 1, 0), daemon=True)]
for thread in others: thread.start()
for thread in (first, *others): thread.join()
assert len(loads) == 2
""",
    )

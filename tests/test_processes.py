"""Threads, forks and instruction sets: what goes wrong between calls, seen in processes of their own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastlm import native

ROOT = Path(__file__).resolve().parent.parent
HEAD = "import os, signal, sys, threading, torch\nfrom tests import every_op\ntorch.set_num_threads(2)\n"
NEEDS_EXTENSION = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def python(code: str) -> str:
    """Runs it; a process that hangs is killed by its own alarm, which says where it hung."""
    head = f"import faulthandler; faulthandler.dump_traceback_later(200, exit=True)\n{HEAD}"
    done = subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@NEEDS_EXTENSION
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_can_call_every_op() -> None:
    """Its parent's threads are not there any more: a parallel region would wait for them for ever, as torch's do."""
    assert "child 0" in python("""
first = every_op.run()
child = os.fork()
if child == 0:
    signal.alarm(100)
    wrong = every_op.different(first, every_op.run())
    print(wrong, file=sys.stderr)
    os._exit(len(wrong))
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")


@NEEDS_EXTENSION
@pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked")
def test_a_worker_of_a_loader_can_call_every_op() -> None:
    assert "[] []" in python("""
first = every_op.run()
class Data(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return every_op.different(first, every_op.run())
options = dict(batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=100)
loader = torch.utils.data.DataLoader(Data(), **options)
print(*loader)
""")


@NEEDS_EXTENSION
def test_python_threads_at_once_give_the_same_bits_whatever_they_set() -> None:
    """The number of threads is a setting of each thread, and may change at any time."""
    assert "wrong []" in python("""
first, wrong = every_op.run(), []
def work(count):
    try:
        for _ in range(2):
            torch.set_num_threads(count)
            wrong.extend(every_op.different(first, every_op.run()))
    except BaseException as error:
        wrong.append(repr(error))
workers = [threading.Thread(target=work, args=[count]) for count in (1, 2, 3)]
for worker in workers: worker.start()
for worker in workers: worker.join()
torch.set_num_threads(5)
wrong.extend(every_op.different(first, every_op.run()))
print("wrong", wrong)
""")


@NEEDS_EXTENSION
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_new_python_thread_keeps_to_one_thread() -> None:
    """OpenMP's setting is one of each thread: a new one would start as many as there are cores."""
    assert "grown 0" in python("""
torch.set_num_threads(1)
def count(): return len(os.listdir("/proc/self/task"))
found = []
def work():
    before = count()
    for name, call in every_op.calls().items():
        if "linear" not in name: call()  # its products are torch's
    found.append(count() - before)
worker = threading.Thread(target=work)
worker.start(); worker.join()
print("grown", *found)
""")


def instructions(path: Path) -> Iterator[tuple[bytes, str]]:
    """Each instruction of an object file: its bytes without segment and address prefixes, and its text."""
    done = subprocess.run(["objdump", "-d", "--insn-width=16", path], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        _, tab, rest = line.partition("\t")
        code, tab, text = rest.partition("\t")
        if tab:
            yield bytes.fromhex(code).lstrip(b"\x2e\x36\x3e\x26\x64\x65\x67"), text


VEX, EVEX = (0xC4, 0xC5), (0x62,)  # first bytes, in 64-bit code never of anything else
TILES = re.compile(r"\b(tdp\w+|tile\w+|(ld|st)tilecfg|vdpbf16ps|vcvtne2?ps2bf16\w?)\b")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_objects_hold_no_instruction_of_a_larger_set(isa: str) -> None:
    """The proof that a processor without AVX-512, or without AVX, never sees one: no instruction has its encoding."""
    objects = [p for p in (ROOT / "build").glob("temp*/*.o") if p.name.split(".")[-2] == isa]
    if isa == "generic":
        objects += [p for p in (ROOT / "build").glob("temp*/*.o") if p.name in ("dispatch.o", "bindings.o")]
    if not objects or native.missing():
        pytest.skip("the extension was not built from this folder")
    if not any(
        "x86-64" in subprocess.run(["objdump", "-f", p], capture_output=True, text=True).stdout for p in objects
    ):
        pytest.skip("not x86-64")
    forbidden = {"generic": VEX + EVEX, "avx2": EVEX, "avx512": ()}[isa]
    for path in objects:
        wrong = [t for code, t in instructions(path) if (code[:1] and code[0] in forbidden) or TILES.search(t)]
        assert not wrong, f"{path.name}: {wrong[:3]}"

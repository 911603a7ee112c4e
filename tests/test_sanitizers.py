"""`make sanitize`: all C++ with checked memory and arithmetic, and its tables from many threads.

The address sanitizer has to be in the process before anything else, so what uses torch runs in
processes of its own. Leaks are not looked for: torch's would drown ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from spectral_kernels import _extension
from test_tiles import ALL

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
TILES = ROOT / "tests" / "tiles"
ISA = sorted((ROOT / "csrc" / "cpu" / "isa").glob("*.cpp"))
FLAGS = ("-std=c++17", "-O1", "-g1", "-ffp-contract=fast", "-fno-wrapv", "-w", "-pthread")
# torch is built without what the check of virtual tables needs.
CHECKED = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
# What is quick under the sanitizers, and together calls every operator in every dtype and layout.
SELECTION = (
    *("test_red_zones.py::test_margins_of_every_tensor_stay", "test_symmetric_matmul.py"),
    *("test_kron_factor.py", "test_workspace.py", "test_eigendecomposition.py"),
)


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def program(folder: Path, flags: str, *sources: Path) -> str:
    if shutil.which(compiler()) is None:
        pytest.skip(f"there is no {compiler()}")
    out = str(folder / "program")
    run([compiler(), *FLAGS, *flags.split(), *map(str, (*sources, *ISA)), "-o", out])
    return out


def test_eight_threads_do_not_race(tmp_path):
    driver = program(tmp_path, "-fsanitize=thread", TILES / "threads.cpp")
    said = run([driver, "10000"], TSAN_OPTIONS="halt_on_error=1")
    assert said == "8 threads, 10000 calls each: 8 checks, 0 failures\n"


def test_micro_kernels_with_checked_memory(tmp_path):
    if _extension.MODULE is None:
        pytest.skip(_extension.REASON)
    checked = program(tmp_path, CHECKED, *ALL)
    for isa in _extension.MODULE.supported_isas():
        assert run([checked, isa]).endswith(" 0 failures\n")


def preloaded() -> dict[str, str]:
    """The environment of a Python process that loads what was built with the sanitizers."""
    # The sanitizer looks for `__cxa_throw` when it starts, which Python itself does not bring.
    names = ("libasan.so", "libstdc++.so")
    libraries = [run([compiler(), f"-print-file-name={name}"]).strip() for name in names]
    return {
        "LD_PRELOAD": " ".join(str(Path(library).resolve()) for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def test_the_extension_with_checked_memory():
    """A build of its own, which changes nothing in the checkout, and a part of the tests on it."""
    if shutil.which(compiler()) is None:
        pytest.skip(f"there is no {compiler()}")
    base = ROOT / "build" / "sanitize"
    site = base / "site"
    run(
        [
            *(sys.executable, "setup.py", "build"),
            *("--build-base", str(base), "--build-lib", str(site)),
        ],
        CFLAGS=f"{CHECKED} -fno-omit-frame-pointer",
        LDFLAGS="-fsanitize=address,undefined",
        SPECTRAL_KERNELS_CUDA="0",
    )
    environment = {**preloaded(), "PYTHONPATH": str(site)}
    said = run(
        [sys.executable, "-P", "-c", "import spectral_kernels as sk; print(sk.__file__)"],
        **environment,
    )
    assert said.startswith(str(site))
    selection = [str(ROOT / "tests" / name) for name in SELECTION]
    # What the sanitizer says before it ends the process is said, not captured.
    pytest_ = [sys.executable, "-P", "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    # It keeps what is freed for a while, so memory does grow.
    grows = "not memory_does_not_grow"
    run([*pytest_, "-m", "not long", "-k", grows, *selection], **environment)


def test_the_cuda_kernels_with_checked_memory():
    """In their emulation. Its fibers switch stacks, so only heap and globals are checked."""
    code = (
        "import torch, emulated_cuda, test_cuda_emulation as t\n"
        "torch.set_num_threads(1)\n"
        "with emulated_cuda.emulated(): t.workload()"
    )
    environment = preloaded()
    environment["ASAN_OPTIONS"] += ":detect_stack_use_after_return=0"
    run(
        [sys.executable, "-P", "-c", code],
        **environment,
        PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)]),
        SPECTRAL_KERNELS_EMULATION_FLAGS="-O1 -fsanitize=address --param asan-stack=0",
    )

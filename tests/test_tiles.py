"""The micro-kernels without torch: plain loops in C++ beside them, other processors emulated."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from spectral_kernels import _extension
from support.fuzzing import refusal

HERE = Path(__file__).parent / "tiles"
ISA = HERE.parent.parent / "csrc" / "cpu" / "isa"
PARTS = ("all", "products", "packing", "elementwise", "reflections", "eigen")
ALL = [HERE / f"{name}.cpp" for name in PARTS]
EMULATED_AMX = [HERE / "emulated_amx.cpp", HERE / "products.cpp", ISA / "amx.cpp"]
# As setup.py has them, but for what only costs time here.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=fast", "-fno-wrapv", "-Wall", "-Wextra", "-Wno-psabi")
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a program, once."""
    folder = tmp_path_factory.mktemp("tiles")
    built: dict[tuple[str, ...], Path] = {}

    def compiled(compiler: str, sources: list[Path], *flags: str) -> Path:
        if shutil.which(compiler) is None:
            pytest.skip(f"there is no {compiler}")
        command = (compiler, *FLAGS, *flags, *map(str, sources))
        if command not in built:
            program = folder / f"program{len(built)}"
            done = subprocess.run([*command, "-o", program], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            built[command] = program
        return built[command]

    return compiled


def native() -> str:
    return os.environ.get("CXX", "c++")


def passed(*command: str | Path) -> str:
    """What the program says, after a run without failures."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    checks = int(run.stdout.split()[-4])
    assert checks > 100 and run.stdout.endswith(f"{checks} checks, 0 failures\n")
    return run.stdout


def test_baseline(build):
    program = build(native(), [*ALL, *sorted(ISA.glob("*.cpp"))])
    assert passed(program, "baseline").startswith("baseline: ")


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx"])
def test_instruction_set(build, isa):
    if _extension.MODULE is None:
        pytest.skip(_extension.REASON)
    why = refusal(isa)
    if why is not None:
        pytest.skip(f"{isa}: {why}")
    program = build(native(), [*ALL, *sorted(ISA.glob("*.cpp"))])
    assert passed(program, isa).startswith(f"{isa}: ")


def test_amx_with_emulated_tiles(build):
    passed(build(native(), EMULATED_AMX, "-DSK_EMULATE_TILES"))


@pytest.mark.long
def test_amx_with_emulated_tiles_and_checked_memory(build):
    flags = ("-DSK_EMULATE_TILES", "-fsanitize=address,undefined", "-fno-sanitize-recover")
    passed(build(native(), EMULATED_AMX, *flags))


def test_aarch64(build):
    """Cross-compiled and run by an emulator; on aarch64 itself this is `test_baseline`."""
    if platform.machine() == "aarch64":
        pytest.skip("test_baseline runs on this processor")
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"there is no {EMULATOR}")
    program = build(CROSS, [*ALL, *sorted(ISA.glob("*.cpp"))], "-static")
    assert passed(EMULATOR, program).startswith("baseline: ")

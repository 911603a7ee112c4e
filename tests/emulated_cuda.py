"""Builds csrc/cuda for the CPU emulation, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from spectral_kernels import _extension
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
CUDA = ROOT / "csrc" / "cuda"

# The operators that csrc/cuda/register.cpp implements.
OPERATORS = ("newton_schulz", "muon_step_")


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def kernels() -> list[Path]:
    return sorted(CUDA.glob("*.cu"))


def compile_kernel(source: Path, to: Path, *flags: str) -> None:
    """One .cu file by the C++ compiler, `#pragma unroll` and all."""
    run(
        [compiler(), "-std=c++17", "-O2", "-g0", "-fPIC", "-Wno-unknown-pragmas", *flags]
        + ["-x", "c++", "-include", str(EMULATION / "emulation.h"), "-c", str(source)]
        + ["-I", str(CUDA), "-o", str(to)]
    )


def compile_binding(source: Path, to: Path) -> None:
    """One file that includes torch, without its warnings."""
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    operators = "{" + ",".join(f'"{op}"' for op in OPERATORS) + "}"
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    run(
        [compiler(), "-std=c++20", "-O1", "-g0", "-fPIC", *includes, "-c", str(source)]
        + ["-DSPECTRAL_KERNELS_EMULATION", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        + [f"-DSPECTRAL_KERNELS_EMULATED_OPERATORS=(std::initializer_list<const char*>{operators})"]
        + ["-o", str(to)]
    )


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled once for each state of the sources; operators in torch.ops.spectral_kernels_emulated."""
    sources = [*CUDA.glob("*"), *EMULATION.glob("*"), *(ROOT / "csrc").glob("*.*"), Path(__file__)]
    built = ROOT / "build" / "emulation" / f"{fingerprint(sources)}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder, ThreadPoolExecutor(2) as pool:
            bindings = [CUDA / "register.cpp", EMULATION / "bind.cpp"]
            bindings += [ROOT / "csrc" / name for name in ("check_lists.cpp", "counters.cpp")]
            jobs = [(compile_kernel, path) for path in kernels()]
            jobs += [(compile_binding, path) for path in bindings]
            objects = [Path(folder) / f"{path.stem}.o" for _, path in jobs]
            for done in [
                pool.submit(job, path, to) for (job, path), to in zip(jobs, objects, strict=True)
            ]:
                done.result()
            torch_libraries = Path(torch.__file__).parent / "lib"
            run(
                [compiler(), "-shared", "-o", str(Path(folder) / "emulation.so")]
                + [str(path) for path in objects]
                + ["-L", str(torch_libraries), "-lc10", "-ltorch_cpu", "-ltorch"]
            )
            os.replace(Path(folder) / "emulation.so", built)
    assert _extension.MODULE is not None, _extension.REASON  # has the schemas
    torch.ops.load_library(built)
    return ctypes.CDLL(str(built))


def arrange(order: int = 0, *, truncation: bool = False) -> None:
    """The order of blocks, warps and lanes of later launches, and the rounding of mma."""
    library().set_emulation(order, int(truncation))

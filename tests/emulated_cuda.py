"""Builds csrc/cuda for the CPU emulation, and loads it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
import torch
from spectral_kernels import _cuda, _dispatch, _native
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
CUDA = ROOT / "csrc" / "cuda"

# As in setup.py: other headers of torch do not compile then.
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# Of kernels and of the linker, such as sanitizers.
FLAGS = tuple(os.environ.get("SPECTRAL_KERNELS_EMULATION_FLAGS", "").split())
# Its calls have functions in cuda_emulation/races.cpp: its library has no part in this.
RACES = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
LINKED = tuple(flag for flag in FLAGS if flag not in RACES)


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def kernels() -> list[Path]:
    return sorted(CUDA.glob("*/*.cu"))


def compile_kernel(source: Path, to: Path) -> None:
    """One .cu file by the C++ compiler, `#pragma unroll` and all."""
    run(
        [compiler(), "-std=c++17", "-O2", "-g0", "-fPIC", "-Wno-unknown-pragmas", *FLAGS]
        + ["-x", "c++", "-include", str(EMULATION / "emulation.h"), "-c", str(source)]
        + ["-o", str(to)]
    )


def compile_binding(source: Path, to: Path) -> None:
    """One file that includes torch, without its warnings."""
    paths = [pybind11.get_include(), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    includes = [flag for path in paths for flag in ("-isystem", path)]
    run(
        [compiler(), "-std=c++20", "-O1", "-g0", "-fPIC", STABLE, *includes, "-c", str(source)]
        + ["-DSPECTRAL_KERNELS_EMULATION"]
        + ["-o", str(to)]
    )


def compile_plain(source: Path, to: Path) -> None:
    """One file without torch and without kernels."""
    run([compiler(), "-std=c++17", "-O2", "-g0", "-fPIC", "-c", str(source), "-o", str(to)])


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def fingerprint(files: Iterable[Path], flags: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join((torch.__version__, *flags)).encode())
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def including(source: Path) -> set[Path]:
    """A source and the files of this repository that it includes."""
    found, waiting = set[Path](), [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            named = re.findall(r'^ *#include "([^"]+)"', path.read_text(), re.MULTILINE)
            beside = [(path.parent / name).resolve() for name in named]
            waiting += [other for other in beside if other.exists()]
    return found


def _label(path: Path) -> str:
    """A name for the object of a source: files of two folders may have the same."""
    return "-".join(path.relative_to(ROOT).with_suffix("").parts[1:])


@functools.cache
def library() -> ctypes.CDLL:
    """The operators in torch.ops.spectral_kernels_emulated; what did not change is kept built."""
    shared = [Path(__file__).resolve(), *EMULATION.glob("*.h")]
    bindings = [*CUDA.glob("*/*.cpp"), EMULATION / "bind.cpp"]
    bindings += [
        ROOT / "csrc" / name
        for name in (
            "boxing.cpp",
            "check_deva.cpp",
            "check_lists.cpp",
            "counters.cpp",
            "errors.cpp",
            "ops.cpp",
            "root_rows.cpp",
            "tensor.cpp",
        )
    ]
    sources = dict.fromkeys(kernels(), compile_kernel) | dict.fromkeys(bindings, compile_binding)
    sources[EMULATION / "races.cpp"] = compile_plain
    others = [path for path in sources if path not in kernels()]
    included = {path: {*shared, *including(path)} for path in sources}
    all_files = {path for files in included.values() for path in files}
    built = ROOT / "build" / "emulation" / f"{fingerprint(all_files, FLAGS)}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        objects = {
            path: built.parent / f"{_label(path)}-{fingerprint(included[path], flags)}.o"
            for paths, flags in ((kernels(), FLAGS), (others, ()))
            for path in paths
        }
        with tempfile.TemporaryDirectory(dir=built.parent) as folder, ThreadPoolExecutor(2) as pool:

            def make(path: Path) -> None:
                if not objects[path].exists():
                    fresh = Path(folder) / f"{_label(path)}.o"
                    sources[path](path, fresh)
                    os.replace(fresh, objects[path])

            for done in [pool.submit(make, path) for path in sources]:
                done.result()
            torch_libraries = Path(torch.__file__).parent / "lib"
            run(
                [compiler(), "-shared", *LINKED, "-o", str(Path(folder) / "emulation.so")]
                + [str(path) for path in objects.values()]
                + ["-L", str(torch_libraries), "-ltorch_cpu"]
            )
            os.replace(Path(folder) / "emulation.so", built)
    torch.ops.load_library(built)
    return ctypes.CDLL(str(built))


# When copies by TMA and products by wgmma happen: see tests/cuda_emulation/sm90.h.
DELIVERIES = ("late", "early", "random")


def arrange(
    order: int = 0,
    *,
    truncation: bool = False,
    left_out: str = "",
    shared: int = 227 * 1024,
    residents: int = 1,
    queue: bool | None = None,
    multiprocessors: int = 132,
    wgmma: bool = False,
    delivery: str = "late",
) -> None:
    """The order of blocks, warps and lanes of later launches, the rounding of mma, a barrier, as
    "folder/file:line", that does nothing, the bytes of shared memory that a block may have, how
    many blocks are at work at a time, whether products of a list are one launch, or as the model
    says, and for how many multiprocessors; whether products are by wgmma, and when what is
    asynchronous happens."""
    wish = -1 if queue is None else int(queue)
    library().set_emulation(
        order,
        int(truncation),
        left_out.encode(),
        ctypes.c_int64(shared),
        residents,
        wish,
        multiprocessors,
        int(wgmma),
        DELIVERIES.index(delivery),
    )


def launches() -> int:
    """Kernels launched since the last call."""
    count: int = library().count_launches()
    return count


@contextlib.contextmanager
def slices(elements: int) -> Iterator[None]:
    """The steps in eigenbases work on so many elements at a time."""
    set_elements = library().set_slice_elements
    set_elements.argtypes, set_elements.restype = [ctypes.c_int64], ctypes.c_int64
    before = set_elements(elements)
    try:
        yield
    finally:
        set_elements(before)


@contextlib.contextmanager
def races_watched() -> Iterator[None]:
    """Launches fail where the order of two accesses is left to chance, with RACES among FLAGS."""
    watch = library().watch_races
    watch(1)
    try:
        yield
    finally:
        watch(0)


def _lines(*beginnings: str) -> dict[str, str]:
    """Where kernels have lines that begin so, as "folder/file:line", and what follows."""
    found = {}
    for path in sorted([*CUDA.glob("*/*.cu"), *CUDA.glob("*/*.h")]):
        lines = [line.strip() for line in path.read_text().splitlines()]
        for number, line in enumerate(lines, 1):
            if line.startswith(beginnings):
                found[f"{path.relative_to(CUDA)}:{number}"] = " ".join(lines[number : number + 2])
    return found


def barriers() -> dict[str, str]:
    """Every barrier in the kernels that more than a warp waits at."""
    return _lines("__syncthreads();", "BARRIER(", "CLUSTER_BARRIER(")


def fences() -> dict[str, str]:
    """Every fence in the kernels."""
    return _lines("__threadfence();")


@contextlib.contextmanager
def arranged(order: int = 0, **options: Any) -> Iterator[None]:
    """`arrange` for the body."""
    arrange(order, **options)
    try:
        yield
    finally:
        arrange()


def refusal(
    backend: str, op: str, tensors: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> str | None:
    """What the kernels leave to other backends, on a processor of sm_90."""
    if op != "inverse_root":
        # Whether coefficients fit is asked of a module with CUDA, which this one is not.
        return _cuda.rejection(op, tensors, {k: v for k, v in options.items() if k != "rows"})
    # What it asks of the card is how much shared memory a block has.
    a = tensors[0]
    if a.dtype == torch.float64:
        return "the CUDA C++ kernels compute in fp32"
    return None if a.shape[-1] <= _cuda.MOST_ROWS else "it does not fit on chip"


@contextlib.contextmanager
def emulated(*, refuse: bool = False, any_rows: bool = False) -> Iterator[None]:
    """Backend "cuda" is the emulation, and takes CPU tensors; with `refuse` only those that the
    kernels would take on a card, or with `any_rows` also those of few rows, which they leave to
    backends that are more accurate there."""
    library()
    rejection, operator, rows = _dispatch._rejection, _native.operator, _cuda.LEAST_ROWS_FP32
    _dispatch._rejection = refusal if refuse else lambda *_: None
    _native.operator = functools.partial(operator, library="spectral_kernels_emulated")
    _cuda.LEAST_ROWS_FP32 = 0 if any_rows else rows
    try:
        with _dispatch.use_backend("cuda"):
            yield
    finally:
        _dispatch._rejection, _native.operator = rejection, operator
        _cuda.LEAST_ROWS_FP32 = rows


class Guarded:
    """A copy of `x` whose memory ends (or begins) at a page that nobody may touch."""

    def __init__(self, x: torch.Tensor, *, at_end: bool = True) -> None:
        page = mmap.PAGESIZE
        size = x.numel() * x.element_size()
        inside = max(page, -(-size // page) * page)
        self._map = mmap.mmap(-1, inside + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for forbidden in (start, start + page + inside):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), page, 0) == 0
        offset = page + (inside - size if at_end else 0)
        flat = torch.frombuffer(self._map, dtype=x.dtype, count=x.numel(), offset=offset)
        self.tensor = flat.view(x.shape).copy_(x)

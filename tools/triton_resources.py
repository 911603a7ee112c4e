"""What every Triton kernel takes on every target, compiled ahead of time: no card is needed.

    python tools/triton_resources.py [--targets sm_90,gfx942] [--to FOLDER]

Operators are called on CPU tensors while every launch is recorded in place of being run, so exactly
the variants that the library launches are compiled. A line fails if the kernel spills, if its
shared memory exceeds the card's, if a product lacks the target's matrix instructions or 64-bit
offsets or its loads are narrow or (on NVIDIA cards) not asynchronous, and if a pass over aligned
matrices loads them element by element. With `--to` it writes triton_resources.json and
triton_resources.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from spectral_kernels import _records

# target -> (backend, architecture, threads of a warp, bytes of shared memory, matrix instruction)
TARGETS: dict[str, tuple[str, int | str, int, int, str]] = {
    "sm_80": ("cuda", 80, 32, 166912, r"mma\.sync"),
    "sm_90": ("cuda", 90, 32, 232448, r"wgmma\.mma_async"),
    "sm_100": ("cuda", 100, 32, 232448, r"tcgen05\.mma"),
    "gfx942": ("hip", "gfx942", 64, 65536, r"v_mfma_"),
}

# A tile too small for the asynchronous instructions of sm_90 and sm_100 falls back to this one.
_FALLBACK = r"mma\.sync"

_ASYNCHRONOUS = r"cp\.async\.(?:c[ag]|bulk)"
_WIDE_PTX = (
    r"cp\.async\.c[ag]\.shared\.global [^;]*\], (?:0x8|0x10|8|16),|cp\.async\.bulk"
    r"|ld\.global[.\w:]*\.v(?:2\.b64|2\.b32|4\.b32|4\.b64|8\.b32)"
)
_WIDE_AMDGCN = r"(?:global|buffer)_load_(?:dwordx[234]|b(?:64|128))"

# A matrix's place in a workspace.
_LONG_OFFSETS = r"tt\.addptr [^\n]* : !tt\.ptr<b?f\d+>, i64"

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}


@dataclass
class Line:
    """One variant of a kernel on one target.

    Attributes:
        kernel, target, dtype: what was compiled.
        constants: its compile-time arguments.
        warps, stages, shared, registers, spills: as the compiler reports them; spills in bytes.
        instruction, matrix_instructions: the kind of matrix instruction, and how many.
        asynchronous_loads: cp.async and bulk copies.
        wide_loads: of 8 bytes a thread or more from global memory, asynchronous ones among them.
        failure: what is wrong with it, or None.
    """

    kernel: str
    target: str
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    shared: int = 0
    registers: int | None = None
    spills: int | None = None
    instruction: str = ""
    matrix_instructions: int = 0
    asynchronous_loads: int = 0
    wide_loads: int = 0
    failure: str | None = None


@dataclass
class Recorder:
    """Stands in for `launch`; keeps one launch of every variant."""

    calls: dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = field(
        default_factory=dict
    )

    def __call__(self, kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        if not programs:
            return
        names = kernel.arg_names
        options = {name: _unwrapped(value) for name, value in options.items()}
        compile_options = {
            name: options.pop(name) for name in ("num_warps", "num_stages") if name in options
        }
        signature = {
            name: _type_of(arg) for name, arg in zip(names[: len(args)], args, strict=True)
        }
        key = repr((kernel.__name__, signature, sorted(options.items(), key=str), compile_options))
        self.calls[key] = kernel, signature, dict(options), compile_options


def _unwrapped(value: Any) -> Any:
    """The value of a compile-time constant; dtypes are what they are."""
    return getattr(value, "value", value) if type(value).__name__ == "constexpr" else value


def _type_of(arg: Any) -> str:
    if isinstance(arg, torch.Tensor):
        return f"*{_TYPES[arg.dtype]}"
    return "fp32" if isinstance(arg, float) else "i32"


def record(target: str, workload: Callable[[], None]) -> Recorder:
    """The launches of a workload on a target."""
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        for module in _modules():
            if hasattr(module, "launch"):
                stack.enter_context(_replaced(module, "launch", recorder))
            if hasattr(module, "architecture"):
                stack.enter_context(_replaced(module, "architecture", lambda device: target))
        workload()
    return recorder


def _modules() -> list[Any]:
    from spectral_kernels import triton_kernels

    folder = Path(triton_kernels.__file__).parent
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return [importlib.import_module(f"{triton_kernels.__name__}.{name}") for name in names]


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


def compile_line(
    target: str,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
) -> Line:
    """Compiles one variant and reads what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp, shared, instruction = TARGETS[target]
    line = Line(
        kernel=kernel.__name__,
        target=target,
        dtype=next((t[1:] for t in signature.values() if t[1:] in ("fp32", "bf16", "fp16")), ""),
        constants={name: _plain(value) for name, value in constants.items()},
        warps=options.get("num_warps", 4),
        stages=options.get("num_stages", 3),
    )
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    try:
        compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    except Exception as error:
        line.failure = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return line
    line.shared = compiled.metadata.shared
    if backend == "cuda":
        _read_ptx(line, compiled.asm["ptx"], instruction)
    else:
        _read_amdgcn(line, compiled.asm["amdgcn"], instruction)
    problems = []
    if line.spills:
        problems.append(f"{line.spills} bytes of spills")
    if line.shared > shared:
        problems.append(f"{line.shared} bytes of shared memory, the card has {shared}")
    if "PRECISION" in constants and not line.matrix_instructions and not _is_simt(line):
        problems.append(f"no {instruction.replace(chr(92), '')}")
    if "PRECISION" in constants and backend == "cuda" and not line.asynchronous_loads:
        problems.append("no asynchronous loads")
    if ("PRECISION" in constants or _is_aligned(constants)) and not line.wide_loads:
        problems.append("no wide loads")
    if "PRECISION" in constants and not re.search(_LONG_OFFSETS, compiled.asm["ttir"]):
        problems.append("no 64-bit offsets")
    line.failure = "; ".join(problems) or None
    return line


def _is_simt(line: Line) -> bool:
    return line.constants.get("PRECISION") == "ieee" and line.target != "gfx942"


def _is_aligned(constants: dict[str, Any]) -> bool:
    """Whether a pass knows its matrices to be aligned, with a stride of 1 that is not across."""
    from spectral_kernels.triton_kernels._device import ALIGNED

    return constants.get("GRAD_UNIT") == ALIGNED + 1


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _read_ptx(line: Line, ptx: str, instruction: str) -> None:
    from triton.backends.nvidia.compiler import get_ptxas

    for pattern in (instruction, _FALLBACK):
        line.matrix_instructions = len(re.findall(pattern, ptx))
        if line.matrix_instructions:
            line.instruction = pattern.replace("\\", "")
            break
    line.asynchronous_loads = len(re.findall(_ASYNCHRONOUS, ptx))
    line.wide_loads = len(re.findall(_WIDE_PTX, ptx))
    arch = re.search(r"\.target (\S+?)[,\s]", ptx)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        ptxas = get_ptxas(int(re.sub(r"\D", "", arch.group(1))))
        command = [ptxas.path, "-v", f"--gpu-name={arch.group(1)}", str(path), "-o", f"{path}.o"]
        report = subprocess.run(command, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    line.spills = sum(map(int, spills.groups())) if spills else None
    line.registers = int(registers.group(1)) if registers else None


def _read_amdgcn(line: Line, text: str, instruction: str) -> None:
    line.matrix_instructions = len(re.findall(instruction, text))
    line.instruction = instruction if line.matrix_instructions else ""
    line.wide_loads = len(re.findall(_WIDE_AMDGCN, text))
    counts = {
        name: re.search(rf"\.{name}:\s*(\d+)", text)
        for name in ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    found = {name: int(match.group(1)) for name, match in counts.items() if match}
    line.registers = found.get("vgpr_count", 0)
    line.spills = 4 * (found.get("vgpr_spill_count", 0))


def workload() -> None:
    """Every operator on every dtype and size class, with the options that change kernels."""
    from triton_workload import calls

    for call in calls():
        call()


def candidates(target: str) -> None:
    """What configurations launch that nothing takes by itself."""
    from spectral_kernels.triton_kernels import _config
    from triton_workload import large

    table = _config.TABLE[target]
    given = table[2, True]
    table[2, True] = _config.CANDIDATES.get(target, given)
    try:
        large()
    finally:
        table[2, True] = given


def lines(target: str, *, only: str = "") -> Iterator[Line]:
    """All variants of the kernels, or of those whose name contains `only`."""
    calls = record(target, workload).calls
    calls |= record(target, lambda: candidates(target)).calls
    for kernel, signature, constants, options in calls.values():
        if only in kernel.__name__:
            yield compile_line(target, kernel, signature, constants, options)


def markdown(found: Sequence[Line], compiler: str) -> str:
    """A row for every kernel, storage dtype and tile: the most that its variants take."""
    rows: dict[tuple[str, str, str], dict[str, list[Line]]] = {}
    for line in found:
        tile, across = (str(line.constants.get(name, "-")) for name in ("TILE", "ACROSS"))
        if across not in ("-", tile):
            tile = f"{tile} x {across}"
        key = line.kernel.strip("_").removesuffix("_kernel"), line.dtype, tile
        rows.setdefault(key, {}).setdefault(line.target, []).append(line)
    targets = list(dict.fromkeys(line.target for line in found))
    lines = [
        f"Compiled ahead of time by Triton {compiler}; nothing here was run. A cell is the most of",
        "all variants: registers a thread / KiB of shared memory, spilled bytes in brackets where",
        "there are any, and the matrix instruction of products. Generated by",
        "tools/triton_resources.py, which fails on spills, too much shared memory, products",
        "without matrix instructions, and loads that are narrow or, on NVIDIA cards, synchronous.",
        "",
        f"| kernel | dtype | tile | variants | {' | '.join(targets)} |",
        "|---" * (len(targets) + 4) + "|",
    ]
    for (kernel, dtype, tile), by in sorted(rows.items(), key=_row_order):
        variants = max(map(len, by.values()))
        cells = " | ".join(_cell(by.get(target, [])) for target in targets)
        lines.append(f"| {kernel} | {dtype} | {tile} | {variants} | {cells} |")
    return "\n".join([*lines, "", *_exceptions(found)]) + "\n"


def _row_order(row: tuple[tuple[str, str, str], object]) -> tuple[str, str, int]:
    kernel, dtype, tile = row[0]
    return kernel, dtype, int(tile) if tile.isdigit() else 0


def _cell(variants: Sequence[Line]) -> str:
    if not variants:
        return "not used"
    spills = max(line.spills or 0 for line in variants)
    names = sorted({line.instruction.strip("_") for line in variants if line.instruction})
    taken = f"{max(line.registers or 0 for line in variants)}"
    taken += f" / {max(line.shared for line in variants) / 1024:.0f}"
    return " ".join([taken, *([f"({spills})"] if spills else []), *names])


def _exceptions(found: Sequence[Line]) -> list[str]:
    """Where the compiler emits another instruction than the target is known for, in words."""
    kinds = {
        f"* {line.target}, {line.kernel.strip('_').removesuffix('_kernel')}, {line.dtype}, tile "
        f"{line.constants['TILE']}: {line.instruction} in place of "
        f"{TARGETS[line.target][-1].replace(chr(92), '')}"
        for line in found
        if line.instruction and line.instruction != TARGETS[line.target][-1].replace(chr(92), "")
    }
    if not kinds:
        return ["Every product has the matrix instruction of its target."]
    return ["Too small a tile for the target's own matrix instruction:", "", *sorted(kinds)]


def main() -> int:
    """Compiles, prints a line a variant, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--to", type=Path, help="the folder of the table")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: kernels are interpreted then, not compiled")
    import triton

    found = []
    for target in options.targets.split(","):
        for line in lines(target, only=options.only):
            found.append(line)
            print(
                f"{target:7} {line.kernel:18} {line.dtype:5} warps {line.warps} "
                f"shared {line.shared:6} registers {line.registers} spills {line.spills} "
                f"{line.matrix_instructions} {line.instruction} "
                f"async {line.asynchronous_loads} wide {line.wide_loads} {line.failure or ''}",
                flush=True,
            )
    failed = [line for line in found if line.failure]
    print(f"{len(found)} variants, {len(failed)} fail")
    if options.to:
        options.to.mkdir(parents=True, exist_ok=True)
        report = {"triton": triton.__version__, "lines": [asdict(line) for line in found]}
        text = _records.text(report)
        (options.to / "triton_resources.json").write_text(text)
        (options.to / "triton_resources.md").write_text(markdown(found, triton.__version__))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What is installed, what runs here and why: `python -m spectral_kernels.info [--json]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import _cuda, _dispatch, _extension

__all__ = ["collect", "main", "text"]

# Variables of others that change what is measured or what runs; ours are found by their prefix.
_PREFIX = "SPECTRAL_KERNELS_"
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "GOMP_CPU_AFFINITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "ONEDNN_MAX_CPU_ISA",
    "TRITON_INTERPRET",
)


def collect() -> dict[str, Any]:
    """Everything `info` prints, as plain values for JSON.

    Returns:
        Sections "versions", "cpu", "backends", "gpu", "cuda_kernels", "environment" and
        "workspace". What cannot be found out is the sentence that says why; nothing here raises.
    """
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "backends": {name: _or_reason(partial(_backend, name)) for name in _dispatch.BACKENDS},
        "gpu": _gpu(),
        "cuda_kernels": _or_reason(_cuda_kernels),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIX) or name in _VARIABLES
        },
        "workspace": _workspace(),
    }


def text(facts: dict[str, Any]) -> str:
    """`collect()` as aligned lines."""
    lines = []
    for section, entries in facts.items():
        lines.append(section)
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            if isinstance(value, list):
                value = ", ".join(value)
            lines.append(f"  {name.replace('_', ' '):<{width}}  {value}")
        if not entries:
            lines.append("  none set")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m spectral_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


def cpu_model() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _or_reason(value: Callable[[], Any]) -> Any:
    """A value, or the sentence of the error that finding it raised."""
    try:
        return value()
    except Exception as error:
        return f"unknown: {error}"


def _backend(name: str) -> str:
    return _dispatch.unavailable(name) or "available"


def _versions() -> dict[str, Any]:
    module = _extension.MODULE
    return {
        "spectral_kernels": _version_of("spectral-kernels"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _extension.REASON if module is None else _compiler(module.compiler),
        "built_with_torch": _extension.REASON if module is None else module.built_with_torch,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _compiler(version: str) -> str:
    """GCC's __VERSION__ is a bare number; Clang's says who it is."""
    return f"gcc {version}" if version[:1].isdigit() else version


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a distribution"


def _cpu() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": _or_reason(cpu_model),
        "cores": os.cpu_count(),
        "threads_of_torch": torch.get_num_threads(),
    }
    module = _extension.MODULE
    if module is None:
        return facts | {"instruction_sets": _extension.REASON}
    cap = os.environ.get(f"{_PREFIX}CPU_ISA", "")
    return facts | {
        "instruction_sets_compiled": _or_reason(module.compiled_isas),
        "instruction_sets_supported": _or_reason(module.supported_isas),
        "instruction_sets_refused": _or_reason(partial(_refused, module)),
        "instruction_set_in_use": _or_reason(module.current_isa),
        "instruction_set_cap": f"{_PREFIX}CPU_ISA={cap}" if cap else "none",
        "float32_products_by": _or_reason(module.fp32_products),
        "instruction_set_of_torch": _or_reason(torch.backends.cpu.get_cpu_capability),
        "mkl_kept_to_one_thread_by": _or_reason(module.mkl_thread_limit),
        "lapack_results_computed_again": _or_reason(_extension.faults),
    }


def _refused(module: Any) -> list[str]:
    return [f"{name} ({why})" for name, why in module.refused_isas()] or ["none"]


def _gpu() -> dict[str, str]:
    return {
        "torch": (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        ),
        "device": _or_reason(_device),
        "cuda_operators": _or_reason(_cuda_operators),
        "nvcc": _or_reason(_nvcc),
        "triton": _or_reason(_triton),
    }


def _device() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _cuda_operators() -> str:
    reason = _cuda.not_built()
    if reason is not None:
        return reason
    return f"{', '.join(_cuda.OPERATORS)} for {', '.join(_cuda.architectures())}"


def _cuda_kernels() -> dict[str, str]:
    """Every kernel's variants; what they take is known on a device only."""
    reason = _cuda.not_built()
    if reason is not None:
        return {"none": reason}
    variants: dict[str, list[tuple[int, int]]] = {}
    for name, registers, local in _cuda.kernels():
        variants.setdefault(name.partition("<")[0], []).append((registers, local))
    return {name: _taken(found) for name, found in variants.items()}


def _taken(variants: list[tuple[int, int]]) -> str:
    count = f"{len(variants)} variant{'s' * (len(variants) > 1)}"
    registers = sorted(found for found, _ in variants)
    if registers[0] < 0:
        return f"{count}; registers are shown where there is a device"
    spilled = max(local for _, local in variants)
    return f"{count}, {registers[0]} to {registers[-1]} registers, {spilled} bytes in local memory"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if found is None:
        return "not found under CUDA_HOME" if home else "not found: CUDA_HOME unset, not on PATH"
    said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20)
    release = [line for line in said.stdout.splitlines() if "release" in line]
    return f"{found}: {release[0].strip() if release else 'its version is not readable'}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return _version_of("triton")


def _workspace() -> dict[str, str]:
    module = _extension.MODULE
    if module is None:
        return {"kept_at_most": _extension.REASON}
    return {
        "kept_at_most": _size(_or_reason(module.workspace_limit)),
        "kept_now": _size(_or_reason(module.workspace_kept)),
    }


def _size(count: Any) -> str:
    return f"{count / 2**20:.1f} MiB" if isinstance(count, int) else str(count)


if __name__ == "__main__":
    sys.exit(main())

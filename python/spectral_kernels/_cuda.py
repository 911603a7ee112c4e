"""What the CUDA C++ kernels take: the table behind the choice between them and Triton.

The operators listed here are served where a matrix stays on chip for the whole iteration, which is
where nothing else can: three launches a list against some 15 dependent ones. Everything larger is
products, and goes to Triton. The limit of 128 rows is that of one block's shared memory (3 matrices
of 41 KB each); processors with less than 123 KB (sm_86, 89, 120) take up to 96 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _extension

MOST_ROWS = 128
# Products keep 22 bits of an fp32 number. From 8 rows on the error is that of fp32 or below; with
# fewer, where errors do not average out, up to 1.9 times the allowed one (12 for a single number).
LEAST_ROWS_FP32 = 8
_ROWS_OF_TILES = (16, 32, 64, 96, 128)

OPERATORS = ("newton_schulz", "muon_step_", "inverse_root")


def unavailable() -> str | None:
    """Why the CUDA C++ kernels cannot run anything here, or None."""
    if _extension.MODULE is None:
        return _extension.REASON
    if not architectures():
        return "the CUDA C++ kernels were not built"
    return None


def architectures() -> list[str]:
    """Processors that the library holds machine code for, as "sm_90a"; PTX serves later ones."""
    listed: str = getattr(_extension.MODULE, "cuda_architectures", "")
    return [f"sm_{name}" for name in listed.split(",") if name]


def rejection(op: str, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot run `op` on these tensors of a GPU, or None."""
    module = _extension.MODULE
    if module is None or op not in OPERATORS:
        return "there is no CUDA C++ kernel for it"
    if torch.float64 in (options.get("compute_dtype"), *(tensor.dtype for tensor in tensors)):
        return "the CUDA C++ kernels compute in fp32 and 16 bits, not in fp64"
    for tensor in tensors:
        side = min(tensor.shape[-2:])
        if side > MOST_ROWS:
            return f"shape {tuple(tensor.shape)} does not fit on chip (at most {MOST_ROWS} rows)"
        if side < LEAST_ROWS_FP32 and options.get("compute_dtype") == torch.float32:
            return f"fp32 with fewer than {LEAST_ROWS_FP32} rows is more accurate elsewhere"
        limit = module.cuda_shared_memory(tensor.device.index or 0)
        needed = root_shared_memory(side) if op == "inverse_root" else shared_memory(side)
        if needed > limit:
            return f"{side} rows take {needed} bytes of shared memory, of {limit}"
    if op == "inverse_root":
        if options.get("method") == "eigen":
            return "the CUDA C++ kernels iterate, they do not decompose"
        if options.get("ridge") == options.get("relative_ridge") == 0.0:
            return "without a ridge only an eigendecomposition is safe"
    if "rows" in options and not module.cuda_rows_fit(
        [list(row) for row in options["rows"]], options["norm_factor"]
    ):
        return "with these coefficients the numbers outgrow fp16"
    return None


def shared_memory(rows: int) -> int:
    """Bytes of one block's shared memory that a matrix of so many rows takes on chip."""
    tiles = next(most for most in _ROWS_OF_TILES if rows <= most) // 16
    return 3 * tiles * (tiles // 2 + 1) * 1024 + 8 * tiles


def root_shared_memory(rows: int) -> int:
    """The same for inverse_root, with the vectors that its residual is taken on."""
    tiles = next(most for most in (32, 64, 128) if rows <= most) // 16
    return 3 * tiles * (tiles // 2 + 1) * 1024 + 1024 * tiles + 8 * tiles + 16

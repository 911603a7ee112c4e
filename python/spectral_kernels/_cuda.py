"""What the CUDA C++ kernels take, and where they are the automatic choice.

A matrix whose short side is at most 128 stays on chip for the whole iteration, which is where
nothing else can: three launches a list against some 15 dependent ones. The limit is that of one
block's shared memory (3 matrices of 41 KB each); processors with less than 123 KB (sm_86, 89, 120)
take up to 96 rows. Everything larger is a sequence of grouped products by mma.sync, which is
preferred only where `THRESHOLDS` says so; where one of them takes less than some 20 µs by the cost
model, they are one launch, a queue of tiles. Matrices of 160 rows would take 180 KB on chip, which
only sm_90 and sm_100 have, and by the model (6.5 clocks an mma) some 80 µs for 17 products: one
matrix takes 55 in the queue, 64 of them some 150, a gain for large batches of rare sizes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _extension
from ._operators import TABLE

MOST_ROWS = 128
# Products keep 22 bits of an fp32 number. From 8 rows on the error is that of fp32 or below; with
# fewer, where errors do not average out, up to 1.9 times the allowed one (12 for a single number).
LEAST_ROWS_FP32 = 8
_PRODUCTS = ("gram", "kron_factors_update_", "kron_precondition")
# Beyond one chip these are products, and eigendecompositions by torch.
_ANY_SIZE = ("eigenbasis", "refresh_eigenbasis", "soap_step_")
_ROWS_OF_TILES = (16, 32, 64, 96, 128)

OPERATORS = tuple(name for name, operator in TABLE.items() if operator.cuda)

_HALF = (torch.bfloat16, torch.float16)
_THREE_PRODUCTS = (
    "three fp16 products by mma.sync take 1.6 times as long as Triton's three TF32 products by "
    "tcgen05, if they keep Hopper's rate; up to 1024 rows (9 us a product of square ones) the "
    "launches decide"
)


@dataclass(frozen=True)
class Threshold:
    """Above how many rows an automatic choice leaves an operator to Triton.

    Attributes:
        operators: what it holds for.
        dtypes: of the matrices that it holds for.
        capabilities: major numbers of the processors that it holds for.
        rows: the most that these kernels keep.
        model: what the number rests on; nothing here has been timed on a card yet.
    """

    operators: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    capabilities: tuple[int, ...]
    rows: int
    model: str


THRESHOLDS = (
    Threshold(
        ("newton_schulz", "muon_step_"),
        (torch.float32, *_HALF),
        (9, 10),
        MOST_ROWS,
        "mma.sync reaches some 60 % of the rate of wgmma and tcgen05, which Triton uses",
    ),
    Threshold(
        ("gram",),
        _HALF,
        (9, 10),
        1536,
        "64-wide tiles make 2.3 to 3.4 times as many of them as 128-wide ones keep busy up to "
        "1024 rows; from 2048 rows on the rate of wgmma decides",
    ),
    # On sm_90 three fp16 products by mma.sync (3 x 1.6 times that of wgmma) take less than three
    # TF32 products by wgmma (3 x 2 times), so that fp32 stays here at any size.
    Threshold(_PRODUCTS, (torch.float32,), (10,), 1024, _THREE_PRODUCTS),
    Threshold(("kron_precondition",), _HALF, (10,), 1024, _THREE_PRODUCTS),
    Threshold(
        ("kron_factors_update_",),
        _HALF,
        (9, 10),
        512,
        "mma.sync reaches some 60 % of the rate of wgmma and tcgen05, which Triton uses; up to 512 "
        "rows (4 us for a factor of 2048) the launches decide",
    ),
    # Triton's steps make some 140 passes of torch for every shape, 0.5 ms.
    Threshold(
        ("soap_step_",),
        (torch.float32, *_HALF),
        (10,),
        1024,
        "rotations and factors of a square matrix take 30 us more than Triton's at 1024 rows, so "
        "that two dozen of a shape make up for its passes; " + _THREE_PRODUCTS,
    ),
    Threshold(
        ("deva_step_",),
        (torch.float32, *_HALF),
        (9, 10),
        1024,
        "a Newton-Schulz of a square matrix in 16 bits takes 25 us more by mma.sync than by wgmma "
        "or tcgen05 at 1024 rows, so that two dozen of a shape make up for Triton's passes",
    ),
)


def not_built() -> str | None:
    """Why there are no CUDA C++ kernels, or None."""
    if _extension.MODULE is None:
        return _extension.REASON
    if not architectures():
        return (
            "the CUDA C++ kernels were not built: that takes a torch for CUDA and nvcc, or "
            "SPECTRAL_KERNELS_CUDA=1"
        )
    return None


def unavailable() -> str | None:
    """Why the CUDA C++ kernels cannot run anything here, or None."""
    reason = not_built()
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    # Asking whether CUDA is there takes longer than a small step; where it runs, it is.
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "torch sees no card"
    cards = [_capability_of(i) for i in range(torch.cuda.device_count())]
    if not any(runs_on(*card) for card in cards):
        found = ", ".join(f"sm_{major}{minor}" for major, minor in cards)
        return f"the CUDA C++ kernels were built for {', '.join(architectures())}, cards: {found}"
    return None


def architectures() -> list[str]:
    """Processors that the library holds machine code for, as "sm_90a"; PTX serves later ones."""
    listed: str = getattr(_extension.MODULE, "cuda_architectures", "")
    return [f"sm_{name}" for name in listed.split(",") if name]


def runs_on(major: int, minor: int) -> bool:
    """Whether there is code for a processor: its own, or PTX, which is that of the first one.

    Code for sm_86 runs on 8.6 to 8.9; what ends in "a" runs on that processor alone.
    """
    for i, name in enumerate(architectures()):
        alone, number = name.endswith("a"), int(name.removeprefix("sm_").rstrip("a"))
        if alone and number == 10 * major + minor:
            return True
        same = number // 10 == major or i == 0
        if not alone and same and number <= 10 * major + minor:
            return True
    return False


def kernels(device: int = 0) -> list[tuple[str, int, int]]:
    """Name, registers and bytes of local memory a thread; -1 where there is no such device."""
    if _extension.MODULE is None or not architectures():
        return []
    return list(_extension.MODULE.cuda_kernels(device))


def rejection(op: str, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot run `op` on these tensors of a GPU, or None."""
    module = _extension.MODULE
    if module is None or op not in OPERATORS:
        return "there is no CUDA C++ kernel for it"
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        major, minor = _capability_of(device.index or 0)
        if not runs_on(major, minor):
            built = ", ".join(architectures())
            return f"the CUDA C++ kernels were built for {built}, and a card is sm_{major}{minor}"
    if options.get("cautious") or (op == "muon_step_" and options.get("beta2") is not None):
        return "second moments of neurons and cautious weight decay have no CUDA C++ kernel"
    if options.get("hyperball"):
        return "the hyperball has no CUDA C++ kernel"
    if options.get("momentum_dtype") == torch.bfloat16:
        return "moments in bfloat16 have no CUDA C++ kernel"
    tensors = [tensor for tensor in tensors if tensor.ndim >= 2]  # no counters, no learning rate
    if torch.float64 in (options.get("compute_dtype"), *(tensor.dtype for tensor in tensors)):
        return "the CUDA C++ kernels compute in fp32 and 16 bits, not in fp64"
    if op in _PRODUCTS:
        matrix = _decisive(tensors)
        if matrix.dtype == torch.float32 and min(matrix.shape[-2:]) < LEAST_ROWS_FP32:
            return f"fp32 with fewer than {LEAST_ROWS_FP32} rows is more accurate elsewhere"
        return None
    if op in _ANY_SIZE or options.get("norm") == "linf":
        return None
    for tensor in tensors:
        side = min(tensor.shape[-2:])
        if side < LEAST_ROWS_FP32 and options.get("compute_dtype") == torch.float32:
            return f"fp32 with fewer than {LEAST_ROWS_FP32} rows is more accurate elsewhere"
        if op != "inverse_root":
            continue  # what does not fit on chip goes to products
        if side > MOST_ROWS:
            return f"{side} rows do not fit on chip (at most {MOST_ROWS})"
        # It may end in an eigendecomposition.
        needed = max(jacobi_shared_memory(side), root_shared_memory(side))
        limit = module.cuda_shared_memory(tensor.device.index or 0)
        if needed > limit:
            return f"{side} rows take {needed} bytes of shared memory, of {limit}"
    if "rows" in options:
        rows = tuple(tuple(row) for row in options["rows"])
        if not _rows_fit(rows, float(options.get("norm_factor", 1.0))):
            return "with these coefficients the numbers outgrow fp16"
    return None


@functools.lru_cache(maxsize=64)
def _rows_fit(rows: tuple[tuple[float, ...], ...], norm_factor: float) -> bool:
    assert _extension.MODULE is not None
    return bool(_extension.MODULE.cuda_rows_fit([list(row) for row in rows], norm_factor))


def elsewhere(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why an automatic choice leaves what these kernels can run to Triton, or None."""
    matrices = [tensor for tensor in tensors if tensor.ndim >= 2]
    for tensor in [_decisive(tensors)] if op in _PRODUCTS else matrices:
        for threshold in THRESHOLDS:
            if (
                op not in threshold.operators
                or tensor.dtype not in threshold.dtypes
                or _capability(tensor) not in threshold.capabilities
            ):
                continue
            rows = tensor.shape[-2] if op == "gram" else min(tensor.shape[-2:])
            if rows > threshold.rows:
                return f"{rows} rows, more than {threshold.rows}: {threshold.model}"
    return None


def _decisive(tensors: Sequence[Tensor]) -> Tensor:
    """Of a matrix with its factors or sides: the one of the fewest bits and rows."""
    matrices = [tensor for tensor in tensors if tensor.ndim >= 2]
    return min(matrices, key=lambda matrix: (matrix.dtype.itemsize, min(matrix.shape[-2:])))


def _capability(tensor: Tensor) -> int:
    return _capability_of(tensor.device.index or 0)[0]


@functools.cache
def _capability_of(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def shared_memory(rows: int) -> int:
    """Bytes of one block's shared memory that a matrix of so many rows takes on chip."""
    tiles = next(most for most in _ROWS_OF_TILES if rows <= most) // 16
    return 3 * tiles * (tiles // 2 + 1) * 1024 + 8 * tiles


def root_shared_memory(rows: int) -> int:
    """The same for inverse_root, with the vectors that its residual is taken on."""
    tiles = next(most for most in (32, 64, 128) if rows <= most) // 16
    return 3 * tiles * (tiles // 2 + 1) * 1024 + 1024 * tiles + 8 * tiles + 16


def jacobi_shared_memory(rows: int) -> int:
    """The same for an eigendecomposition."""
    most = max(32, -(-rows // 32) * 32)
    return 8 * (most * most + 3 * most + (16 if most == 32 else 32))

"""Dtypes and shapes that kernels are tried in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FULL = (torch.float64, torch.float32)

# Powers of two and their neighbours (tile edges), primes, single rows and columns, long strips.
SHAPES = (
    *((n, n) for n in (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33)),
    *(
        (m, n)
        for m, n in ((1, 9), (9, 1), (2, 31), (31, 2), (4, 257), (257, 4), (5, 123), (123, 5))
    ),
    *((47, 48), (49, 47), (63, 65), (97, 13), (127, 130), (129, 128), (19, 255), (256, 37)),
)
# The shapes that other projects' kernels fell over: NaN from a tuned product, and misalignment.
AWKWARD_SHAPES = ((18, 2304), (512, 1408))


def also_on_cuda(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """The same cases; the chosen ones run on CUDA C++ in `make test` too, as with in_full."""
    mark = pytest.mark.in_full("cuda")
    return [pytest.param(case, marks=mark) if case in chosen else case for case in cases]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def named(pair: Any) -> str | None:
    """pytest ids of dtypes."""
    return str(pair).removeprefix("torch.") if isinstance(pair, torch.dtype) else None

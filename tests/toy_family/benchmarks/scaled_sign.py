"""scale sign(X) against torch.sign and a product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from spectral_kernels.scaled_sign import scaled_sign

from .case import MEMORY, OURS, Case, Contender, Family, Problem, relative_error
from .inputs import gaussian

_SHAPES = ("512x512", "1024x1024", "64x128x128")


def _case(op: str, shape: str, dtype: torch.dtype, **options: Any) -> Case:
    return Case.of_matrices(op, shape, dtype, _build, **options)


def _build(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    x = gaussian(sizes, dtype, device=device)
    contenders = [
        Contender(OURS, lambda: scaled_sign(x, scale=0.5)),
        Contender("torch.sign", lambda: 0.5 * x.sign(), torch=True),
    ]
    return Problem(
        contenders,
        error=lambda out: relative_error(out, 0.5 * x.double().sign()),
        baseline="torch.sign",
        work=({MEMORY: 2.0 * x.numel() * dtype.itemsize},),
    )


def _cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in _SHAPES:
            yield _case("scaled_sign", shape, dtype, quick=shape == _SHAPES[0])


FAMILY = Family("scaled_sign", ("scaled_sign",), _cases, _case)

"""X X^T against torch.mm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from spectral_kernels.symmetric_matmul import gram

from .case import MEMORY, OURS, Case, Contender, Family, Problem, one_by_one, relative_error
from .inputs import CARD_SHAPES, gaussian, rate_of

_SHAPES = (
    "128x128",
    "512x512",
    "1024x1024",
    "768x3072",
    "1000x777",
    "64x8192",
    "3072x64",
    "64x128x128",
)
_QUICK = ("512x512", "768x3072", "64x128x128")


def _case(op: str, shape: str, dtype: torch.dtype, **options: Any) -> Case:
    return Case.of_matrices(op, shape, dtype, _build, **options)


def _build(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    x = gaussian(sizes, dtype, device=device)
    exact = cache(lambda: x.double() @ x.double().mT)
    *batch, m, n = sizes
    peer = "torch.mm" if not batch else "torch.bmm"
    count, rate = math.prod(batch), rate_of(dtype, device)
    moved = float(count * (m * n + m * m) * dtype.itemsize)
    whole = {rate: 2.0 * count * m * m * n, MEMORY: moved}
    contenders = [
        Contender(OURS, lambda: gram(x)),
        Contender(peer, lambda: x @ x.mT, work=whole, torch=True),
    ]
    if batch and device.type == "cpu":
        looped = partial(one_by_one, lambda one: one @ one.mT, x)
        contenders.append(Contender("torch loop", looped, work=whole, torch=True))
    return Problem(
        contenders,
        error=lambda out: relative_error(out, exact()),
        baseline=peer,
        work=({rate: float(count * m * m * n), MEMORY: moved},),
    )


def _cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in _SHAPES:
            yield _case("gram", shape, dtype, quick=shape in _QUICK)


def _acceptance() -> Iterator[Case]:
    for shape, goal in (("768x3072", 3.6), ("1024x1024", 4.0)):
        yield _case("gram", shape, torch.float32, goals={"torch.mm": goal})
        yield _case("gram", shape, torch.bfloat16, goals={"torch.mm": 1.8})


def _card() -> Iterator[Case]:
    for shape in CARD_SHAPES[:12]:
        for dtype in (torch.bfloat16, torch.float32):
            yield _case("gram", shape, dtype)


FAMILY = Family("symmetric_matmul", ("gram",), _cases, _case, _acceptance, _card)

"""Kronecker factors and two-sided preconditioning against plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from spectral_kernels.kron_factor import kron_factors_update_, kron_precondition
from torch import Tensor

from .case import MEMORY, OURS, Case, Contender, Family, Problem, one_by_one, relative_error
from .inputs import gaussian, rate_of

_SHAPES = ("256x1024", "768x768", "1024x1024", "768x3072", "64x128x128")
_QUICK = ("768x768", "64x128x128")
_BETA = 0.95


def _case(op: str, shape: str, dtype: torch.dtype, **options: Any) -> Case:
    build = {"kron_factors_update_": _update, "kron_precondition": _precondition}[op]
    return Case.of_matrices(op, shape, dtype, build, **options)


def _update(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    *batch, m, n = sizes
    state = torch.float64 if dtype == torch.float64 else torch.float32
    grad = gaussian(sizes, dtype, device=device)
    start = tuple(_factor((*batch, k, k), state, device) for k in (m, n))

    @cache
    def exact() -> tuple[Tensor, Tensor]:
        g = grad.double()
        old = [factor.double() for factor in start]
        left, right = (
            _BETA * a + (1 - _BETA) * b for a, b in zip(old, (g @ g.mT, g.mT @ g), strict=True)
        )
        return left, right

    def ours(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        kron_factors_update_(left, right, grad, _BETA)
        return left, right

    def torch_lerp(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        left.lerp_((grad @ grad.mT).to(state), 1 - _BETA)
        right.lerp_((grad.mT @ grad).to(state), 1 - _BETA)
        return left, right

    def contender(name: str, update: Callable[[Tensor, Tensor], Any], **facts: Any) -> Contender:
        kept = [factor.clone() for factor in start]
        return Contender(
            name,
            lambda: update(*kept),
            output=lambda: update(*(factor.clone() for factor in start)),
            **facts,
        )

    work = math.prod(batch) * (m * m * n + m * n * n)
    moved = grad.nbytes + 2.0 * sum(factor.nbytes for factor in start)
    whole = {rate_of(dtype, device): 2.0 * work, MEMORY: moved}
    return Problem(
        [
            contender(OURS, ours),
            contender("torch two products", torch_lerp, work=whole, torch=True),
        ],
        error=lambda out: max(map(relative_error, out, exact())),
        baseline="torch two products",
        work=({rate_of(dtype, device): float(work), MEMORY: moved},),
    )


def _precondition(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    *batch, m, n = sizes
    grad = gaussian(sizes, dtype, device=device)
    left = gaussian((*batch, m, m), dtype, seed=1, device=device) / math.sqrt(m)
    right = gaussian((*batch, n, n), dtype, seed=2, device=device) / math.sqrt(n)
    exact = cache(lambda: left.double() @ grad.double() @ right.double())
    flops = float(math.prod(batch) * 2 * (m * m * n + m * n * n))
    work = {rate_of(dtype, device): flops, MEMORY: 2.0 * grad.nbytes + left.nbytes + right.nbytes}
    contenders = [
        Contender(OURS, lambda: kron_precondition(grad, left, right)),
        Contender("torch", lambda: left @ grad @ right, work=work, torch=True),
    ]
    if batch and device.type == "cpu":
        looped = partial(one_by_one, lambda a, g, b: a @ g @ b, left, grad, right)
        contenders.append(Contender("torch loop", looped, work=work, torch=True))
    return Problem(
        contenders,
        error=lambda out: relative_error(out, exact()),
        baseline="torch",
        work=(work,),
    )


def _factor(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = gaussian(sizes, dtype, seed=3, device=device)
    return (x + x.mT) / 2 + math.sqrt(sizes[-1]) * torch.eye(sizes[-1], dtype=dtype, device=device)


def _cases() -> Iterator[Case]:
    for op in FAMILY.ops:
        for dtype in (torch.float32, torch.bfloat16):
            for shape in _SHAPES:
                quick = shape in _QUICK and dtype == torch.float32
                yield _case(op, shape, dtype, quick=quick)


def _acceptance() -> Iterator[Case]:
    yield _case(
        "kron_factors_update_", "1024x1024", torch.float32, goals={"torch two products": 3.5}
    )


def _card() -> Iterator[Case]:
    for m in (768, 1024, 2048, 3072):
        for dtype in (torch.float32, torch.bfloat16):
            for op in FAMILY.ops:
                yield _case(op, f"{m}x{4 * m}", dtype)


FAMILY = Family(
    "kron_factor", ("kron_factors_update_", "kron_precondition"), _cases, _case, _acceptance, _card
)

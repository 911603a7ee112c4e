"""Inverse p-th roots and the Shampoo step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, partial

import torch
from spectral_kernels.inverse_root import inverse_root
from torch import Tensor

from . import peers
from .case import (
    OURS,
    Case,
    Contender,
    Family,
    Problem,
    Work,
    relative_error,
    shape_name,
    square_shape,
)
from .inputs import factor, rate_of

_SHAPES = ("128x128", "512x512", "1024x1024", "64x128x128")
_QUICK = ("512x512", "64x128x128")
_RIDGE = 1e-6  # the largest eigenvalue is 1


def _case(op: str, shape: str, dtype: torch.dtype, **options: object) -> Case:
    return _root(square_shape(shape), dtype, 4, **options)


def _root(
    sizes: tuple[int, ...], dtype: torch.dtype, p: int, low: float = 1e-6, **options: object
) -> Case:
    """Eigenvalues from 1 down to `low`, before the ridge."""
    variant = f"p={p}" if low == 1e-6 else f"p={p} low={low:.0e}"
    build = partial(_build, sizes, dtype, p, low)
    return Case("inverse_root", shape_name(sizes), dtype, build, variant, **options)


def _build(sizes: tuple[int, ...], dtype: torch.dtype, p: int, low: float) -> Problem:
    a = factor(sizes, dtype, low)
    exact = cache(lambda: eigen_root(a.double(), p, _RIDGE))
    steps = int(inverse_root(a, p, ridge=_RIDGE, return_info=True)[1].steps.max())
    return Problem(
        [
            Contender(OURS, lambda: inverse_root(a, p, ridge=_RIDGE)),
            Contender("torch eigh", lambda: eigen_root(a, p, _RIDGE)),
            *_distributed_shampoo(a, p),
        ],
        error=lambda out: relative_error(out, exact()),
        baseline="torch eigh",
        work=work(sizes, dtype, p, steps),
    )


def eigen_root(a: Tensor, p: int, ridge: float) -> Tensor:
    """(A + ridge I)^(-1/p) by an eigendecomposition, batched."""
    values, vectors = torch.linalg.eigh(a)
    values = (values.clamp_min(0.0) + ridge).pow(-1.0 / p)
    return (vectors * values.unsqueeze(-2)) @ vectors.mT


def _distributed_shampoo(a: Tensor, p: int) -> Iterator[Contender]:
    """Its roots, matrix by matrix as its optimizer calls them."""
    if peers.find("distributed-shampoo") is None:
        return
    from distributed_shampoo import CoupledNewtonConfig, EigenConfig
    from distributed_shampoo.preconditioner.matrix_functions import matrix_inverse_root

    def call(config: object) -> Callable[[], Tensor]:
        def all_roots() -> Tensor:
            roots = [
                matrix_inverse_root(one, Fraction(p), config, _RIDGE)
                for one in a.reshape(-1, *a.shape[-2:])
            ]
            return torch.stack(roots).reshape(a.shape)

        return all_roots

    yield Contender("Distributed Shampoo eigen", call(EigenConfig()))
    yield Contender("Distributed Shampoo Newton", call(CoupledNewtonConfig()))


def work(sizes: tuple[int, ...], dtype: torch.dtype, p: int, steps: int) -> tuple[Work, ...]:
    """One triangle of every product: two linear rows, then quadratic ones.

    A^2 serves the norm and the first power. A step multiplies X by N (not the first), forms N^p M
    (not the last) and, if quadratic, M^2.
    """
    if steps == 0:
        return ()
    *batch, n, _ = sizes
    power = p.bit_length() - 1 + p.bit_count() - 1
    products = 1 + (steps - 1) + (steps - 1) * (power + 1) + max(0, steps - 2)
    return ({rate_of(dtype): float(math.prod(batch) * products * n**3)},)


def _cases() -> Iterator[Case]:
    for shape in _SHAPES:
        yield _case("inverse_root", shape, torch.float32, quick=shape in _QUICK)
    for low in (1e-3, 1e-8):
        yield _root((512, 512), torch.float32, 4, low)
    for p in (1, 2, 3):
        yield _root((512, 512), torch.float32, p)
    yield _root((256, 256), torch.float64, 4)


def _acceptance() -> Iterator[Case]:
    eigen, newton = "Distributed Shampoo eigen", "Distributed Shampoo Newton"
    yield _root(
        (1024, 1024),
        torch.float32,
        p=4,
        goals={eigen: 0.85, newton: 9.0},
        error_goals={eigen: 0.25},
    )
    yield _root((64, 128, 128), torch.float32, p=4, goals={eigen: 3.5, newton: 16.0})


FAMILY = Family("inverse_root", ("inverse_root",), _cases, _case, _acceptance)

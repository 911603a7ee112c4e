"""Inverse p-th roots and the Shampoo step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache, partial
from typing import Any

import torch
from spectral_kernels import _extension, optim
from spectral_kernels.inverse_root import inverse_root
from torch import Tensor

from . import peers
from .case import OURS, Case, Contender, Family, Problem, Shapes, Work, one_by_one, relative_error
from .inputs import factor, rate_of
from .steps import FREQUENCY, LR, Make, Steps, start

_SHAPES = ("128x128", "512x512", "1024x1024", "64x128x128")
_QUICK = ("512x512", "64x128x128")
_EIGEN, _NEWTON = "Distributed Shampoo eigen", "Distributed Shampoo Newton"
_RIDGE = 1e-6  # the largest eigenvalue is 1
# The same of a step's factors, whose largest eigenvalue is about 100; and one that is lost in
# rounding, so that our roots begin with float64 decompositions.
_STEP_RIDGE, _NO_RIDGE = 1e-4, 1e-6


def _case(op: str, shape: str, dtype: torch.dtype, **options: Any) -> Case:
    if op == "shampoo_step_":
        return _shampoo(shape, dtype, FREQUENCY, **options)
    return _root(shape, dtype, 4, **options)


def _root(
    shape: str | Sequence[int], dtype: torch.dtype, p: int, low: float = 1e-6, **options: Any
) -> Case:
    """Eigenvalues from 1 down to `low`, before the ridge."""
    variant = f"p={p}" if low == 1e-6 else f"p={p} low={low:.0e}"
    return Case.of_matrices(
        "inverse_root",
        shape,
        dtype,
        partial(_build, p=p, low=low),
        square=True,
        variant=variant,
        **options,
    )


def _build(
    sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, p: int, low: float
) -> Problem:
    a = factor(sizes, dtype, low, device=device)
    exact = cache(lambda: eigen_root(a.double(), p, _RIDGE))
    contenders = [
        Contender(OURS, lambda: inverse_root(a, p, ridge=_RIDGE)),
        Contender("torch eigh", lambda: eigen_root(a, p, _RIDGE), torch=True),
    ]
    if a.ndim > 2 and device.type == "cpu":
        looped = partial(one_by_one, lambda one: eigen_root(one, p, _RIDGE), a)
        contenders.append(Contender("torch eigh loop", looped, torch=True))
    return Problem(
        [*contenders, *_distributed_shampoo(a, p)],
        error=lambda out: relative_error(out, exact()),
        baseline="torch eigh",
        work=work(a, p),
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

    yield Contender(_EIGEN, call(EigenConfig()))
    yield Contender(_NEWTON, call(CoupledNewtonConfig()))


def _shampoo(
    shape: str, dtype: torch.dtype, every: int, ridge: float = _STEP_RIDGE, **options: Any
) -> Case:
    build = partial(_build_step, every=every, ridge=ridge)
    variant = "root every step" if every == 1 else f"root every {every}"
    if ridge == _NO_RIDGE:
        variant += ", ridge below rounding"
    return Case.of_list("shampoo_step_", shape, dtype, build, variant=variant, **options)


def _build_step(
    shapes: Shapes, dtype: torch.dtype, device: torch.device, *, every: int, ridge: float
) -> Problem:
    """Exponent 1/4, blocks of 1024, no grafting, the same absolute ridge for everybody."""
    steps = Steps(start(shapes, device), dtype)
    common: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.0}

    def ours(every: int) -> Make:
        return lambda params: optim.Shampoo(
            params,
            **common,
            ridge=ridge,
            relative_ridge=0.0,
            graft="none",
            precondition_frequency=every,
            stagger=False,
        )

    contenders = [steps.contender(OURS, ours, every=every)]
    contenders += steps.specification(ours, every=every)
    public = peers.find("distributed-shampoo") is not None
    if public:
        from distributed_shampoo import (
            CoupledNewtonConfig,
            DistributedShampoo,
            EigenConfig,
            RootInvShampooPreconditionerConfig as Config,
        )

        def theirs(config: object) -> Callable[[int], Make]:
            return lambda every: lambda params: DistributedShampoo(
                params,
                **common,
                epsilon=ridge,
                max_preconditioner_dim=1024,
                precondition_frequency=every,
                preconditioner_config=Config(amortized_computation_config=config),
            )

        for name, config in ((_EIGEN, EigenConfig()), (_NEWTON, CoupledNewtonConfig())):
            contenders.append(steps.contender(name, theirs(config), every=every))
    return Problem(
        contenders,
        error=steps.error(lambda: steps.oracle(ours(1))),
        baseline=_EIGEN if public else lambda: steps.on_reference(ours(1)),
        period=every,
    )


def work(a: Tensor, p: int) -> tuple[Work, ...]:
    """One triangle of every product, whole ones twice, of A^2 for the norm, and the inverses."""
    if _extension.MODULE is None:
        return ()
    b = a.double() + _RIDGE * torch.eye(a.shape[-1], dtype=torch.float64, device=a.device)
    scale = float((b @ b).norm(dim=(-2, -1)).max().sqrt())
    roundoff = torch.finfo(a.dtype).eps / 2.0
    *batch, n, _ = a.shape
    poles = 0
    if a.dtype == torch.float32 and a.device.type == "cpu":
        poles = _extension.MODULE.root_poles(_RIDGE / scale, p, n)
    iterated = _extension.MODULE.root_products(_RIDGE / scale, p, roundoff)
    products = 1 + (poles + {2: 7, 4: 11}[p] if poles else iterated)
    return ({rate_of(a.dtype, a.device): float(math.prod(batch) * products * n**3)},)


def _cases() -> Iterator[Case]:
    for shape in _SHAPES:
        yield _case("inverse_root", shape, torch.float32, quick=shape in _QUICK)
    for low in (1e-3, 1e-8):
        yield _root((512, 512), torch.float32, 4, low)
    for p in (1, 2, 3):
        yield _root((512, 512), torch.float32, p)
    yield _root((256, 256), torch.float64, 4)
    yield _shampoo("small-list", torch.float32, FREQUENCY, quick=True)
    for ridge in (_STEP_RIDGE, _NO_RIDGE):
        yield _shampoo("1024x1024", torch.float32, FREQUENCY, ridge)


def _acceptance() -> Iterator[Case]:
    yield _root(
        (1024, 1024),
        torch.float32,
        p=4,
        goals={_EIGEN: 0.85, _NEWTON: 9.0},
        error_goals={_EIGEN: 0.25},
    )
    yield _root((64, 128, 128), torch.float32, p=4, goals={_EIGEN: 3.5, _NEWTON: 16.0})
    for every, eigen, newton in ((1, 1.1, 9.0), (FREQUENCY, 1.6, 6.0)):
        goals = {_EIGEN: eigen, _NEWTON: newton}
        yield _shampoo("1024x1024", torch.float32, every, goals=goals)


def _card() -> Iterator[Case]:
    for count, n in ((256, 32), (128, 64), (64, 128), (16, 512), (4, 1024), (1, 2048)):
        yield _root((count, n, n), torch.float32, 4)
    yield _shampoo("llama-430m-layer", torch.float32, FREQUENCY)


FAMILY = Family(
    "inverse_root", ("inverse_root", "shampoo_step_"), _cases, _case, _acceptance, _card
)

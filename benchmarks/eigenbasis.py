"""Eigenbases, their refresh, and the SOAP step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from spectral_kernels import optim
from spectral_kernels.eigenbasis import eigenbasis, refresh_eigenbasis
from torch import Tensor
from torch.optim import Optimizer

from . import peers
from .case import OURS, Case, Contender, Family, Problem, relative_error
from .inputs import drifted_factor, factor
from .steps import FREQUENCY, LR, Make, Steps, ours_with, public_with, rotated_work, start

_SHAPES = ("128x128", "512x512", "1024x1024", "64x128x128")
_QUICK = ("512x512",)
_AUTHORS = "SOAP's own code"


def _case(op: str, shape: str, dtype: torch.dtype, **options: Any) -> Case:
    if op == "soap_step_":
        return Case.of_list(op, shape, dtype, _build_step, **options)
    if op == "refresh_eigenbasis":
        return _refresh(shape, dtype, **options)
    return Case.of_matrices(op, shape, dtype, _build_eigenbasis, square=True, **options)


def _refresh(
    shape: str | Sequence[int],
    dtype: torch.dtype,
    *,
    condition: float = 1e6,
    deficient: bool = False,
    **options: Any,
) -> Case:
    variant = "rank n/4" if deficient else f"cond={condition:.0e}".replace("e+0", "e")
    build = partial(_build_refresh, low=1.0 / condition, deficient=deficient)
    return Case.of_matrices(
        "refresh_eigenbasis", shape, dtype, build, square=True, variant=variant, **options
    )


def _build_eigenbasis(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    a = factor(sizes, dtype, low=1e-6, device=device)
    wanted = a.double()

    def torch_eigh() -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(a)
        return values.flip(-1), vectors.flip(-1)

    def error(out: tuple[Tensor, Tensor]) -> float:
        """||Q diag(values) Q^T - A||_F / ||A||_F: a basis is not unique, what it rebuilds is."""
        values, q = (x.double() for x in out)
        return relative_error((q * values.unsqueeze(-2)) @ q.mT, wanted)

    return Problem(
        [
            Contender(OURS, lambda: eigenbasis(a)),
            Contender("torch.linalg.eigh", torch_eigh, torch=True),
        ],
        error=error,
        baseline="torch.linalg.eigh",
    )


def _build_refresh(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    low: float,
    deficient: bool,
) -> Problem:
    *batch, n, _ = sizes
    rank = n // 4 if deficient else None
    drifted = [
        drifted_factor(n, low, rank=rank, seed=i, device=device)
        for i in range(torch.Size(batch).numel())
    ]
    q, a = (torch.stack(x).reshape(sizes).to(dtype) for x in zip(*drifted, strict=True))

    @cache
    def exact() -> tuple[Tensor, Tensor]:
        product = a.double() @ q.double()
        return torch.linalg.qr(product)[0], (q * product).sum(-2)

    def soap_route() -> Tensor:
        """diag(Q^T A Q), sort, QR: what SOAP and DeVA do."""
        estimate = (q.mT @ a @ q).diagonal(dim1=-2, dim2=-1)
        order = estimate.argsort(dim=-1, descending=True)
        ordered = q.gather(-1, order.unsqueeze(-2).expand(q.shape))
        return torch.linalg.qr(a @ ordered)[0]

    def error(out: Tensor) -> float:
        """The larger of ||Q^T Q - I||_F / sqrt(n) and ||(Q - exact) D||_F / ||D||_F.

        The eigenvalues D are weights, for directions of small ones are the input's rounding noise.
        """
        basis, (wanted, values) = out.double(), exact()
        eye = torch.eye(n, dtype=torch.float64, device=device).expand(sizes)
        signs = (basis * wanted).sum(-2, keepdim=True).sign()
        weights = values.unsqueeze(-2)
        return max(
            relative_error(basis.mT @ basis, eye),
            relative_error(basis * signs * weights, wanted * weights),
        )

    return Problem(
        [
            Contender(OURS, lambda: refresh_eigenbasis(q, a)[1]),
            Contender("torch.linalg.qr", lambda: torch.linalg.qr(a @ q)[0], torch=True),
            Contender("SOAP's route", soap_route, judged=False),
        ],
        error=error,
        baseline="torch.linalg.qr",
    )


def _build_step(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Problem:
    steps = Steps(start(shapes, device), dtype)
    ours, prepare = _maker(optim.SOAP), ours_with(_squares)
    contenders = [steps.contender(OURS, ours, prepare), *steps.specification(ours, prepare)]
    module = peers.find("soap")
    if module is not None:
        contenders.append(steps.contender(_AUTHORS, _maker(module.SOAP), public_with(_squares)))
    for name in ("pytorch-optimizer", "heavyball"):
        library = peers.find(name)
        if library is not None:
            made = _maker(partial(library.SOAP, **_SAME_WORK.get(name, {})))
            contenders.append(steps.contender(name, made, judged=False))

    def plain() -> list[Tensor]:
        return steps.on_reference(ours(1), prepare)

    return Problem(
        contenders,
        error=steps.error(lambda: steps.oracle(ours(1), prepare)),
        baseline=_AUTHORS if module is not None else plain,
        work=({"fp32": rotated_work(shapes)},),
        period=FREQUENCY,
    )


# heavyball leaves sides above 2048 alone, merges dimensions and refreshes by a schedule of its own.
_SAME_WORK: dict[str, dict[str, Any]] = {
    "heavyball": {
        "max_precond_dim": 1 << 20,
        "merge_dims": False,
        "use_precond_schedule": False,
    }
}


def _maker(cls: Callable[..., Optimizer]) -> Callable[[int], Make]:
    """SOAP's arguments have the same names everywhere."""
    return lambda every: lambda params: cls(
        params, lr=LR, betas=(0.95, 0.95), weight_decay=0.01, precondition_frequency=every
    )


def _squares(momentum: Tensor) -> Tensor:
    """A V of rank one with the momentum's row and column energies."""
    rows, columns = momentum.square().mean(1), momentum.square().mean(0)
    return torch.outer(rows, columns) / rows.mean()


def _cases() -> Iterator[Case]:
    for op in ("eigenbasis", "refresh_eigenbasis"):
        for shape in _SHAPES:
            yield _case(op, shape, torch.float32, quick=shape in _QUICK)
    yield from _conditions(512)
    yield _case("soap_step_", "small-list", torch.float32, quick=True)
    yield _case("soap_step_", "gpt2-block", torch.float32)


def _conditions(n: int) -> Iterator[Case]:
    """The spectra at which the refresh must not lose."""
    goals = {"torch.linalg.qr": 0.9}
    for condition in (1e2, 1e9):
        yield _refresh((n, n), torch.float32, condition=condition, goals=goals)
    yield _refresh((n, n), torch.float32, deficient=True, goals=goals)


def _acceptance() -> Iterator[Case]:
    for n in (512, 1024):
        yield _refresh((n, n), torch.float32, goals={"torch.linalg.qr": 1.4, "SOAP's route": 2.0})
        yield from _conditions(n)
    for shape in ("small-list", "gpt2-block"):
        yield _case("soap_step_", shape, torch.float32, goals={_AUTHORS: 3.0})


def _card() -> Iterator[Case]:
    yield _case("soap_step_", "llama-430m-layer", torch.float32)
    for op in ("eigenbasis", "refresh_eigenbasis"):
        for shape in ("64x128x128", "8x1024x1024"):
            yield _case(op, shape, torch.float32)


FAMILY = Family(
    "eigenbasis",
    ("eigenbasis", "refresh_eigenbasis", "soap_step_"),
    _cases,
    _case,
    _acceptance,
    _card,
)

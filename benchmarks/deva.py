"""The DeVA step against its authors' code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from spectral_kernels import coefficients, optim
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import newton_schulz, peers
from .case import OURS, Case, Family, Problem, Shapes
from .steps import FREQUENCY, LR, Make, Steps, combined, ours_with, public_with, rotated_work, start

_ROWS = coefficients.resolve("muon").rows
_AUTHORS = "DeVA's own code"


def _case(op: str, shape: str, dtype: torch.dtype, **options: Any) -> Case:
    return _deva(shape, dtype, reference=True, **options)


def _deva(shape: str, dtype: torch.dtype, *, reference: bool, **options: Any) -> Case:
    """With `reference` the public trajectory, which is the same work but for a few scalars."""
    build = partial(_build_step, reference=reference)
    variant = "reference" if reference else ""
    return Case.of_list("deva_step_", shape, dtype, build, variant=variant, **options)


def _build_step(
    shapes: Shapes, dtype: torch.dtype, device: torch.device, *, reference: bool
) -> Problem:
    steps = Steps(start(shapes, device), dtype)
    ours = _maker(partial(optim.DeVA, reference=reference, stagger=False))
    prepare = ours_with(_squares)
    contenders = [steps.contender(OURS, ours, prepare), *steps.specification(ours, prepare)]
    module = peers.find("deva")
    if module is not None:
        theirs = _maker(module.DeVASchattenNorm)
        contenders.append(
            steps.contender(_AUTHORS, theirs, public_with(_squares), judged=reference)
        )

    def plain() -> list[Tensor]:
        return steps.on_reference(ours(1), prepare)

    return Problem(
        contenders,
        error=steps.error(lambda: steps.oracle(ours(1), prepare)),
        baseline=_AUTHORS if module is not None and reference else plain,
        work=combined(
            [newton_schulz.work(matrix, torch.bfloat16, _ROWS, device) for matrix in shapes],
            also={"fp32": rotated_work(shapes)},
        ),
        period=FREQUENCY,
    )


def _maker(cls: Callable[..., Optimizer]) -> Callable[[int], Make]:
    def at(every: int) -> Make:
        def make(params: list[Parameter]) -> Optimizer:
            options = {"lr": LR, "betas": (0.95, 0.95), "weight_decay": 0.01}
            return cls(params, **options, precondition_frequency=every)

        return make

    return at


def _squares(momentum: Tensor) -> Tensor:
    """DeVA's V: outer products of row and column norms."""
    return torch.outer(momentum.norm(dim=1), momentum.norm(dim=0))


def _cases() -> Iterator[Case]:
    yield _deva("small-list", torch.float32, reference=False, quick=True)
    yield _deva("small-list", torch.float32, reference=True)
    yield _deva("gpt2-block", torch.float32, reference=True)


def _acceptance() -> Iterator[Case]:
    for shape, goal in (("small-list", 3.2), ("gpt2-block", 3.0)):
        yield _deva(shape, torch.float32, reference=True, goals={_AUTHORS: goal})


def _card() -> Iterator[Case]:
    yield _deva("llama-430m-layer", torch.float32, reference=False)


FAMILY = Family("deva", ("deva_step_",), _cases, _case, _acceptance, _card)

"""Whole optimizer steps from one start: the same weights, gradients and state for everybody."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from spectral_kernels import use_backend
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .case import Contender, Work, list_errors
from .inputs import gaussian, orthonormal, spectrum, with_spectrum

# Steps from refresh to refresh, of all contenders.
FREQUENCY = 10
LR = 0.02

_GRADIENTS = 4
_LOW = 1e-4  # of the factors' spectra
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Start:
    """Where training stands, in float64, one entry a matrix.

    Attributes:
        weights: what is trained.
        gradients: several lists of gradients, to be taken in turn.
        factors: left and right, the gradients' covariances but for a factor.
        bases: their eigenbases.
        momenta: rotated averages of gradients.
    """

    weights: list[Tensor]
    gradients: list[list[Tensor]]
    factors: list[tuple[Tensor, Tensor]]
    bases: list[tuple[Tensor, Tensor]]
    momenta: list[Tensor]


@functools.lru_cache(maxsize=1)
def start(shapes: tuple[tuple[int, int], ...], device: torch.device = _CPU) -> Start:
    """Gradients Q_L (sqrt(w_L w_R^T) o Z) Q_R^T: spectra that decay, in bases that stay."""
    draw = functools.partial(gaussian, device=device)
    begin = Start([], [[] for _ in range(_GRADIENTS)], [], [], [])
    for i, (m, n) in enumerate(shapes):
        bases = orthonormal(m, m, 0, device), orthonormal(n, n, 1, device)
        values = spectrum(m, _LOW, device=device), spectrum(n, _LOW, device=device)
        amplitude = torch.outer(values[0], values[1]).sqrt()
        begin.weights.append(0.02 * draw((m, n), torch.float64, 10 + i))
        for k, gradients in enumerate(begin.gradients):
            z = draw((m, n), torch.float64, 100 + _GRADIENTS * i + k)
            gradients.append(bases[0] @ (amplitude * z) @ bases[1].mT)
        begin.factors.append(
            (
                with_spectrum(bases[0], values[0] * values[1].sum()),
                with_spectrum(bases[1], values[1] * values[0].sum()),
            )
        )
        begin.bases.append(bases)
        begin.momenta.append(0.3 * amplitude * draw((m, n), torch.float64, 1000 + i))
    return begin


@dataclass
class Entry:
    """What `prepare` may set in an optimizer: one matrix's parameter and the start's values."""

    param: Parameter
    factors: tuple[Tensor, Tensor]
    bases: tuple[Tensor, Tensor]
    momentum: Tensor


Make = Callable[[list[Parameter]], Optimizer]
Prepare = Callable[[Optimizer, list[Entry]], None]


class Training:
    """An optimizer, its own weights, and gradients in turn."""

    def __init__(
        self, begin: Start, dtype: torch.dtype, make: Make, prepare: Prepare | None = None
    ) -> None:
        self._params = [Parameter(weight.to(dtype)) for weight in begin.weights]
        self._begun = [param.detach().double().clone() for param in self._params]
        self._gradients = itertools.cycle(
            [[gradient.to(dtype) for gradient in taken] for taken in begin.gradients]
        )
        self._optimizer = make(self._params)
        if prepare is not None:
            rows = zip(self._params, begin.factors, begin.bases, begin.momenta, strict=True)
            prepare(self._optimizer, [Entry(*row) for row in rows])

    def step(self) -> None:
        for param, gradient in zip(self._params, next(self._gradients), strict=True):
            param.grad = gradient
        self._optimizer.step()

    def moved(self, steps: int) -> list[Tensor]:
        """How far the weights are from where they began after some steps.

        Raises:
            RuntimeError: a counter of failures has risen: what is compared would be less work.
        """
        for _ in range(steps):
            self.step()
        for counter in ("skipped", "failed_roots"):
            count = getattr(self._optimizer, counter, 0)
            if isinstance(count, int) and count:
                raise RuntimeError(f"{type(self._optimizer).__name__}: {counter} is {count}")
        pairs = zip(self._params, self._begun, strict=True)
        return [param.detach().double() - begun for param, begun in pairs]


@dataclass(frozen=True)
class Steps:
    """Trainings to compare: `compared` steps from the same start, errors of the way moved."""

    begin: Start
    dtype: torch.dtype
    compared: int = 2

    def contender(
        self,
        name: str,
        make: Callable[[int], Make],
        prepare: Prepare | None = None,
        *,
        judged: bool = True,
        torch: bool = False,
        every: int = FREQUENCY,
    ) -> Contender:
        """`make` takes the steps from refresh to refresh: 1 to compare, `every` to time."""
        timed = functools.cache(lambda: Training(self.begin, self.dtype, make(every), prepare))
        return Contender(
            name,
            run=lambda: timed().step(),
            output=lambda: Training(self.begin, self.dtype, make(1), prepare).moved(self.compared),
            judged=judged,
            torch=torch,
        )

    def specification(
        self, make: Callable[[int], Make], prepare: Prepare | None = None, *, every: int = FREQUENCY
    ) -> list[Contender]:
        """Plain torch, matrix by matrix, on cards, where nobody else's step may be at hand."""
        if self.begin.weights[0].device.type == "cpu":
            return []
        one = self.contender("torch, the specification", make, prepare, torch=True, every=every)

        def on(call: Callable[[], Any]) -> Any:
            with use_backend("reference"):
                return call()

        run, output = one.run, one.output or one.run
        return [replace(one, run=lambda: on(run), output=lambda: on(output))]

    def on_reference(self, make: Make, prepare: Prepare | None = None) -> list[Tensor]:
        """What plain torch moves in the storage dtype: the baseline where no public code is."""
        with use_backend("reference"):
            return Training(self.begin, self.dtype, make, prepare).moved(self.compared)

    def error(
        self, exact: Callable[[], Sequence[Tensor]]
    ) -> Callable[[Sequence[Tensor]], list[float]]:
        kept = functools.cache(exact)
        return lambda moved: list_errors(moved, kept())

    def oracle(self, make: Make, prepare: Prepare | None = None) -> list[Tensor]:
        """What is moved in float64, from the same rounded weights and gradients."""
        rounded = Start(
            [x.to(self.dtype).double() for x in self.begin.weights],
            [[x.to(self.dtype).double() for x in taken] for taken in self.begin.gradients],
            self.begin.factors,
            self.begin.bases,
            self.begin.momenta,
        )
        with use_backend("reference"):
            return Training(rounded, torch.float64, make, prepare).moved(self.compared)


Squares = Callable[[Tensor], Tensor]


def ours_with(squares: Squares) -> Prepare:
    """Puts the start into the state of our SOAP or DeVA; `squares` makes V of the momentum."""

    def prepare(optimizer: Any, entries: list[Entry]) -> None:
        optimizer.init_state()
        for entry in entries:
            state = optimizer.state[entry.param]
            state["step"].fill_(FREQUENCY)
            state["exp_avg"].copy_(entry.momentum)
            state["exp_avg_sq"].copy_(squares(entry.momentum))
            for name, value in zip(("left", "right"), entry.factors, strict=True):
                state[name].copy_(value)
            for name, value in zip(("left_basis", "right_basis"), entry.bases, strict=True):
                state[name].copy_(value)

    return prepare


def public_with(squares: Squares) -> Prepare:
    """The same for the public SOAP and DeVA classes."""

    def prepare(optimizer: Optimizer, entries: list[Entry]) -> None:
        (group,) = optimizer.param_groups
        for entry in entries:
            dtype = entry.param.dtype
            optimizer.state[entry.param].update(
                step=FREQUENCY,
                exp_avg=entry.momentum.to(dtype),
                exp_avg_sq=squares(entry.momentum).to(dtype),
                GG=[factor.to(dtype) for factor in entry.factors],
                Q=[basis.to(dtype) for basis in entry.bases],
                precondition_frequency=group["precondition_frequency"],
                shampoo_beta=group["betas"][1],
            )

    return prepare


def rotated_work(shapes: Sequence[tuple[int, int]]) -> float:
    """FLOPs of a SOAP step and of DeVA's outside Newton-Schulz: two rotations, both factors, and
    the refresh every FREQUENCY steps (A Q and a Householder QR's worth)."""
    total = 0.0
    for m, n in shapes:
        total += 5.0 * (m * m * n + m * n * n) + 14.0 / 3.0 * (m**3 + n**3) / FREQUENCY
    return total


def combined(works: Sequence[Sequence[Work]], also: Work | None = None) -> tuple[Work, ...]:
    """Work of things done one after the other: all in their first form, all in their second."""
    forms = []
    for choice in zip(*works, strict=True):
        total: dict[str, float] = dict(also or {})
        for part in choice:
            for rate, flops in part.items():
                total[rate] = total.get(rate, 0.0) + flops
        forms.append(total)
    return tuple(forms)

"""What the checks of faults share: parameters, gradients, steps, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._lists import tensors_in
from ._outcome import NotApplicable
from ._subjects import Subject

Check = Callable[[Subject], str]

# Steps after which every optimizer here has left its first step and refreshed a basis or root.
STEPS = 12
# How much two computations of one thing may differ where products are in bfloat16.
NOISE = 0.05
# Numbers by which gradients are scaled are powers of two, so that nothing is rounded.
TINY, SMALL, LARGE = 2.0**-66, 2.0**-27, 2.0**66


def registered_in(faults: dict[str, Check]) -> Callable[[str], Callable[[Check], Check]]:
    """A decorator that adds a check to some faults, by name."""

    def named(name: str) -> Callable[[Check], Check]:
        def register(check: Check) -> Check:
            faults[name] = check
            return check

        return register

    return named


# Parameters, gradients, steps.


def gaussian(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # bfloat16 numbers, so that every dtype holds the same ones.
    drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
    return drawn.bfloat16().to(dtype)


def new_params(
    *shapes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    return [nn.Parameter(gaussian(s, seed + i, dtype)) for i, s in enumerate(shapes)]


def give_gradients(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """New Gaussian gradients in the layout of each parameter."""
    for i, param in enumerate(params):
        grad = torch.empty_like(param, memory_format=torch.preserve_format)
        with torch.no_grad():
            grad.copy_(gaussian(param.shape, 1000 * seed + i + 100).double() * scale)
        param.grad = grad


def take_steps(
    optimizer: Optimizer, params: Sequence[Tensor], steps: int = STEPS, scale: float = 1.0
) -> None:
    for step in range(steps):
        give_gradients(params, step + 1, scale)
        optimizer.step()


def copies_of(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def moved_from(params: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().double() - b.double() for p, b in zip(params, before, strict=True)]


def way_of(subject: Subject, params: list[nn.Parameter], scale: float = 1.0) -> list[Tensor]:
    """How far some steps without decay take the parameters."""
    before = copies_of(params)
    take_steps(undecayed(subject, params), params, scale=scale)
    return moved_from(params, before)


def undecayed(subject: Subject, params: Any, **settings: Any) -> Optimizer:
    return subject.make(params, weight_decay=0.0, **settings)


def begun(
    subject: Subject, *shapes: Sequence[int], steps: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[list[nn.Parameter], Optimizer]:
    """New parameters and an optimizer of them that has taken some steps."""
    params = new_params(*shapes, dtype=dtype)
    optimizer = undecayed(subject, params)
    take_steps(optimizer, params, steps)
    return params, optimizer


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.nan_to_num(nan=1.5e9), b.nan_to_num(nan=1.5e9)) for a, b in pairs)


def distance(one: Tensor, other: Tensor) -> float:
    """The relative distance of two ways."""
    one, other = one.detach(), other.detach()
    size = float(other.norm())
    return float((one - other).norm()) / size if size else float(one.norm())


def state_of(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    return list(tensors_in(dict(optimizer.state.get(param, {}))))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


def made(subject: Subject, params: list[nn.Parameter], what: str, **settings: Any) -> Optimizer:
    """An optimizer over parameters that it may refuse with a sentence."""
    try:
        return undecayed(subject, params, **settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise NotApplicable(f"refuses {what}: {str(error).splitlines()[0][:120]}") from None

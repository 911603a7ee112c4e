"""How far an optimizer moves its parameters under given gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


@functools.cache
def gradient(shape: Sequence[int], seed: int) -> Tensor:
    """A matrix with singular values from 1 to 2 (float64), so that factors are well-conditioned."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if x.ndim < 2:
        return x
    u, s, vh = torch.linalg.svd(x.flatten(1), full_matrices=False)
    return ((u * torch.linspace(2, 1, len(s), dtype=torch.float64)) @ vh).reshape(shape)


def parameters(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters of about unit norm."""
    return [
        torch.nn.Parameter((0.1 * gradient(shape, 1000 + i)).to(dtype))
        for i, shape in enumerate(shapes)
    ]


def steps(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    count: int,
    *,
    start: int = 0,
    gradients: Callable[[Sequence[int], int], Tensor] = gradient,
) -> None:
    """Steps with given gradients, the same whatever the parameters are."""
    for t in range(start, start + count):
        for i, p in enumerate(params):
            p.grad = gradients(p.shape, 10 * t + i).to(p.dtype, copy=True)
        optimizer.step()


def moved(
    make: Callable[[Sequence[Tensor]], Optimizer],
    shapes: Sequence[Sequence[int]],
    count: int,
    dtype: torch.dtype = torch.float32,
    gradients: Callable[[Sequence[int], int], Tensor] = gradient,
) -> list[Tensor]:
    """How far each parameter moved (float64)."""
    params = parameters(shapes, dtype)
    initial = [p.detach().clone().double() for p in params]
    steps(make(params), params, count, gradients=gradients)
    return [p.detach().double() - old for p, old in zip(params, initial, strict=True)]


def distance(mine: Tensor, theirs: Tensor) -> float:
    """The difference of two moves, relative to the second."""
    return float((mine - theirs).norm() / theirs.norm())

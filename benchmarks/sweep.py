"""Shapes nobody tuned for: `spectral-kernels bench --sweep N`."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from . import run
from .case import Case, dtype_name

# A case does at most this many FLOPs a call, so that a sweep takes seconds a case.
_MOST_FLOPS = 5e10
_DTYPES = (torch.float32, torch.bfloat16)


def cases(count: int) -> list[Case]:
    """`count` shapes of every operator, the same ones for every run: odd sizes from 96 to 4096,
    aspect ratios from 1 to 19, batches from 1 to 512, mixed parameter lists.

    Raises:
        ValueError: count is not positive.
    """
    if count < 1:
        raise ValueError(f"--sweep must be at least 1, not {count}")
    chosen = []
    for family in run.FAMILIES:
        for op in family.ops:
            draw = random.Random(op)
            make = _lists if op.endswith("_step_") else _squares if op in _SQUARE else _matrices
            for i in range(count):
                dtype = torch.float32 if op in _SQUARE else _DTYPES[i % len(_DTYPES)]
                chosen.append(family.case(op, make(draw), dtype))
    return list({(case.key, dtype_name(case.dtype)): case for case in chosen}.values())


_SQUARE = ("inverse_root", "eigenbasis", "refresh_eigenbasis")


def _bounded(draw: random.Random, propose: Callable[[], tuple[int, ...]], cost: int) -> str:
    """A proposal whose product of (batch, m, n) with a third size stays within the bound."""
    while True:
        *batch, m, n = propose()
        if cost * (batch[0] if batch else 1) * m * n * min(m, n) <= _MOST_FLOPS:
            return "x".join(map(str, (*batch, m, n)))


def _size(draw: random.Random, low: int = 96, high: int = 4096) -> int:
    """Even in logarithm; half of them multiples of 32, the rest anything."""
    size = round(low * (high / low) ** draw.random())
    return max(low, size // 32 * 32) if draw.random() < 0.5 else size


def _batch(draw: random.Random) -> tuple[int, ...]:
    return () if draw.random() < 0.6 else (2 ** draw.randint(0, 9),)


def _matrices(draw: random.Random) -> str:
    def propose() -> tuple[int, ...]:
        short = _size(draw)
        long = min(round(short * draw.choice((1, 1, 1.5, 2, 4, 8, 19))), 16384)
        return (*_batch(draw), *draw.choice(((short, long), (long, short))))

    return _bounded(draw, propose, cost=20)


def _squares(draw: random.Random) -> str:
    def propose() -> tuple[int, ...]:
        n = _size(draw, high=2048)
        return (*_batch(draw), n, n)

    return _bounded(draw, propose, cost=30)


def _lists(draw: random.Random) -> str:
    return "+".join(
        f"{_size(draw, high=768)}x{_size(draw, high=768)}" for _ in range(draw.randint(2, 6))
    )

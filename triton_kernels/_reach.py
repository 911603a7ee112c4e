"""How far a Muon step may take parameters, so that hardly any have to be looked at first."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._layout import Layout
from ._matmul import Delivery

# Of singular values in 16 bits, a step; what is doubted needlessly costs a second look.
_ROUNDING = 1.05


@dataclass(frozen=True)
class Reach:
    """What a step does with parameters.

    Attributes:
        delivery: of the step.
        most: no singular value of X is larger.
        by_rows: X goes with its rows, its Frobenius norm kept.
        sphere: W keeps its length.
    """

    delivery: Delivery
    most: float
    by_rows: bool = False
    sphere: bool = False


def reach_of(reach: Reach | None, layout: Layout) -> tuple[object, ...]:
    """scales, lr, rate, kept, decay, most, and the limit from which on a step is doubtful."""
    if reach is None:
        return (layout.table, layout.table, 1.0, 1.0, 0.0, 0.0, 0.0)
    _, _, *arguments = reach.delivery.arguments(layout)
    # Half of the range: what is compared is rounded, too.
    limit = 0.5 * torch.finfo(reach.delivery.places.dtype).max
    return (*arguments, reach.most, limit)


@functools.lru_cache(maxsize=256)
def most_of(rows: Sequence[tuple[float, float, float]], norm_factor: float) -> float:
    """A bound on the singular values behind the polynomials, of X / (norm_factor norm(X))."""
    reached = _ROUNDING / norm_factor
    for row in rows:
        reached = _ROUNDING * _largest(*row, reached)
    return reached if math.isfinite(reached) else math.inf


def _largest(a: float, b: float, c: float, end: float) -> float:
    """max |a s + b s^3 + c s^5| for 0 <= s <= end."""
    turns = [end * end]
    # The derivative, a + 3 b x + 5 c x^2 in x = s^2.
    if c:
        root = 9.0 * b * b - 20.0 * a * c
        if root >= 0.0:
            turns += [(-3.0 * b + sign * math.sqrt(root)) / (10.0 * c) for sign in (-1.0, 1.0)]
    elif b:
        turns.append(-a / (3.0 * b))
    inside = [x for x in turns if 0.0 < x <= end * end]
    values = [abs(math.sqrt(x) * (a + x * (b + x * c))) for x in inside]
    return max([value if value == value else math.inf for value in values], default=math.inf)

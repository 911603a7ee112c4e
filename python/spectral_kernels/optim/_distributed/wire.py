"""Gradients and updates in 16 bits on the way, in place of weights there and back.

The owner steps a matrix of zeros, so that what it has afterwards is the update, and a rank that
holds a part of the weights decays it and adds the update. Where the operator left a matrix alone,
which its step count tells, negative zeros travel, which no update has, and the weights stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .._work import MatrixCall

# The bits of a negative zero in bfloat16, as an integer.
_NEGATIVE_ZERO = -(1 << 15)


def counts(calls: Sequence[MatrixCall]) -> list[list[Tensor]]:
    """The step counts of every entry, as they are now."""
    return [[step.clone() for step in part.lists[-1]] for part, *_ in calls]


def mark(
    calls: Sequence[MatrixCall], before: Sequence[Sequence[Tensor]], wire: torch.dtype
) -> None:
    """Rounds updates to what travels, and marks those of entries that were not stepped."""
    for (part, *_), old in zip(calls, before, strict=True):
        for update, step, count in zip(part.lists[0], part.lists[-1], old, strict=True):
            # Adding a zero leaves everything but a negative zero.
            rounded = update.to(wire).add_(0.0)
            still = (step == count).view(*step.shape, 1, 1)
            update.copy_(rounded.masked_fill_(still, -0.0))
        for param, form, staged in part.staged:
            form.write(param, staged)


def moved(weights: Tensor, update: Tensor, decay: float, *, cautious: bool = False) -> Tensor:
    """decay W + U, and W where U is a negative zero; rounded once to the dtype of W.

    With `cautious` weight decay only what U does not take further from zero decays.
    """
    update = update.view(weights.shape)
    wide = torch.promote_types(weights.dtype, torch.float32)
    if update.dtype == torch.bfloat16:  # one pass in place of three
        left_alone = update.view(torch.int16) == _NEGATIVE_ZERO
    else:
        left_alone = (update == 0.0) & torch.signbit(update)
    old = weights.to(wide)
    decayed = decay * old
    if cautious:
        decayed = torch.where(update.sign() * old.sign() <= 0.0, decayed, old)
    new = decayed.add_(update).to(weights.dtype)
    return torch.where(left_alone, weights, new)

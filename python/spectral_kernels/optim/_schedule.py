"""When roots and bases are taken anew."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def due(
    step_counts: Sequence[Tensor],
    offsets: Sequence[int],
    frequency: int,
    *,
    stagger: bool,
    at_first: bool = False,
) -> list[int]:
    """For every entry 1 where its next step, by its own count, is a frequency-th one, else 0.

    Staggered, entry i is `offsets[i]` steps ahead. With at_first the first step is due too. Nothing
    but saved counts decides, so a resumed run refreshes when an uninterrupted one does.
    """
    if frequency == 1:
        return [1] * len(step_counts)
    shifts = offsets if stagger else [0] * len(offsets)
    steps = [_next_step(count) for count in step_counts]
    return [
        int((step + shift) % frequency == 0 or (at_first and step == 1))
        for step, shift in zip(steps, shifts, strict=True)
    ]


def _next_step(count: Tensor) -> int:
    """The number of the next step, of the matrix of a batch that is farthest."""
    if count.ndim:
        return int(count.max()) + 1 if count.numel() else 1
    return int(count.item()) + 1

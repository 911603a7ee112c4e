"""When roots and bases are taken anew."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def due(
    step_counts: Sequence[Tensor], offsets: Sequence[int], frequency: int, *, stagger: bool
) -> list[int]:
    """For every entry 1 where its next step, by its own count, is a frequency-th one, else 0.

    Staggered, entry i is `offsets[i]` steps ahead. Nothing but saved counts decides, so a resumed
    run refreshes when an uninterrupted one does.
    """
    if frequency == 1:
        return [1] * len(step_counts)
    shifts = offsets if stagger else [0] * len(offsets)
    return [
        int((next_step(count) + shift) % frequency == 0)
        for count, shift in zip(step_counts, shifts, strict=True)
    ]


def next_step(count: Tensor) -> int:
    """The number of the next step, of the matrix of a batch that is farthest."""
    if count.ndim:
        return int(count.max()) + 1 if count.numel() else 1
    return int(count) + 1

"""When roots and bases are taken anew."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _backend


class Counts:
    """Step counts that are on a device, as far as the host has to know them without waiting.

    A count rises by one a step, or stays where a matrix was skipped. So what was read once bounds
    it from below, and with the steps since then from above: it is read again where a number that
    matters lies between, all of a list in one copy.
    """

    def __init__(self) -> None:
        # By the tensor, which others keep: the least and the most that it can be.
        self._bounds: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._bounds)

    def read(self, counts: Sequence[Tensor]) -> None:
        """Learns what some counts are; waits for their device."""
        if not counts:
            return
        if _backend.is_capturing():
            raise RuntimeError(
                "a CUDA graph is being recorded, and step counts have to be read to know whether "
                "this step refreshes roots or bases: take a step outside of the graph before"
            )
        latest = [count.max() if count.ndim else count for count in counts]
        for count, value in zip(counts, torch.stack(latest).tolist(), strict=True):
            self.learn(count, int(value))

    def learn(self, count: Tensor, value: int) -> None:
        """A count was read."""
        self._bounds[count] = value, value

    def bounds(self, count: Tensor) -> tuple[int, int] | None:
        """The least and the most that a count can be, or None."""
        return self._bounds.get(count)

    def step(self, counts: Sequence[Tensor]) -> None:
        """A step is about to be taken."""
        for count in counts:
            known = self._bounds.get(count)
            if known is not None:
                self._bounds[count] = known[0], known[1] + 1

    def forget(self, counts: Sequence[Tensor]) -> None:
        """These have risen unseen."""
        for count in counts:
            self._bounds.pop(count, None)


def due(
    step_counts: Sequence[Tensor],
    offsets: Sequence[int],
    frequency: int,
    known: Counts,
    *,
    stagger: bool,
    at_first: bool = False,
    again: Iterable[bool] | None = None,
) -> list[int]:
    """For every entry 1 where its next step, by its own count, is a frequency-th one, else 0.

    Staggered, entry i is `offsets[i]` steps ahead. With at_first the first step is due too, and an
    entry that `again` says failed is due at once. Nothing but saved counts decides, so a resumed
    run refreshes when an uninterrupted one does. Of counts on a device, `known` is what the host
    knows: it is waited for only where an entry may be due.
    """
    if frequency == 1:
        known.forget(step_counts)  # nobody counts along
        return [1] * len(step_counts)
    shifts = offsets if stagger else [0] * len(offsets)

    def falls_due(least: int, most: int, shift: int) -> bool:
        to_next = -(least + 1 + shift) % frequency
        return least + to_next <= most or (at_first and least == 0)

    there = [
        (count, shift)
        for count, shift in zip(step_counts, shifts, strict=True)
        if count.device.type != "cpu" and count.numel()
    ]
    asked = []
    for count, shift in there:
        bounds = known.bounds(count)
        if bounds is None or falls_due(*bounds, shift):
            asked.append(count)
    known.read(asked)
    steps = [_count_of(count, known) for count in step_counts]
    known.step([count for count, _ in there])
    failed = [False] * len(steps) if again is None else again
    return [
        int(falls_due(step, step, shift) or once_more)
        for step, shift, once_more in zip(steps, shifts, failed, strict=True)
    ]


def _count_of(count: Tensor, known: Counts) -> int:
    """The steps taken by the matrix of a batch that is farthest, or no fewer."""
    if not count.numel():
        return 0
    if count.device.type == "cpu":
        return int(count.max())
    bounds = known.bounds(count)
    assert bounds is not None
    return bounds[1]

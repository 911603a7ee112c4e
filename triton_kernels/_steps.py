"""Steps and skips of the matrices of a list, counted on the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ._layout import upload
from ._passes import NONFINITE


class Numbered(Protocol):
    """A matrix of a list, as `newton_schulz.Item`."""

    @property
    def index(self) -> int:
        """Its number in the list."""

    @property
    def entry(self) -> int:
        """The number of its list entry."""


@functools.lru_cache(maxsize=256)
def numbers_of(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32 numbers, one a matrix."""
    return upload(torch.tensor(values, dtype=torch.float32), device)


@functools.lru_cache(maxsize=256)
def _order(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return upload(torch.tensor(indices, dtype=torch.int64), device)


class Progress:
    """Gathers what became of every matrix, and writes the counters at the end."""

    def __init__(
        self,
        items: Sequence[Numbered],
        step_counts: Sequence[Tensor],
        skipped: Tensor,
        nonfinite: str,
    ) -> None:
        entries = (item.entry for item in items)
        self._entries = [(entry, len(list(same))) for entry, same in itertools.groupby(entries)]
        self._counts, self._skipped = step_counts, skipped
        self._propagate = nonfinite == "propagate"
        self._indices: list[int] = []
        self._states: list[Tensor] = []

    def taken(self, group: Sequence[Numbered]) -> Tensor:
        """Steps that the matrices of a group have taken before this one, in fp64."""
        chosen = {item.entry for item in group}
        flat = {
            entry: self._counts[entry].double().reshape(-1).expand(count)
            for entry, count in self._entries
            if entry in chosen
        }
        starts: dict[int, int] = {}
        for item in group:
            starts.setdefault(item.entry, item.index)
        first = {entry: start for entry, start in self._starts() if entry in chosen}
        if all(count == 1 for entry, count in self._entries if entry in chosen):
            return torch.cat([flat[item.entry] for item in group])
        return torch.stack([flat[item.entry][item.index - first[item.entry]] for item in group])

    def add(self, group: Sequence[Numbered], states: Tensor) -> None:
        """States of the matrices of one group, NONFINITE where nothing was written."""
        self._indices += [item.index for item in group]
        self._states.append(states)

    def finish(self) -> None:
        """Advances the counts of what was updated, and `skipped` by the rest."""
        if not self._states:
            return
        states = torch.cat(self._states) if len(self._states) > 1 else self._states[0]
        if self._indices != sorted(self._indices):
            places = sorted(range(len(self._indices)), key=self._indices.__getitem__)
            states = states[_order(tuple(places), states.device)]
        kept = (states == NONFINITE.value) & (not self._propagate)
        self._skipped.add_(kept.sum())
        updated = (~kept).to(torch.float32)
        counts = [self._counts[entry] for entry, _ in self._entries]
        single = all(count.ndim == 0 and count.dtype == updated.dtype for count in counts)
        if single and all(count == 1 for _, count in self._entries):
            torch._foreach_add_(counts, list(updated.unbind()))
            return
        for (entry, size), part in zip(
            self._entries, updated.split([size for _, size in self._entries]), strict=True
        ):
            count = self._counts[entry]
            steps = part.reshape(count.shape) if count.ndim else part.amax()
            count.add_(steps.to(count.dtype))
            assert len(part) == size

    def _starts(self) -> list[tuple[int, int]]:
        starts, at = [], 0
        for entry, count in self._entries:
            starts.append((entry, at))
            at += count
        return starts

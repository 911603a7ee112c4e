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
        counts = [self._counts[entry] for entry, _ in self._entries]
        advance_(counts, tuple(size for _, size in self._entries), ~kept)


def advance_(counts: Sequence[Tensor], sizes: tuple[int, ...], updated: Tensor) -> None:
    """Adds what was updated to the steps of every entry, one number for it or one a matrix."""
    done = updated.to(torch.float32)
    whole = parts = done.split(sizes)
    if max(sizes) > 1:
        entries = [i for i, size in enumerate(sizes) for _ in range(size)]
        owners = _order(tuple(entries), done.device)
        whole = done.new_zeros(len(sizes)).scatter_reduce(0, owners, done, "amax").unbind()
    steps = [
        (part if count.ndim else one).reshape(count.shape).to(count.dtype)
        for count, part, one in zip(counts, parts, whole, strict=True)
    ]
    for dtype in {count.dtype for count in counts}:
        chosen = [i for i, count in enumerate(counts) if count.dtype == dtype]
        torch._foreach_add_([counts[i] for i in chosen], [steps[i] for i in chosen])


class Stack:
    """Entries of a list step that share shape, dtypes and options, as one batch.

    Attributes:
        entries: their numbers in the lists.
        shape: (m, n).
    """

    def __init__(self, entries: Sequence[int], params: Sequence[Tensor]) -> None:
        self.entries = list(entries)
        self.shape = params[self.entries[0]].shape[-2:]
        self._device = params[self.entries[0]].device
        self._sizes = [params[e].numel() // self.shape.numel() for e in self.entries]

    def take(self, tensors: Sequence[Tensor], rank: int = 2) -> Tensor | None:
        """(count, ...) of the entries' tensors, the last `rank` dimensions kept; None if absent."""
        chosen = [tensors[e] for e in self.entries]
        if not chosen[0].numel():
            return None
        parts = [x.reshape(-1, *x.shape[x.ndim - rank :]) for x in chosen]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def spread(self, values: Sequence[float]) -> Tensor:
        """Numbers of the entries for every matrix, fp32 (count,)."""
        pairs = zip(self.entries, self._sizes, strict=True)
        spread = tuple(float(values[e]) for e, size in pairs for _ in range(size))
        return numbers_of(spread, self._device)

    def steps(self, counts: Sequence[Tensor]) -> Tensor:
        """The numbers, from 1, of the steps about to be taken, fp64 (count,)."""
        pairs = zip(self.entries, self._sizes, strict=True)
        return torch.cat([counts[e].reshape(-1).expand(size) for e, size in pairs]).double() + 1.0

    def put_(
        self, tensors: Sequence[Tensor], old: Tensor | None, new: Tensor | None, where: Tensor
    ) -> None:
        """Writes new values of the chosen matrices; the others keep their bits."""
        if old is None or new is None:
            return
        shape = (-1,) + (1,) * (old.ndim - 1)
        parts = torch.where(where.view(shape), new, old).split(self._sizes)
        targets = [tensors[e] for e in self.entries]
        shaped = [part.reshape(x.shape) for x, part in zip(targets, parts, strict=True)]
        torch._foreach_copy_(targets, shaped)

    def count_(
        self, counts: Sequence[Tensor], skipped: Tensor, updated: Tensor, kept: Tensor
    ) -> None:
        """Advances the steps of what was updated, and `skipped` by what was kept."""
        skipped.add_(kept.sum())
        advance_([counts[entry] for entry in self.entries], tuple(self._sizes), updated)


def stacks_of(params: Sequence[Tensor], *keys: Sequence[object]) -> list[Stack]:
    """Entries by shape and dtype of the parameter, and by whatever else they must share."""
    groups: dict[object, list[int]] = {}
    for i, param in enumerate(params):
        if param.numel():
            key = (param.shape[-2:], param.dtype, *(_kind(values[i]) for values in keys))
            groups.setdefault(key, []).append(i)
    return [Stack(entries, params) for entries in groups.values()]


def _kind(value: object) -> object:
    """What has to agree of a tensor is its dtype and whether it is there."""
    return (value.dtype, value.numel() == 0) if isinstance(value, Tensor) else value


def finite(*tensors: Tensor | None) -> Tensor:
    """Which matrices of a batch are finite in all of some tensors."""
    # The largest is NaN where an element is.
    found = [x.abs().flatten(1).amax(1) for x in tensors if x is not None]
    return torch.stack(found).isfinite().all(0)


def outside_range(grad: Tensor) -> Tensor:
    """Which gradients are so large or small that their squares leave fp32."""
    largest = grad.abs().flatten(1).amax(1)
    usual = (largest >= 2.0**-50) & (largest <= 2.0**50)
    return ~usual & (largest != 0.0) & largest.isfinite()


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number a matrix, fp32, to be broadcast over a batch."""
    return values.float().view((-1,) + (1,) * (like.ndim - 1))


def move_(
    stack: Stack,
    params: Sequence[Tensor],
    update: Tensor,
    where: Tensor,
    *,
    rate: Tensor,
    decay: Tensor,
) -> None:
    """W <- decay W - rate U, rounded once, for the chosen matrices."""
    old = stack.take(params)
    assert old is not None
    new = column(decay, old) * old.float() - column(rate, old) * update
    stack.put_(params, old, new.to(old.dtype), where)


def rate_of(lr: Tensor, count: int, device: torch.device) -> Tensor:
    """The learning rate for every matrix, fp64; one on the host is filled in, not copied."""
    if lr.device.type == "cpu":
        return torch.full((count,), float(lr), dtype=torch.float64, device=device)
    return lr.to(torch.float64).reshape(()).expand(count)


def length(x: Tensor) -> Tensor:
    """The Frobenius norm of every matrix, fp64."""
    return x.double().square().flatten(1).sum(1).sqrt()

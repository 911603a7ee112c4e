"""Matrices of a list in batches of one shape, for what torch does with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from spectral_kernels._options import BasisLists
from torch import Tensor

from ._config import STACK_ELEMENTS
from ._device import IDLE, NONFINITE, NORMAL
from ._layout import kept, upload
from ._rounding import rounded_at_random

R = TypeVar("R")

# Of an entry: whether its matrices are worked on in a `Stack`, or which of them are.
Apart = bool | tuple[bool, ...]


@kept(256)
def numbers_of(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32 numbers, one a matrix."""
    return upload(torch.tensor(values, dtype=torch.float32, device="cpu"), device)


@kept(256)
def _flags(values: tuple[bool, ...], device: torch.device) -> Tensor:
    return upload(torch.tensor(values, dtype=torch.bool, device="cpu"), device)


class Piece(NamedTuple):
    """Matrices of one entry: all of them, or begin .. end - 1 of its only batch dimension."""

    entry: int
    begin: int
    end: int
    whole: bool

    def of(self, x: Tensor) -> Tensor:
        """The same of one of the entry's tensors, a view."""
        # One number may count for all of a batch.
        return x if self.whole or not x.ndim else x[self.begin : self.end]


def flags_of(refresh: Sequence[int] | None) -> tuple[bool, ...]:
    """Which entries are refreshed; of what is no list none, which a check refuses."""
    return tuple(map(bool, refresh)) if isinstance(refresh, Sequence) else ()


def basis_stacks(lists: BasisLists, refresh: Sequence[int], apart: Sequence[Apart]) -> list[Stack]:
    """The stacks of a step in eigenbases."""
    moments = lists.exp_avgs, lists.exp_avg_sqs
    keys = lists.grads, lists.lefts, lists.rights, flags_of(refresh)
    return stacks_of(lists.params, lists.step_counts, *keys, moments=moments, apart=apart)


class Stack:
    """Entries of a list step that share shape, dtypes and options, or parts of them, as one batch.

    Attributes:
        pieces: what it holds.
        shape: (m, n).
        slots: where the states of its matrices are among those of the step.
    """

    def __init__(self, pieces: Sequence[Piece], params: Sequence[Tensor]) -> None:
        self.pieces = list(pieces)
        first = params[self.pieces[0].entry]
        self.shape = first.shape[-2:]
        self._device = first.device
        self._sizes = [piece.end - piece.begin for piece in self.pieces]
        self.slots = slice(0, 0)

    def take(self, tensors: Sequence[Tensor], rank: int = 2) -> Tensor | None:
        """(count, ...) of the entries' tensors, the last `rank` dimensions kept; None if absent."""
        if not tensors[self.pieces[0].entry].numel():
            return None
        chosen = self._of(tensors)
        parts = [x.reshape(-1, *x.shape[x.ndim - rank :]) for x in chosen]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def take_moment(self, tensors: Sequence[Tensor], rank: int = 2) -> Tensor | None:
        """As `take`, in float32 where it is kept in bfloat16."""
        taken = self.take(tensors, rank)
        return taken.float() if taken is not None and taken.dtype == torch.bfloat16 else taken

    def _of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [piece.of(tensors[piece.entry]) for piece in self.pieces]

    def option(self, values: Sequence[R]) -> R:
        """What all of its entries have of an option."""
        return values[self.pieces[0].entry]

    def spread(self, values: Sequence[float]) -> Tensor:
        """Numbers of the entries for every matrix, fp32 (count,)."""
        pairs = zip(self.pieces, self._sizes, strict=True)
        spread = tuple(float(values[piece.entry]) for piece, size in pairs for _ in range(size))
        return numbers_of(spread, self._device)

    def steps(self, counts: Sequence[Tensor]) -> Tensor:
        """The numbers, from 1, of the steps about to be taken, fp64 (count,)."""
        pairs = zip(self._of(counts), self._sizes, strict=True)
        return torch.cat([count.reshape(-1).expand(size) for count, size in pairs]).double() + 1.0

    def put_(
        self, tensors: Sequence[Tensor], old: Tensor | None, new: Tensor | None, where: Tensor
    ) -> None:
        """Writes new values of the chosen matrices; the others keep their bits."""
        if old is None or new is None:
            return
        shape = (-1,) + (1,) * (old.ndim - 1)
        parts = torch.where(where.view(shape), new, old).split(self._sizes)
        targets = self._of(tensors)
        shaped = [part.reshape(x.shape) for x, part in zip(targets, parts, strict=True)]
        torch._foreach_copy_(targets, shaped)

    def put_moment_(
        self,
        tensors: Sequence[Tensor],
        old: Tensor | None,
        new: Tensor | None,
        where: Tensor,
        t: Tensor,
    ) -> None:
        """As `put_`, rounded at random at steps t where it is kept in bfloat16."""
        if old is not None and new is not None and self.option(tensors).dtype == torch.bfloat16:
            # What is kept was in bfloat16.
            old, new = old.to(torch.bfloat16), rounded_at_random(new, t)
        self.put_(tensors, old, new, where)

    def chosen(self, flags: Sequence[tuple[bool, ...] | None]) -> Tensor | None:
        """Which of its matrices have flags that are set in those of the entries; None if none."""
        found = self._flags(flags)
        return _flags(found, self._device) if any(found) else None

    def all_chosen(self, flags: Sequence[tuple[bool, ...] | None]) -> bool:
        """Whether all of its matrices have flags that are set."""
        return all(self._flags(flags))

    def _flags(self, flags: Sequence[tuple[bool, ...] | None]) -> tuple[bool, ...]:
        found: list[bool] = []
        for piece, size in zip(self.pieces, self._sizes, strict=True):
            own = flags[piece.entry]
            found += (False,) * size if own is None else own[piece.begin : piece.end]
        return tuple(found)

    def note_(self, states: Tensor, kept: Tensor, idle: Tensor | None = None) -> None:
        """Tells which matrices were skipped, and which took no step."""
        if idle is None:
            found = torch.where(kept, NONFINITE.value, NORMAL.value)
        else:
            found = torch.where(kept, NONFINITE.value, torch.where(idle, IDLE.value, NORMAL.value))
        states[self.slots] = found


def stacks_of(
    params: Sequence[Tensor],
    counts: Sequence[Tensor],
    *keys: Sequence[object],
    moments: Sequence[Sequence[Tensor]],
    apart: Sequence[Apart],
) -> list[Stack]:
    """Entries that are `apart`, by shape, dtypes, and whatever else they must share.

    A stack holds at most STACK_ELEMENTS of parameters, gradients and factors, or one matrix: a step
    keeps some twenty copies of a stack, and one of a whole list would need more than its state. A
    batch is cut for it where it has one dimension and counts the steps of every matrix.
    """
    groups: dict[object, list[list[Piece]]] = {}
    filled: dict[object, int] = {}
    for i, param in enumerate(params):
        dtypes = tuple(x[i].dtype for x in (params, *moments))
        key = (param.shape[-2:], dtypes, *(_kind(values[i]) for values in keys))
        given = [values[i] for values in keys]
        size = param.numel() + sum(x.numel() for x in given if isinstance(x, Tensor))
        for piece in _pieces(i, param, counts[i], size, apart[i]):
            part = size // param.shape[:-2].numel() * (piece.end - piece.begin)
            if filled.get(key, STACK_ELEMENTS) + part > STACK_ELEMENTS:
                groups.setdefault(key, []).append([])
                filled[key] = 0
            groups[key][-1].append(piece)
            filled[key] += part
    return [Stack(pieces, params) for parts in groups.values() for pieces in parts]


def _pieces(entry: int, param: Tensor, count: Tensor, size: int, apart: Apart) -> Iterator[Piece]:
    """The parts of an entry that a stack holds whole; none where it has no elements."""
    if not param.numel() or apart is False:
        return
    if apart is not True:
        yield from (Piece(entry, i, i + 1, False) for i, one in enumerate(apart) if one)
        return
    matrices = param.shape[:-2].numel()
    each = matrices
    if param.ndim == 3 and count.ndim == 1:
        each = max(1, STACK_ELEMENTS * matrices // size)
    for begin in range(0, matrices, each):
        end = min(begin + each, matrices)
        yield Piece(entry, begin, end, end - begin == matrices)


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


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN stays, which torch.sign makes 0."""
    return torch.where(x.isnan(), x, x.sign())


def moved(old: Tensor, update: Tensor, *, rate: Tensor, decay: Tensor) -> Tensor:
    """decay W - rate U of a batch, rounded once."""
    new = column(decay, old) * old.float() - column(rate, old) * update
    return new.to(old.dtype)


def rate_of(lr: Tensor, count: int, device: torch.device) -> Tensor:
    """The learning rate for every matrix, fp64; one on the host is filled in, not copied."""
    if lr.device.type == "cpu":
        return torch.full((count,), float(lr), dtype=torch.float64, device=device)
    return lr.to(torch.float64).reshape(()).expand(count)


def length(x: Tensor) -> Tensor:
    """The Frobenius norm of every matrix, fp64."""
    return x.double().square().flatten(1).sum(1).sqrt()

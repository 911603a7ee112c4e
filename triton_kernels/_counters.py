"""Steps and skips of the matrices of a list, counted on the device in one launch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import IDLE, NONFINITE, PLACE_COLUMNS, launch
from ._groups import Group, Kind, Row, Rows, Table
from ._layout import kept, upload

_DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.int64: tl.int64}
_BLOCK = 256


@triton.jit
def _counted(
    states, slots, first, number, SKIPPED: tl.constexpr, PROPAGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of `number` matrices from `first` on took their step, or were SKIPPED."""
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, number, BLOCK):
        inside = start + lanes < number
        slot = tl.load(slots + first + start + lanes, mask=inside, other=0)
        state = tl.load(states + slot, mask=inside, other=IDLE)
        if PROPAGATE:
            found += tl.where(inside, 0 if SKIPPED else 1, 0)
        elif SKIPPED:
            found += tl.where(state == NONFINITE, 1, 0)
        else:
            found += tl.where((state == NONFINITE) | (state == IDLE), 0, 1)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=("matrices",))
def _count_kernel(
    rows, slots, states, skipped, matrices,
    DTYPE: tl.constexpr, SKIPS: tl.constexpr, PROPAGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A row is a count's address, the first of its matrices, and how many it has.
    row = rows + tl.program_id(0) * PLACE_COLUMNS
    first, number = tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    if _counted(states, slots, first, number, False, PROPAGATE, BLOCK) > 0:
        count = tl.load(row).to(tl.pointer_type(DTYPE))
        # One tensor may count for several entries.
        tl.atomic_add(count, tl.full((), 1, DTYPE))
    if SKIPS:  # noqa: SIM102 - known when compiling, unlike the next
        if tl.program_id(0) == 0:
            left = _counted(states, slots, 0, matrices, True, PROPAGATE, BLOCK)
            tl.store(skipped, tl.load(skipped) + left)


@triton.jit
def _steps_kernel(rows, steps, DTYPE: tl.constexpr):
    # A row is the address of a matrix's count, and the matrix's slot.
    row = rows + tl.program_id(0) * PLACE_COLUMNS
    count = tl.load(tl.load(row).to(tl.pointer_type(DTYPE)))
    tl.store(steps + tl.load(row + 1), count.to(tl.int64))


@dataclass(frozen=True, eq=False)
class Counters:
    """Counts of the steps of a list.

    Attributes:
        slots: of every matrix of the list, in their order.
        size: of a table with all slots.
        counts: rows of counts with their matrices, by dtype.
        single: rows of the count of every matrix, by dtype.
    """

    slots: tuple[int, ...]
    size: int
    counts: tuple[tuple[torch.dtype, slice], ...]
    single: tuple[tuple[torch.dtype, slice], ...]

    def steps(self, table: Table, device: torch.device) -> Tensor:
        """int64, how many steps the matrix in every slot has taken."""
        steps = torch.empty(self.size, dtype=torch.int64, device=device)
        for dtype, rows in self.single:
            programs = rows.stop - rows.start
            launch(_steps_kernel, programs, table[rows], steps, DTYPE=_DTYPES[dtype])
        return steps

    def advance_(self, table: Table, states: Tensor, skipped: Tensor, *, propagate: bool) -> None:
        """Advances the counts of what was updated, and `skipped` by the rest.

        Args:
            table: of the rows.
            states: int32, of the matrix in every slot; NONFINITE where nothing was written, and
                IDLE where that is no step, nor a skip.
            skipped: one int64.
            propagate: everything was updated.
        """
        for i, (dtype, rows) in enumerate(self.counts):
            launch(
                _count_kernel,
                rows.stop - rows.start,
                table[rows],
                _slots(self, states.device),
                states,
                skipped,
                len(self.slots),
                DTYPE=_DTYPES[dtype],
                SKIPS=i == 0,
                PROPAGATE=propagate,
                BLOCK=_BLOCK,
            )


@kept(256)
def _slots(counters: Counters, device: torch.device) -> Tensor:
    return upload(torch.tensor(counters.slots, dtype=torch.int32, device="cpu"), device)


class Numbered(NamedTuple):
    """Matrices that have slots, as a `Group` has them."""

    numbers: tuple[int, ...]
    slots: slice
    entries: tuple[int, ...]


def counters_of(
    groups: Sequence[Group | Numbered], kinds: Sequence[Kind], first_owner: int, rows: Rows
) -> Counters:
    """Slots for the matrices of groups, and rows for the counts of a list; those are added.

    Args:
        groups: all matrices of the list.
        kinds: of the counts, 0-dim or one number a matrix.
        first_owner: the number of the first count among all tensors.
        rows: see `Rows`.
    """
    slots: dict[int, int] = {}
    entries: dict[int, int] = {}
    for group in groups:
        at = range(group.slots.start, group.slots.stop)
        slots.update(zip(group.numbers, at, strict=True))
        entries.update(zip(group.numbers, group.entries, strict=True))
    order = sorted(slots)
    counts: dict[torch.dtype, tuple[list[int], list[Row]]] = {}
    single: dict[torch.dtype, tuple[list[int], list[Row]]] = {}
    for entry, same in itertools.groupby(order, key=entries.__getitem__):
        kind, numbers = kinds[entry], list(same)
        if kind.shape:
            pairs = list(zip(kind.offsets(0), numbers, strict=True))
            shared = [(offset, number, 1) for offset, number in pairs]
        else:
            pairs = [(0, number) for number in numbers]
            shared = [(0, numbers[0], len(numbers))]
        own = [(offset, slots[number], 0) for offset, number in pairs]
        _add(counts, kind.dtype, first_owner + entry, shared)
        _add(single, kind.dtype, first_owner + entry, own)
    return Counters(
        tuple(slots[number] for number in order),
        max((group.slots.stop for group in groups), default=0),
        tuple((dtype, rows.add(*found)) for dtype, found in counts.items()),
        tuple((dtype, rows.add(*found)) for dtype, found in single.items()),
    )


def _add(
    found: dict[torch.dtype, tuple[list[int], list[Row]]],
    dtype: torch.dtype,
    owner: int,
    rows: Sequence[Row],
) -> None:
    owners, known = found.setdefault(dtype, ([], []))
    owners += [owner] * len(rows)
    known += rows

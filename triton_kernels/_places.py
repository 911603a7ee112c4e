"""Where the matrices of a list stand in the caller's tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._device import ALIGNED, PLACE_COLUMNS, ROW_MAJOR, STRIDED
from ._layout import kept, upload

# Address, row stride, column stride, rows, columns. Units ask of the address only what it is
# modulo 16.
Place = tuple[int, int, int, int, int]

_LARGEST_STRIDE = 2**22


# A unit, and the matrices that have it; None for all of them.
Chosen = tuple[int, tuple[int, ...] | None]


@dataclass(frozen=True)
class Units:
    """Which of a matrix's strides is 1, as kernels know it when they are compiled, see `_device`.

    Attributes:
        each: of every matrix.
        common: what holds for all of them.
        wide: which matrices have which unit once they are turned to be wide.
    """

    each: tuple[int, ...]
    common: int
    wide: tuple[Chosen, ...]


class Places(NamedTuple):
    """Matrices of a list of tensors of one dtype.

    Attributes:
        table: int64, (address, row stride, column stride) a matrix, on the device.
        dtype: of all of them.
        units: of them.
    """

    table: Tensor
    dtype: torch.dtype
    units: Units

    @property
    def unit(self) -> int:
        """What holds for all of them."""
        return self.units.common


# Of workspaces: all matrices, in no special place.
EVERYTHING: tuple[Chosen, ...] = ((STRIDED.value, None),)


@functools.lru_cache(maxsize=1024)
def units_of(places: tuple[Place, ...]) -> Units:
    """The units of some matrices."""
    each = tuple(map(_unit, places))
    groups: dict[int, list[int]] = {}
    for i, (unit, (*_, m, n)) in enumerate(zip(each, places, strict=True)):
        groups.setdefault(swapped_unit(unit) if m > n else unit, []).append(i)
    whole = len(groups) == 1
    wide = tuple((unit, None if whole else tuple(chosen)) for unit, chosen in groups.items())
    return Units(each, _common(set(each)), wide)


def _common(units: set[int]) -> int:
    """The unit of several matrices in one launch."""
    if len(units) == 1:
        return min(units)
    plain = {unit % ALIGNED for unit in units}
    return plain.pop() if len(plain) == 1 else STRIDED.value


def swapped_unit(unit: int) -> int:
    """The unit of the transposed matrix."""
    if unit == STRIDED.value:
        return unit
    plain = unit % ALIGNED
    return unit - plain + ROW_MAJOR.value - plain


def _unit(place: Place) -> int:
    address, rows, cols, height, width = place
    other, line = (rows, width) if cols == 1 else (cols, height)
    if 1 not in (rows, cols) or other >= _LARGEST_STRIDE:
        return STRIDED.value
    aligned = address % 16 == 0 and other % 16 == 0 and line % 16 == 0
    return int(cols == 1) + (ALIGNED if aligned else 0)


def places_of(matrices: Sequence[Place], dtype: torch.dtype, device: torch.device) -> Places:
    """The table of some matrices, kept for the next call with the same addresses."""
    rows = tuple(matrices)
    units = units_of(tuple((address % 16, *rest) for address, *rest in rows))
    return Places(_table(rows, device), dtype, units)


def matrices_of(x: Tensor) -> list[Place]:
    """The place of every matrix of a batch."""
    begin = x.data_ptr()
    strides, shape = x.stride()[-2:], x.shape[-2:]
    offsets = offsets_of(x.shape[:-2], x.stride()[:-2])
    size = x.element_size()
    return [(begin + offset * size, *strides, *shape) for offset in offsets]


def offsets_of(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Where the elements of a strided tensor are, from its first one."""
    found = [0]
    for count, stride in zip(shape, strides, strict=True):
        found = [start + i * stride for start in found for i in range(count)]
    return found


@kept()
def _table(rows: tuple[Place, ...], device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 5)
    return upload(table[:, : PLACE_COLUMNS.value], device)

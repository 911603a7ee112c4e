"""Parameters whose rows are several matrices, one below the other, each stepped by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from .. import _checks

Split: TypeAlias = int | tuple[int, ...] | None


def rule(name: str, value: Any) -> Split:
    """None, a number of equal parts, or the rows of every part."""
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError(f"{name} must name at least one part, not {value!r}")
        return tuple(_checks.integer(f"{name}[{i}]", rows, 1) for i, rows in enumerate(value))
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a number of parts or the rows of each, not {value!r}")
    return _checks.integer(name, value, 1)


def sizes_of(rows: int, split: Split) -> tuple[int, ...]:
    """The rows of every part of a matrix.

    Raises:
        ValueError: parts that do not make up the matrix.
    """
    if split is None:
        return (rows,)
    if isinstance(split, int):
        if rows % split:
            raise ValueError(f"split={split} does not divide {rows} rows")
        return (rows // split,) * split
    if sum(split) != rows:
        raise ValueError(f"split={split} makes {sum(split)} rows of {rows}")
    return split


def cut(x: Tensor, split: Split) -> list[Tensor]:
    """The parts of (..., m, n) as entries of a list step, views of x.

    Parts of one height that follow one another are one batch where x is a single matrix: thousands
    of heads would otherwise be thousands of entries.
    """
    sizes = sizes_of(x.shape[-2], split)
    if len(sizes) == 1:
        return [x]
    found, start = [], 0
    for first, count in runs(sizes, merged=x.ndim == 2):
        size = sizes[first]
        part = x.narrow(-2, start, size * count)
        found.append(part.unflatten(-2, (count, size)) if count > 1 else part)
        start += size * count
    return found


def cut_steps(steps: Tensor, sizes: Sequence[int], *, merged: bool) -> list[Tensor]:
    """The step counts, (parts, ...), of the entries that `cut` makes."""
    if len(sizes) == 1:
        return [steps]
    return [
        steps[first : first + count] if count > 1 else steps[first]
        for first, count in runs(sizes, merged=merged)
    ]


def runs(sizes: Sequence[int], *, merged: bool) -> list[tuple[int, int]]:
    """(first, count) of parts that make one entry."""
    found: list[tuple[int, int]] = []
    for i, size in enumerate(sizes):
        if merged and i and sizes[i - 1] == size:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((i, 1))
    return found

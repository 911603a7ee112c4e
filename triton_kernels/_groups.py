"""Which matrices of a list share their launches, and how each is iterated on.

All of it is found from shapes, strides, dtypes and options, and kept for the next list of the same:
addresses of tensors come in at the end, in one table a step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from spectral_kernels._options import MuonOptions, NewtonSchulzOptions
from torch import Tensor

from ._addresses import Addresses
from ._config import GROUP_ELEMENTS, Config, config_for, is_small, small_config
from ._device import PLACE_COLUMNS
from ._layout import ALIGNED_NUMBERS, Layout, Shape, kept, layout_of, padded, upload
from ._places import Place, Places, Units, offsets_of, units_of


@dataclass(frozen=True)
class Rule:
    """What is iterated.

    Attributes:
        rows: (a, b, c) of every step.
        method: "auto", "standard" or "gram".
        compute_dtype: of X; 16-bit means 16-bit operands and fp32 sums.
        eps, norm, norm_factor: X is divided by max(norm_factor norm(X), eps).
    """

    rows: tuple[tuple[float, float, float], ...]
    method: str
    compute_dtype: torch.dtype
    eps: float = 0.0
    norm: str = "frobenius"
    norm_factor: float = 1.0

    @property
    def schatten8(self) -> bool:
        """Whether the norm needs the square of the Gram matrix."""
        return self.norm == "schatten8"


def rule_of(options: NewtonSchulzOptions | MuonOptions) -> Rule:
    """What is iterated, wherever restarts are."""
    return Rule(
        tuple((float(a), float(b), float(c)) for a, b, c in options.rows),
        options.method,
        options.compute_dtype,
        options.eps,
        options.norm,
        options.norm_factor,
    )


@dataclass(frozen=True)
class Plan:
    """How one matrix is iterated on: a function of its shape and the rule alone.

    Attributes:
        form: "small", "standard" or "gram".
        config: of its products; the tile of "small" is the padded short side.
        restarts: steps before which X and R are formed anew ("small": bits of a number).
    """

    form: str
    config: Config
    restarts: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def plan_of(m: int, n: int, rule: Rule, restarts: tuple[int, ...], arch: str) -> Plan:
    """The plan of an m x n matrix."""
    short, long = min(m, n), max(m, n)
    one_program = is_small(arch, rule.compute_dtype, short, long)
    gram = _is_gram(short, long, rule, restarts, one_program)
    if one_program:
        every = tuple(range(1, len(rule.rows)))
        config = small_config(arch, short)
        return Plan("small", config, restarts if gram else every)
    config = config_for(arch, rule.compute_dtype, short)
    return Plan("gram", config, restarts) if gram else Plan("standard", config, ())


# An fp32-grade product of the Gram form against a 16-bit one: three TF32 products at half the rate.
_FULL_PRECISION_COST = 6.0


def _is_gram(
    short: int, long: int, rule: Rule, restarts: tuple[int, ...], one_program: bool
) -> bool:
    if rule.method != "auto":
        return rule.method == "gram"
    full = rule.compute_dtype == torch.float32
    if full and not restarts:
        return False  # the Gram form would lose accuracy without
    if one_program:
        return True  # the passes over X are what counts
    rate = 1.0 if full else _FULL_PRECISION_COST
    square, product = float(short) ** 3, float(short) ** 2 * long
    cuts = [0, *sorted(set(restarts)), len(rule.rows)]
    standard = gram = 0.0
    for begin, end in itertools.pairwise(cuts):
        squares = sum(0.5 * square for _, _, c in rule.rows[begin:end] if c)
        alone = 1.5 * product * (end - begin) + squares
        standard += alone
        # Q Z and twice R; Q is two 16-bit numbers.
        gram += (
            alone
            if end - begin == 1
            else (1.5 if full else 2.5) * product
            + rate * (squares + 1.5 * square * (end - begin - 1))
        )
    return gram < standard


class Kind(NamedTuple):
    """A tensor but for its address.

    Attributes:
        dtype, shape, strides: as the tensor has them.
        phase: its address modulo 16.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    phase: int

    @classmethod
    def of(cls, x: Tensor) -> Kind:
        """That of a tensor."""
        return cls(x.dtype, tuple(x.shape), x.stride(), x.data_ptr() % 16)

    def offsets(self, inner: int = 2) -> list[int]:
        """Bytes from its address to every part of `inner` dimensions."""
        outer = len(self.shape) - inner
        size = self.dtype.itemsize
        return [size * x for x in offsets_of(self.shape[:outer], self.strides[:outer])]


# Bytes from the address of a tensor, and two numbers more.
Row = tuple[int, int, int]


class Rows:
    """A table of int64 triples that begin with addresses, while those of tensors are unknown."""

    def __init__(self) -> None:
        self._owners: list[int] = []
        self._rows: list[Row] = []
        self._begins: list[int] = []
        self._fixed = self._which = torch.empty(0, dtype=torch.int64, device="cpu")

    def add(self, owners: Sequence[int], rows: Sequence[Row]) -> slice:
        """Rows of the tensors with these numbers, and where they are."""
        if len(self._rows) % 2:
            # Multiples of 16 bytes: Triton compiles anew for addresses that are none.
            self._owners.append(self._owners[-1])
            self._rows.append(self._rows[-1])
        begin = len(self._rows)
        self._begins.append(begin)
        self._owners += owners
        self._rows += rows
        return slice(begin, len(self._rows))

    def close(self) -> None:
        """No more rows."""
        shape = -1, PLACE_COLUMNS.value
        self._fixed = torch.tensor(self._rows, dtype=torch.int64, device="cpu").reshape(shape)
        self._which = torch.tensor(self._owners, dtype=torch.int64, device="cpu")

    def at(self, addresses: Addresses) -> Tensor:
        """The table for tensors at these addresses."""
        table = self._fixed.clone()
        table[:, 0] += addresses.tensor.index_select(0, self._which)
        return table

    def parts(self, table: Tensor) -> dict[int, Tensor]:
        """The rows that were added together, by where they begin."""
        edges = [*self._begins, len(self._rows)]
        sizes = [end - begin for begin, end in itertools.pairwise(edges)]
        return dict(zip(self._begins, table.split_with_sizes(sizes) if sizes else (), strict=True))


class Table:
    """The rows of a step on the device, in the parts that were added together."""

    def __init__(self, rows: Rows, table: Tensor) -> None:
        self._parts = rows.parts(table)

    def __getitem__(self, rows: slice) -> Tensor:
        return self._parts[rows.start]


@dataclass(frozen=True, eq=False)
class Group:
    """Matrices that share their launches.

    Attributes:
        plan: how they are iterated on.
        shapes: of the matrices.
        numbers: of the matrices among those of the whole list.
        slots: where numbers of the matrices stand in a table of all groups.
        entries: those of the list that the matrices belong to.
        dtypes, units, rows: of the matrices in each of the lists, and where their places are.
    """

    plan: Plan
    shapes: tuple[Shape, ...]
    numbers: tuple[int, ...]
    slots: slice
    entries: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    units: tuple[Units, ...]
    rows: tuple[slice, ...]

    def places(self, table: Table, which: int) -> Places:
        """The matrices of one of the lists."""
        return Places(table[self.rows[which]], self.dtypes[which], self.units[which])


class _Item(NamedTuple):
    """One matrix: its number, its entry's, how it is iterated on, offsets in its tensors."""

    number: int
    entry: int
    plan: Plan
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]


def groups_of(
    lists: Sequence[Sequence[Kind]],
    rule: Rule,
    restarts: Sequence[tuple[int, ...]],
    arch: str,
    rows: Rows,
) -> tuple[Group, ...]:
    """Groups of one plan, the same dtypes and workspaces of bounded size; rows are added.

    Entries of the lists belong together; those without elements have no matrices. The owners of
    rows are numbers of tensors if list stands behind list.
    """
    groups: dict[object, list[list[_Item]]] = {}
    filled: dict[object, int] = {}
    for item in _items_of(lists, rule, restarts, arch):
        m, n = lists[0][item.entry].shape[-2:]
        key = item.plan, item.dtypes
        if key not in groups or filled[key] + m * n > GROUP_ELEMENTS:
            groups.setdefault(key, []).append([])
            filled[key] = 0
        groups[key][-1].append(item)
        filled[key] += m * n
    found, slot = [], 0
    for items in (items for part in groups.values() for items in part):
        found.append(_group(items, slot, lists, rows))
        slot = padded(found[-1].slots.stop, ALIGNED_NUMBERS)
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def groups_of_one(
    kinds: tuple[Kind, ...], rule: Rule, restarts: tuple[int, ...], arch: str
) -> tuple[tuple[Group, ...], Rows]:
    """The same of lists with one entry each, and the rows."""
    rows = Rows()
    groups = groups_of([[kind] for kind in kinds], rule, [restarts], arch, rows)
    rows.close()
    return groups, rows


def _items_of(
    lists: Sequence[Sequence[Kind]], rule: Rule, restarts: Sequence[tuple[int, ...]], arch: str
) -> list[_Item]:
    items: list[_Item] = []
    for entry, kinds in enumerate(zip(*lists, strict=True)):
        m, n = kinds[0].shape[-2:]
        if 0 in kinds[0].shape:
            continue
        plan = plan_of(m, n, rule, restarts[entry], arch)
        dtypes = tuple(kind.dtype for kind in kinds)
        for offsets in zip(*(kind.offsets() for kind in kinds), strict=True):
            items.append(_Item(len(items), entry, plan, dtypes, offsets))
    return items


def _group(items: Sequence[_Item], slot: int, lists: Sequence[Sequence[Kind]], rows: Rows) -> Group:
    units, spans = [], []
    for which, kinds in enumerate(lists):
        places: list[Place] = []
        triples, owners = [], []
        for item in items:
            kind = kinds[item.entry]
            offset = item.offsets[which]
            (m, n), (row, col) = kind.shape[-2:], kind.strides[-2:]
            places.append(((kind.phase + offset) % 16, row, col, m, n))
            triples.append((offset, row, col))
            owners.append(which * len(kinds) + item.entry)
        units.append(units_of(tuple(places)))
        spans.append(rows.add(owners, triples))
    first = items[0]
    return Group(
        first.plan,
        tuple(lists[0][item.entry].shape[-2:] for item in items),  # type: ignore[misc]
        tuple(item.number for item in items),
        slice(slot, slot + len(items)),
        tuple(item.entry for item in items),
        first.dtypes,
        tuple(units),
        tuple(spans),
    )


@kept()
def layout_for(group: Group, device: torch.device) -> Layout:
    """Workspaces of a group."""
    config = group.plan.config
    return layout_of(group.shapes, (config.tile, max(config.tile, config.depth)), device)


@kept(256)
def table_of(rows: Rows, addresses: Addresses, device: torch.device) -> Table:
    """The table of some rows on the device."""
    return Table(rows, upload(rows.at(addresses), device))

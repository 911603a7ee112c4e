"""The lists of a step with factors but for the addresses of their tensors.

Matrices whose bases or roots stay what they are share launches, whatever their shapes: a group of
them is worked on in a few workspaces. Those that begin, are refreshed, or are given an option that
has no kernel are worked on in batches of one shape, see `Stack`. Which of the two a matrix takes is
its own affair, so that no neighbour changes its bits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from spectral_kernels._options import BasisLists, ShampooLists
from torch import Tensor

from ._addresses import Addresses
from ._config import FUSED_ELEMENTS, Config, architecture, config_for
from ._counters import Counters, Numbered, counters_of
from ._groups import Group, Kind, Plan, Row, Rows, table_of
from ._layout import ALIGNED_NUMBERS, Layout, kept, layout_of, padded
from ._list_step import Apart, Stack
from ._places import Place, Units, units_of

# Lists of a group: matrices, then squares over the shorter and over the longer side. Turns are
# bases or roots.
PARAMS, GRADS, MOMENTA, SQUARES, SHORT_FACTOR, LONG_FACTOR, SHORT_TURN, LONG_TURN = range(8)

# Workspaces of a group at a time.
_WORKSPACES = 4

# Of lists that are alike: of every subset that begins or is refreshed.
_MOST_PLANS = 64


class Columns(NamedTuple):
    """Where the lists of a step are among all.

    Attributes:
        matrices: parameters, gradients, first and second moments.
        lefts, rights: factors and turns.
    """

    matrices: tuple[int, int, int, int]
    lefts: tuple[int, int]
    rights: tuple[int, int]


@dataclass(frozen=True, eq=False)
class FactorGroup(Group):
    """Matrices that share their launches.

    Attributes:
        config: of products in float32.
        short, long: whether their shorter and longer sides have factors.
    """

    config: Config
    short: bool
    long: bool


@dataclass(frozen=True, eq=False)
class FactorListing:
    """What a step launches for.

    Attributes:
        groups: of the matrices that share launches whatever their shapes.
        stacks: of all others.
        counters: of all matrices.
        rows: of all places and counts; their owners are the tensors, list behind list.
    """

    groups: tuple[FactorGroup, ...]
    stacks: tuple[Stack, ...]
    counters: Counters
    rows: Rows

    def spread(self, values: Sequence[float]) -> tuple[float, ...]:
        """Numbers of entries for the matrix in every slot of the groups."""
        found = [0.0] * self.counters.size
        for group in self.groups:
            found[group.slots] = [float(values[entry]) for entry in group.entries]
        return tuple(found)


class _Item(NamedTuple):
    """One matrix: its number, its entry's, and offsets in its tensors, see the lists of a group."""

    number: int
    entry: int
    offsets: tuple[int, ...]


def listing_of(
    lists: BasisLists | ShampooLists,
    columns: Columns,
    apart: Sequence[Apart],
    stacks: Sequence[Stack],
    iterated: torch.dtype = torch.float32,
) -> FactorListing:
    """Groups, counters and rows.

    Args:
        lists, columns: of a step.
        apart: which matrices are not in groups.
        stacks: those matrices.
        iterated: what polynomials of matrices are computed in.
    """
    given = [[Kind.of(x) for x in tensors] for tensors in lists[:-2]]
    rows = Rows()
    firsts = [0]
    for kind in given[0]:
        firsts.append(firsts[-1] + math.prod(kind.shape[:-2]) * (0 not in kind.shape))
    arch = architecture(lists.params[0].device)

    def configs(shape: Sequence[int]) -> tuple[Config, Config]:
        return config_for(arch, torch.float32, min(shape)), config_for(arch, iterated, min(shape))

    groups = _groups(given, columns, apart, firsts, configs, rows)
    slot = groups[-1].slots.stop if groups else 0
    numbered: list[Group | Numbered] = [*groups]
    for stack in stacks:
        slot = padded(slot, ALIGNED_NUMBERS)
        entries = tuple(piece.entry for piece in stack.pieces for _ in range(*piece[1:3]))
        numbers = tuple(firsts[x.entry] + i for x in stack.pieces for i in range(*x[1:3]))
        stack.slots = slice(slot, slot + len(numbers))
        slot = stack.slots.stop
        numbered.append(Numbered(numbers, stack.slots, entries))
    before = lists._fields.index("step_counts")
    counters = counters_of(numbered, given[before], before * len(lists.params), rows)
    rows.close()
    return FactorListing(tuple(groups), tuple(stacks), counters, rows)


def _groups(
    given: Sequence[Sequence[Kind]],
    columns: Columns,
    apart: Sequence[Apart],
    firsts: Sequence[int],
    configs: Callable[[Sequence[int]], tuple[Config, Config]],
    rows: Rows,
) -> list[FactorGroup]:
    """Groups of the same configurations, dtypes, sides, and workspaces of bounded size."""
    found: dict[object, list[list[_Item]]] = {}
    filled: dict[object, int] = {}
    which = {entry: _columns(given, columns, entry) for entry in range(len(given[0]))}
    for entry, kind in enumerate(given[0]):
        if 0 in kind.shape or apart[entry] is True:
            continue
        m, n = kind.shape[-2:]
        both = configs((m, n))
        kinds = [None if i is None else given[i][entry] for i in which[entry]]
        key = both, *(None if x is None else x.dtype for x in kinds)
        tile = max(config.tile for config in both)
        size = _WORKSPACES * padded(m, tile) * padded(n, tile)
        for item in _items(entry, firsts[entry], kinds, apart[entry]):
            if filled.get(key, FUSED_ELEMENTS) + size > FUSED_ELEMENTS:
                found.setdefault(key, []).append([])
                filled[key] = 0
            found[key][-1].append(item)
            filled[key] += size
    groups: list[FactorGroup] = []
    for items in (items for part in found.values() for items in part):
        slot = padded(groups[-1].slots.stop, ALIGNED_NUMBERS) if groups else 0
        shape = given[0][items[0].entry].shape[-2:]
        groups.append(_group(items, slot, given, which, configs(shape), rows))
    return groups


def _columns(
    given: Sequence[Sequence[Kind]], columns: Columns, entry: int
) -> tuple[int | None, ...]:
    """Which of the given lists are those of a group; None where an entry has nothing there."""
    m, n = given[0][entry].shape[-2:]
    short, long = (columns.rights, columns.lefts) if m > n else (columns.lefts, columns.rights)
    order = *columns.matrices, short[0], long[0], short[1], long[1]
    return tuple(None if 0 in given[i][entry].shape else i for i in order)


def _items(entry: int, first: int, kinds: Sequence[Kind | None], apart: Apart) -> Iterator[_Item]:
    count = len(next(x for x in kinds if x is not None).offsets())
    each = [[0] * count if kind is None else kind.offsets() for kind in kinds]
    for i, offsets in enumerate(zip(*each, strict=True)):
        if apart is False or not apart[i]:  # type: ignore[index]
            yield _Item(first + i, entry, offsets)


def _group(
    items: Sequence[_Item],
    slot: int,
    given: Sequence[Sequence[Kind]],
    which: dict[int, tuple[int | None, ...]],
    configs: tuple[Config, Config],
    rows: Rows,
) -> FactorGroup:
    units: list[Units] = []
    spans: list[slice] = []
    dtypes: list[torch.dtype] = []
    present: list[bool] = []
    for k in range(len(which[items[0].entry])):
        places: list[Place] = []
        triples: list[Row] = []
        owners: list[int] = []
        for item in items:
            i = which[item.entry][k]
            if i is None:
                continue
            kind, offset = given[i][item.entry], item.offsets[k]
            (m, n), (row, col) = kind.shape[-2:], kind.strides[-2:]
            places.append(((kind.phase + offset) % 16, row, col, m, n))
            triples.append((offset, row, col))
            owners.append(i * len(given[i]) + item.entry)
            dtype = kind.dtype
        present.append(bool(places))
        units.append(units_of(tuple(places)))
        spans.append(rows.add(owners, triples) if places else slice(0, 0))
        dtypes.append(dtype if places else torch.float32)
    shapes = tuple(given[0][item.entry].shape[-2:] for item in items)
    return FactorGroup(
        Plan("standard", configs[1], ()),
        shapes,  # type: ignore[arg-type]
        tuple(item.number for item in items),
        slice(slot, slot + len(items)),
        tuple(item.entry for item in items),
        tuple(dtypes),
        tuple(units),
        tuple(spans),
        config=configs[0],
        short=present[SHORT_FACTOR],
        long=present[LONG_FACTOR],
    )


@kept()
def factor_layout(group: FactorGroup, device: torch.device) -> Layout:
    """Workspaces of a group, for its products of either kind."""
    both = group.config, group.plan.config
    tile = max(config.tile for config in both)
    return layout_of(group.shapes, (tile, max(tile, *(config.depth for config in both))), device)


class Plans:
    """Listings of lists that are alike, by what else decides.

    Attributes:
        begun: bases that were seen not to be zeros.
    """

    def __init__(self) -> None:
        self._known: dict[object, FactorListing] = {}
        self.begun = Same()

    def of(self, key: Hashable, make: Callable[[], FactorListing]) -> FactorListing:
        """The listing of this key."""
        found = self._known.get(key)
        if found is None:
            if len(self._known) == _MOST_PLANS:
                self._known.clear()
            found = self._known[key] = make()
        return found


class Same:
    """Tensors that are seen again, none of which is kept."""

    def __init__(self) -> None:
        self._ids: tuple[int, ...] = ()
        self._references: list[weakref.ref[Tensor]] = []

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are those of `set`."""
        return self._ids == tuple(map(id, tensors)) and bool(tensors)

    def set(self, tensors: Sequence[Tensor]) -> None:
        """These, while all of them live."""
        self._references = [weakref.ref(x, self._forget) for x in tensors]
        self._ids = tuple(map(id, tensors))

    def _forget(self, _: object) -> None:
        self._ids = ()


class Working:
    """A step on its way: its table of places, and the states of its matrices."""

    def __init__(self, listing: FactorListing, addresses: Addresses, device: torch.device) -> None:
        self.listing = listing
        self.table = table_of(listing.rows, addresses, device)
        self.states = torch.empty(listing.counters.size, dtype=torch.int32, device=device)

    def steps(self) -> Tensor:
        """int64, how many steps the matrix in every slot has taken."""
        return self.listing.counters.steps(self.table, self.states.device)

    def count(self, skipped: Tensor) -> None:
        """Counts the steps of what was updated, and what was skipped."""
        self.listing.counters.advance_(self.table, self.states, skipped, propagate=False)

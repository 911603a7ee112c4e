"""Lists of a step that are like those of the step before: what was found for them then.

A training takes the same step thousands of times, and walks over its lists would take longer than
the card does. So what shapes, strides, dtypes, devices and options say is found once, checks of the
arguments among it, and looked up by these values. Nothing that is kept refers to a tensor.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from spectral_kernels._options import BasisLists, MuonLists, ShampooLists
from spectral_kernels._step_checks import check_rate
from torch import Tensor

from ._addresses import Addresses

Lists = TypeVar("Lists", MuonLists, ShampooLists, BasisLists)
Given = TypeVar("Given", bound=Any)
Found = TypeVar("Found")

# Of lists, and of addresses of one.
_MOST_LISTS = 64
_MOST_ADDRESSES = 64

_PLAIN = frozenset((Tensor, torch.nn.Parameter))

_shape, _dtype, _device = map(attrgetter, ("shape", "dtype", "device"))


class Like(NamedTuple):
    """What is known of lists.

    Attributes:
        lengths: how many tensors each has.
        shapes, strides, dtypes, devices: of all tensors, list behind list, `skipped` last.
        phases: their addresses modulo 16; nothing where all of them are 0.
    """

    lengths: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    phases: tuple[int, ...]


def _described(
    lists: MuonLists | ShampooLists | BasisLists,
) -> tuple[Like | None, Addresses]:
    """What the lists are like, None where that is not all there is to them, and addresses."""
    *given, skipped, _ = lists
    flat = [*itertools.chain.from_iterable(given), skipped]
    nothing = None, Addresses(())
    if not _PLAIN.issuperset(map(type, flat)):
        return nothing
    try:
        strides = tuple(map(Tensor.stride, flat))
    except RuntimeError:  # of a tensor that is not dense
        return nothing
    addresses = Addresses.of(flat)
    phases = addresses.tensor.bitwise_and(15)
    like = Like(
        tuple(map(len, given)),
        tuple(map(_shape, flat)),
        strides,
        tuple(map(_dtype, flat)),
        tuple(map(_device, flat)),
        tuple(phases.tolist()) if bool(phases.any()) else (),
    )
    return like, addresses


class _Entry(Generic[Found]):
    """What was found for lists, and addresses at which their tensors do not overlap."""

    def __init__(self, found: Found, like: Like) -> None:
        self.found = found
        # One counter may serve several entries.
        count = sum(like.lengths[:-1])
        shapes, strides = like.shapes[:count], like.strides[:count]
        filled = [i for i, shape in enumerate(shapes) if 0 not in shape]
        extents = [_extent(shapes[i], strides[i]) * like.dtypes[i].itemsize for i in filled]
        self._filled, self._extents = (
            torch.tensor(numbers, dtype=torch.int64, device="cpu") for numbers in (filled, extents)
        )
        self._apart: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def are_apart(self, addresses: Addresses) -> bool:
        """Whether the tensors do not overlap; False where that needs a closer look."""
        if addresses in self._apart:
            return True
        begin, order = addresses.tensor.index_select(0, self._filled).sort()
        end = begin + self._extents.index_select(0, order)
        if bool((begin[1:] < end[:-1]).any()):
            return False
        self._apart[addresses] = None
        if len(self._apart) > _MOST_ADDRESSES:
            self._apart.popitem(last=False)
        return True


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


class KnownLists(Generic[Lists, Given, Found]):
    """What is found for the lists and options of a step.

    Args:
        check: of the lists and options, whatever they are.
        find: what is looked up. It may depend on what the tensors are but for their addresses, and
            on the key.
    """

    def __init__(
        self, check: Callable[[Lists, Given], None], find: Callable[[Lists, Given], Found]
    ) -> None:
        self._check: Callable[[Lists, Given], None] = check
        self._find: Callable[[Lists, Given], Found] = find
        self._known: OrderedDict[object, _Entry[Found]] = OrderedDict()
        # What was looked up last: comparing is faster than hashing.
        self._last: tuple[object, _Entry[Found]] | None = None

    def of(self, lists: Lists, options: Given, key: object) -> tuple[Found, Addresses]:
        """What was found, and the addresses of all tensors.

        Args:
            lists, options: of the step; they are checked.
            key: all of the options that what is found depends on, and that decides which tensors
                are right.
        """
        like, addresses = _described(lists)
        if like is None:
            self._check(lists, options)
            addresses = Addresses.of(x for tensors in lists[:-2] for x in tensors)
            return self._find(lists, options), addresses
        whole = like, key
        last = self._last
        entry = last[1] if last is not None and last[0] == whole else self._known.get(whole)
        if entry is None:
            self._check(lists, options)
            entry = _Entry(self._find(lists, options), like)
            self._known[whole] = entry
            if len(self._known) > _MOST_LISTS:
                self._known.popitem(last=False)
        elif options.nonfinite == "raise" or not entry.are_apart(addresses):
            self._check(lists, options)
        else:
            check_rate(lists.lr, lists.params)
            options.check(len(lists.params))
        self._last = whole, entry
        return entry.found, addresses

    def cache_clear(self) -> None:
        """Forgets everything."""
        self._last = None
        self._known.clear()

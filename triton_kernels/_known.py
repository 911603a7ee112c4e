"""Lists of a step that are like those of the step before: what was found for them then.

A training takes the same step thousands of times, and walks over its lists would take longer than
the card does. So what shapes, strides, dtypes, devices and options say is found once, checks of the
arguments among it, and looked up by these values. Nothing that is kept refers to a tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from spectral_kernels._options import BasisLists, MuonLists, ShampooLists
from spectral_kernels._step_checks import check_rate
from torch import Tensor

Lists = TypeVar("Lists", MuonLists, ShampooLists, BasisLists)
Given = TypeVar("Given", bound=Any)
Found = TypeVar("Found")

# Of lists, and of addresses of one.
_MOST_LISTS = 64
_MOST_ADDRESSES = 64

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Like(NamedTuple):
    """What is known of lists.

    Attributes:
        lengths: how many tensors each has.
        shapes, strides, dtypes, devices: of all tensors, list behind list, `skipped` last.
        phases: their addresses modulo 16.
    """

    lengths: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    phases: tuple[int, ...]


def _described(
    lists: MuonLists | ShampooLists | BasisLists,
) -> tuple[Like | None, tuple[int, ...]]:
    """What the lists are like, None where that is not all there is to them, and addresses."""
    *given, skipped, _ = lists
    flat = [x for tensors in given for x in tensors]
    flat.append(skipped)
    if not _PLAIN.issuperset(map(type, flat)) or {x.layout for x in flat} != {torch.strided}:
        return None, ()
    addresses = tuple([x.data_ptr() for x in flat])
    like = Like(
        tuple(map(len, given)),
        tuple([x.shape for x in flat]),
        tuple([x.stride() for x in flat]),
        tuple([x.dtype for x in flat]),
        tuple([x.device for x in flat]),
        tuple([address & 15 for address in addresses]),
    )
    return like, addresses


class _Entry(Generic[Found]):
    """What was found for lists, and addresses at which their tensors do not overlap."""

    def __init__(self, found: Found, like: Like) -> None:
        self.found = found
        # One counter may serve several entries.
        count = sum(like.lengths[:-1])
        shapes, strides = like.shapes[:count], like.strides[:count]
        self._filled = [i for i, shape in enumerate(shapes) if 0 not in shape]
        self._extents = torch.tensor(
            [_extent(shapes[i], strides[i]) * like.dtypes[i].itemsize for i in self._filled],
            dtype=torch.int64,
            device="cpu",
        )
        self._apart: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def are_apart(self, addresses: tuple[int, ...]) -> bool:
        """Whether the tensors do not overlap; False where that needs a closer look."""
        if addresses in self._apart:
            return True
        filled = [addresses[i] for i in self._filled]
        begin, order = torch.tensor(filled, dtype=torch.int64, device="cpu").sort()
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

    def of(self, lists: Lists, options: Given, key: object) -> tuple[Found, tuple[int, ...]]:
        """What was found, and the addresses of all tensors.

        Args:
            lists, options: of the step; they are checked.
            key: all of the options that what is found depends on, and that decides which tensors
                are right.
        """
        like, addresses = _described(lists)
        if like is None:
            self._check(lists, options)
            addresses = tuple([x.data_ptr() for tensors in lists[:-2] for x in tensors])
            return self._find(lists, options), addresses
        entry = self._known.get((like, key))
        if entry is None:
            self._check(lists, options)
            entry = _Entry(self._find(lists, options), like)
            self._known[like, key] = entry
            if len(self._known) > _MOST_LISTS:
                self._known.popitem(last=False)
        elif options.nonfinite == "raise" or not entry.are_apart(addresses):
            self._check(lists, options)
        else:
            check_rate(lists.lr, lists.params)
            options.check(len(lists.params))
        return entry.found, addresses

    def cache_clear(self) -> None:
        """Forgets everything."""
        self._known.clear()

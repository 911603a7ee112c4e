"""Ways along one dimension of a mesh after another, so that a rank talks to few others.

To the owner a part goes along the last dimension first, which is the one within a machine where a
mesh was made for it, and then along the others; back it goes along the first one first. Of parts
that several ranks hold, one goes to each line of them, and is copied there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exchange import Channel
from .layout import Region
from .routes import Item, Route

Place = tuple[int, ...]
# An item, and a region of it.
Parcel = tuple[int, Region]


@dataclass(frozen=True)
class Line:
    """The ranks of a mesh that differ from this one in one dimension.

    Attributes:
        dim: that.
        channel: their group.
        ranks: of every coordinate in this dimension the rank in the group.
    """

    dim: int
    channel: Channel
    ranks: tuple[int, ...]


@dataclass(eq=False)
class Hop:
    """What goes along one line.

    Attributes:
        line: that.
        sends, comes: for every rank of the line what goes to it, and what comes from it.
    """

    line: Line
    sends: list[list[Parcel]]
    comes: list[list[Parcel]]

    @classmethod
    def of(cls, line: Line, here: Place, ways: Iterable[tuple[Parcel, Place, Place]]) -> Hop:
        """Of parcels and the places that they come from and go to, in an order all ranks know."""
        hop = cls(line, [[] for _ in line.ranks], [[] for _ in line.ranks])
        for parcel, start, end in ways:
            if start == here:
                hop.sends[line.ranks[end[line.dim]]].append(parcel)
            if end == here:
                hop.comes[line.ranks[start[line.dim]]].append(parcel)
        return hop


class Relay:
    """Parcels on their way along one line after another.

    Args:
        hops: those.
        held: what of every parcel is here now, flat tensors.
        copies: how many of each.
        dtype: theirs.
    """

    def __init__(
        self,
        hops: Sequence[Hop],
        held: dict[Parcel, list[Tensor]],
        copies: int,
        dtype: torch.dtype,
    ) -> None:
        self._hops = list(hops)
        self._held = held
        self._copies = copies
        self.dtype = dtype
        self._flight: Any = None
        self._start()

    def _start(self) -> None:
        hop = self._hops[0]
        send = [[x for parcel in each for x in self._held[parcel]] for each in hop.sends]
        into = [
            [region.numel for _, region in each for _ in range(self._copies)] for each in hop.comes
        ]
        self._flight = hop.line.channel.exchange(send, into, self.dtype)
        self._held = {}

    def _arrive(self) -> None:
        hop = self._hops.pop(0)
        for parcels, received in zip(hop.comes, self._flight.wait(), strict=True):
            parts = iter(received)
            for parcel in parcels:
                self._held[parcel] = [next(parts) for _ in range(self._copies)]

    def onward(self) -> None:
        """Starts the next hop, where there is one, when the one that is on its way has ended."""
        if len(self._hops) > 1:
            self._arrive()
            self._start()

    def wait(self) -> dict[Parcel, list[Tensor]]:
        """What has arrived, when the last hop has ended."""
        while len(self._hops) > 1:
            self.onward()
        self._arrive()
        return self._held


class Hops(Route):
    """A route along one dimension of a mesh after another.

    Args:
        items, rank: as of a route.
        lines: of the dimensions that have more than one rank, in their order.
    """

    def __init__(self, items: Sequence[Item], rank: int, lines: Sequence[Line]) -> None:
        super().__init__(items, rank)
        self._device = lines[0].channel.device
        self._dims = [line.dim for line in lines]
        self._here = tuple(items[0].coordinates[rank])
        to_owners: list[list[tuple[Parcel, Place, Place]]] = [[] for _ in lines]
        from_owners: list[list[tuple[Parcel, Place, Place]]] = [[] for _ in lines]
        for at, item in enumerate(items):
            for which, region, start, end in self._there(item):
                to_owners[which].append(((at, region), start, end))
            for which, region, start, end in self._back(item):
                from_owners[which].append(((at, region), start, end))
        self._to_owners = [
            Hop.of(line, self._here, ways)
            for line, ways in zip(reversed(lines), to_owners, strict=True)
        ]
        self._from_owners = [
            Hop.of(line, self._here, ways) for line, ways in zip(lines, from_owners, strict=True)
        ]

    def _there(self, item: Item) -> Iterator[tuple[int, Region, Place, Place]]:
        """The hops of an item's parts to its owner: which, of what, from where, to where."""
        owner = item.coordinates[item.owner]
        for sender in sorted(item.senders):
            place, region = tuple(item.coordinates[sender]), item.regions[sender]
            for which, dim in enumerate(reversed(self._dims)):
                end = (*place[:dim], owner[dim], *place[dim + 1 :])
                yield which, region, place, end
                place = end

    def _back(self, item: Item) -> Iterator[tuple[int, Region, Place, Place]]:
        """The hops of its parts from its owner to all that hold them."""
        owner = tuple(item.coordinates[item.owner])
        # Dictionaries keep the order, which sets do not.
        wanted = {
            (region, tuple(place)): None
            for region, place in zip(item.regions, item.coordinates, strict=True)
            if region.numel
        }
        for which, dim in enumerate(self._dims):
            ends = {
                (region, (*place[: dim + 1], *owner[dim + 1 :])): None for region, place in wanted
            }
            for region, end in ends:
                yield which, region, (*end[:dim], owner[dim], *end[dim + 1 :]), end

    def moved(self, at: int, copies: int) -> int:
        item = self.items[at]
        there = sum(region.numel for _, region, *ends in self._there(item) if ends[0] != ends[1])
        back = sum(region.numel for _, region, *ends in self._back(item) if ends[0] != ends[1])
        return copies * there + back

    def gather(
        self,
        channel: Channel,
        pieces: Sequence[Sequence[Tensor]],
        whole: Sequence[Sequence[Tensor] | None],
        dtype: torch.dtype,
        copies: int = 1,
    ) -> Relay:
        held = {
            (at, item.regions[self.rank]): [piece.reshape(-1) for piece in pieces[at]]
            for at, item in enumerate(self.items)
            if self.rank in item.senders
        }
        return Relay(self._to_owners, held, copies, dtype)

    def gathered(self, flight: Relay, whole: Sequence[Sequence[Tensor] | None]) -> None:
        for (at, region), received in flight.wait().items():
            for target, piece in zip(whole[at] or (), received, strict=True):
                region.fill(target, piece)

    def scatter(
        self, channel: Channel, whole: Sequence[Tensor | None], dtype: torch.dtype
    ) -> Relay:
        held = {
            (at, region): [region.cut(tensor).reshape(-1)]
            for at in self.owned
            if (tensor := whole[at]) is not None
            for region in dict.fromkeys(self.items[at].regions)
            if region.numel
        }
        return Relay(self._from_owners, held, 1, dtype)

    def scattered(self, flight: Relay) -> list[Tensor]:
        arrived = flight.wait()
        nothing = torch.empty(0, dtype=flight.dtype, device=self._device)
        parts = []
        for at, item in enumerate(self.items):
            found = arrived.get((at, item.regions[self.rank]))
            parts.append(nothing if found is None else found[0])
        return parts

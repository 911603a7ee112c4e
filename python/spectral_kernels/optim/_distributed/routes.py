"""The ways of tensors to their owners and back, and what is packed in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .exchange import Channel
from .layout import Region
from .transport import Flight, Place


@dataclass(eq=False)
class Item:
    """A tensor that is whole at its owner and lies in regions on the ranks of a group.

    Attributes:
        owner: the rank that has it whole.
        regions: of every rank.
        coordinates: of every rank in its mesh, by which the nearest of several holders is found.
    """

    owner: int
    regions: Sequence[Region]
    coordinates: Sequence[tuple[int, ...]]

    @cached_property
    def senders(self) -> set[int]:
        """The ranks that send their part to the owner: of several that hold the same, the nearest.

        That is the owner itself, or the one whose place in the mesh has most in common with its.
        """
        holders: dict[Region, list[int]] = {}
        for rank, region in enumerate(self.regions):
            if region.numel:
                holders.setdefault(region, []).append(rank)
        return {min(ranks, key=self._distance) for ranks in holders.values()}

    def _distance(self, rank: int) -> tuple[int, int]:
        mine, own = self.coordinates[rank], self.coordinates[self.owner]
        return sum(a != b for a, b in zip(mine, own, strict=True)), rank


@dataclass(eq=False)
class Route:
    """Items that travel together, and the order in which their parts are packed.

    Attributes:
        items: those; all ranks have them in the same order.
        rank: this process's.
        owned: places of the items that this process owns.
        sends: for every owner the places of the items whose part this process sends.
        comes: for every rank the places of those whose part it sends here.
        held: for every owner how many elements of each of its items this process has.
    """

    items: Sequence[Item]
    rank: int
    owned: list[int] = field(init=False)
    sends: list[list[int]] = field(init=False)
    comes: list[list[int]] = field(init=False)
    held: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        ranks = len(self.items[0].regions)
        self.owned = [at for at, item in enumerate(self.items) if item.owner == self.rank]
        self.sends = [[] for _ in range(ranks)]
        self.comes = [[] for _ in range(ranks)]
        self.held = [[] for _ in range(ranks)]
        for at, item in enumerate(self.items):
            if self.rank in item.senders:
                self.sends[item.owner].append(at)
            if item.owner == self.rank:
                for rank in item.senders:
                    self.comes[rank].append(at)
            self.held[item.owner].append(item.regions[self.rank].numel)

    def moved(self, at: int, copies: int) -> int:
        """Elements of an item that go to its owner, so many tensors of them, and back."""
        item = self.items[at]
        away = sum(x.numel for rank, x in enumerate(item.regions) if rank != item.owner)
        sent = sum(item.regions[rank].numel for rank in item.senders if rank != item.owner)
        return away + copies * sent

    def gather(
        self,
        channel: Channel,
        pieces: Sequence[Sequence[Tensor]],
        whole: Sequence[Sequence[Tensor] | None],
        dtype: torch.dtype,
        copies: int = 1,
    ) -> Any:
        """Starts to send the parts of this rank to the owners.

        Args:
            channel: what they travel over.
            pieces: of every item the tensors that travel; they are not changed until they have.
            whole: of the items owned here the tensors that the parts are of; some are written at
                once.
            dtype: of what travels.
            copies: how many of each.
        """
        send = [[piece.reshape(-1) for at in own for piece in pieces[at]] for own in self.sends]
        into = [
            [
                _place(self.items[at].regions[rank], target, dtype)
                for at in items
                for target in whole[at] or ()
            ]
            for rank, items in enumerate(self.comes)
        ]
        return channel.exchange(send, into, dtype)

    def gathered(self, flight: Any, whole: Sequence[Sequence[Tensor] | None]) -> None:
        """Waits until the whole tensors of the items owned here, as in `gather`, are complete."""
        for rank, received in enumerate(flight.wait()):
            parts = iter(received)
            for at in self.comes[rank]:
                for target in whole[at] or ():
                    part = next(parts)
                    if part is not None:
                        self.items[at].regions[rank].fill(target, part)

    def scatter(self, channel: Channel, whole: Sequence[Tensor | None], dtype: torch.dtype) -> Any:
        """Starts to send the whole tensors of the items owned here to all that hold a part."""
        send = [
            [
                self.items[at].regions[rank].cut(tensor).reshape(-1)
                for at in self.owned
                if (tensor := whole[at]) is not None
            ]
            for rank in range(channel.size)
        ]
        return channel.exchange(send, self.held, dtype)

    def scattered(self, flight: Any) -> list[Tensor]:
        """Waits, and returns this rank's flat part of every item; empty where it has none.

        What it owns itself may be a view of the whole tensor.
        """
        come = [iter(each) for each in flight.wait()]
        return [next(come[item.owner]) for item in self.items]

    def spread_out(
        self, channel: Channel, whole: Sequence[Tensor | None], dtype: torch.dtype
    ) -> Flight:
        """`scatter` where every rank holds all of every item: what is sent is sent once."""
        send = [tensor.reshape(-1) for at in self.owned if (tensor := whole[at]) is not None]
        return channel.everyone(send, self.held, dtype)


def _place(region: Region, whole: Tensor, dtype: torch.dtype) -> Place:
    """Where a part of a whole tensor is received: in its place, if it can be."""
    flat = region.flat(whole) if whole.dtype == dtype else None
    return region.numel if flat is None else flat

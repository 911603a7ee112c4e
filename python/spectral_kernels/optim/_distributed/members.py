"""Parameters that ranks share, and what travels together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from .exchange import Channel
from .hops import Hops, Line
from .layout import Grid, Region
from .owners import Load
from .routes import Item, Route
from .table import Row


@dataclass(eq=False)
class Member:
    """A parameter that ranks share.

    Attributes:
        key: the parameter, as its group has it.
        index, position, name: its place and name.
        is_matrix: whether it takes the matrix rule.
        placements: how it lies on the exchange's mesh.
        regions: what every rank of the group holds of it.
        item, whole: of one that is stepped by an owner, what travels, and on the owner the whole
            weights and gradient.
        checksum: of this rank's part of the weights as the last step has written it, where the
            owner keeps a copy of them; else None.
        row: what becomes of it.
    """

    key: Tensor
    index: int
    position: int
    name: str
    is_matrix: bool
    placements: tuple[Placement, ...]
    regions: list[Region]
    item: Item | None = None
    whole: list[Tensor] | None = None
    checksum: int | None = None
    row: Row | None = None

    @property
    def label(self) -> str:
        """What tells it from all others, on all ranks."""
        return f"{self.name} {self.index} {self.position}"

    @property
    def on_all(self) -> bool:
        """Whether every rank holds all of it."""
        return all(isinstance(placement, Replicate) for placement in self.placements)


class Elsewhere(dict[str, Any]):
    """The state of a parameter that another rank owns: nothing, but iterating gives its names.

    Checkpointing code such as torchtitan's asks a state for its names, and takes what a state dict
    has by them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = tuple(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)


@dataclass(eq=False)
class Bucket:
    """Matrices that travel together.

    Attributes:
        members: those, dearest first.
        route: how.
        dtype: theirs.
        on_all: whether every rank holds all of each, so that owners have what they need.
        wire: the dtype of what travels, which is updates where it is not None.
        keeps: whether owners keep the weights between steps.
        copies: tensors of each that travel to the owner in this step: nothing that ranks have
            already, or the gradient, or weights and gradient.
        lasts: what an owner sends to itself comes as a copy, or no bucket after this one in a step
            has its whole matrices in the same place.
    """

    members: list[Member]
    route: Route
    dtype: torch.dtype
    on_all: bool
    wire: torch.dtype | None
    keeps: bool
    copies: int = 2
    lasts: bool = True

    @property
    def usual_copies(self) -> int:
        """`copies` where nobody but the optimizer has changed weights."""
        if self.on_all:
            return 0
        return 1 if self.keeps or self.wire is not None else 2

    @property
    def sent_dtype(self) -> torch.dtype:
        """The dtype of what travels."""
        return self.wire or self.dtype

    @property
    def room(self) -> int:
        """Whole tensors in memory that buckets share: weights or updates, unless they are kept,
        and gradients where they come."""
        return 1 if self.on_all or self.keeps else 2


@dataclass(eq=False)
class Exchange:
    """What is shared over one mesh, or one process group.

    Attributes:
        mesh: that, of one dimension where a group was given.
        channel: its process group.
        grid: the group's ranks in the mesh.
        members: all of its parameters.
        buckets: those that an owner steps.
        lines: of the mesh, where what travels goes along one after another.
        loads: of every rank, of what it owns.
        rooms: by dtype the memory of the whole matrices of buckets that are in work, in turns.
        linked: some of its ranks share other parameters over other meshes.
    """

    mesh: DeviceMesh
    channel: Channel
    grid: Grid
    members: list[Member] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    rooms: dict[torch.dtype, list[Tensor]] = field(default_factory=dict)
    linked: bool = False

    def route(self, items: Sequence[Item]) -> Route:
        """The way of some items to their owners and back."""
        rank = self.channel.rank
        return Hops(items, rank, self.lines) if self.lines else Route(items, rank)


def plain(key: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    if not isinstance(key, DTensor):
        return key
    with torch.no_grad():
        return key.to_local()

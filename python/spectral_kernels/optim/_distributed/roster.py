"""Which parameters ranks share, and who owns them."""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from . import owners
from .agreement import Agreement
from .config import Distributed
from .exchange import Channel, timeout_of
from .hops import Line
from .layout import Grid, check_regions, only_batches
from .members import Bucket, Elsewhere, Exchange, Member, plain
from .routes import Item, Route
from .table import Row, Table

if TYPE_CHECKING:
    from .._base import MatrixOptimizer


# More than these get what travels along one dimension of their mesh after another: every target of
# an exchange is a connection, and takes a message of its own.
_MOST_TARGETS = 64


# By the process group of all ranks, which ends them with itself, those of meshes that are only a
# part of it: a group has threads and connections until then, and every optimizer of a mesh asks for
# the same one.
_groups: weakref.WeakKeyDictionary[Any, dict[tuple[float, ...], Any]] = weakref.WeakKeyDictionary()


class Roster(Agreement):
    """An optimizer's parameters on the ranks that share them.

    Attributes:
        members: by parameter.
    """

    def __init__(self, optimizer: MatrixOptimizer, how: Distributed) -> None:
        super().__init__(optimizer, how)
        self.members: dict[Tensor, Member] = {}
        self._groups = 0

    def extend(self) -> None:
        """Takes in the groups that were added last. All ranks call it.

        Raises:
            TypeError, ValueError: parameters that cannot be shared, or that are not the same on all
                ranks; nothing is taken in then.
        """
        before = self._groups, dict(self.members), list(self.exchanges)
        kept = [
            (list(each.members), list(each.buckets), [load.copy() for load in each.loads])
            for each in before[2]
        ]
        try:
            self._extend()
        except BaseException:
            self._groups, self.members, self.exchanges = before
            for exchange, (members, buckets, loads) in zip(before[2], kept, strict=True):
                exchange.members, exchange.buckets, exchange.loads = members, buckets, loads
            self._furnish()
            raise
        self.name_state()
        self.optimizer.init_state()

    def name_state(self) -> None:
        """Makes entries of state, also where another rank has the state itself.

        torch makes state, by a step, of an optimizer that has none, and would do so on this rank
        alone.
        """
        for key, member in self.members.items():
            if self.here(key) is None and not self.optimizer.state[key]:
                group = self.optimizer.param_groups[member.index]
                _, layout = self.optimizer._slots(key, group, is_matrix=member.is_matrix)
                self.optimizer.state[key] = Elsewhere(layout)
            else:
                self.optimizer.state[key]

    def _extend(self) -> None:
        error: BaseException | None = None
        new: list[Member] = []
        try:
            new = self._new_members()
        except (TypeError, ValueError) as found:
            error = found
        if not self.exchanges:
            if error is not None:
                raise error
            return
        for exchange in self.exchanges:
            exchange.channel.open("the constructor, or add_param_group(),")
        for exchange in self.exchanges:
            several = [int(len(self.exchanges) > 1)]
            [exchange.linked] = map(bool, exchange.channel.most(several, "say what they share"))
        self.tell(error)
        mine = [
            [member for member in new if member in exchange.members] for exchange in self.exchanges
        ]
        for exchange, members in zip(self.exchanges, mine, strict=True):
            try:
                self.compare(exchange, members)
            except ValueError as found:
                error = error or found
        self.tell(error)
        for exchange, members in zip(self.exchanges, mine, strict=True):
            self._assign(exchange, [member for member in members if member.is_matrix])
        self._groups = len(self.optimizer.param_groups)
        self._copies_compared = False
        self._furnish()

    def _new_members(self) -> list[Member]:
        found = []
        for index, group in enumerate(self.optimizer.param_groups):
            if index < self._groups:
                continue
            routes = self.optimizer._routes_of(index, group)
            for position, (key, is_matrix) in enumerate(zip(group["params"], routes, strict=True)):
                name = self.optimizer._name(index, position)
                if isinstance(key, DTensor) and self.how.group is not None:
                    raise ValueError(
                        f"{name} is a DTensor, which has a mesh of its own: distributed is for "
                        "plain parameters"
                    )
                exchange = self._exchange_of(key)
                if exchange is None:
                    continue
                if is_matrix:
                    self.check_wire(name, group)
                placements = tuple(key.placements) if isinstance(key, DTensor) else (Replicate(),)
                regions = exchange.grid.regions(key.shape, placements)
                member = Member(key, index, position, name, is_matrix, placements, regions)
                if isinstance(key, DTensor):
                    check_regions(name, key, regions[exchange.channel.rank])
                self.members[key] = member
                exchange.members.append(member)
                found.append(member)
        return found

    def check_wire(self, name: str, group: Mapping[str, Any]) -> None:
        """That a matrix can be stepped by updates alone, where they travel in place of weights.

        Raises:
            ValueError: it cannot.
        """
        if self.how.wire is not None and group.get("hyperball"):
            raise ValueError(
                f"{name} has hyperball=True, whose step needs the weights, and with "
                f"wire={self.how.wire} only updates travel: give it a group without one of the two"
            )

    def _exchange_of(self, key: Tensor) -> Exchange | None:
        """The one of a parameter, made if it is the first of its kind."""
        group = self.how.group
        mesh: DeviceMesh | None
        if isinstance(key, DTensor):
            mesh, device = key.device_mesh, plain(key).device
        elif group is None:
            return None
        else:
            device = key.device
            mesh = group if isinstance(group, DeviceMesh) else None
        for exchange in self.exchanges:
            if exchange.channel.device == device and (mesh is None or exchange.mesh == mesh):
                return exchange
        if mesh is None:
            mesh = DeviceMesh.from_group(group, device.type)
        channel = Channel(_group_of(mesh), device, self.how.patience)
        exchange = Exchange(mesh, channel, Grid.of(mesh, channel.members))
        exchange.loads = [owners.Load() for _ in range(channel.size)]
        many = self.how.hops == "auto" and channel.size > _MOST_TARGETS
        if mesh.ndim > 1 and (many or self.how.hops == "each"):
            exchange.lines = _lines_of(mesh, device, self.how.patience)
        self.exchanges.append(exchange)
        return exchange

    def _assign(self, exchange: Exchange, matrices: Sequence[Member]) -> None:
        """Owners and buckets of new matrices."""
        costs: dict[str, owners.Cost] = {}
        by_name: dict[str, Member] = {}
        # Between unequal machines those of the first rank count.
        own = owners.rates_of(exchange.channel.device)
        rates = exchange.channel.objects(own, "choose owners")[0]
        for member in matrices:
            group = self.optimizer.param_groups[member.index]
            form = self.optimizer._form(member.key, group)
            if only_batches(form, member.key.shape, member.regions):
                member.row = Row(member.name, tuple(member.key.shape), "matrix, whole where it is")
                continue
            offset = None
            if self.optimizer._staggered(group):
                offset = self.optimizer._offsets_of(member.index, group)[member.position]
            costs[member.label] = owners.cost(
                self.optimizer._operator, form, group, member.key.dtype, offset, rates
            )
            by_name[member.label] = member
        who = owners.assign(costs, exchange.loads)
        kinds: dict[tuple[torch.dtype, bool], list[tuple[Member, int]]] = {}
        for label in owners.in_order(costs):
            member, size = by_name[label], costs[label].bytes
            member.item = Item(who[label], member.regions, exchange.grid.coordinates)
            kinds.setdefault((member.key.dtype, member.on_all), []).append((member, size))
        for (dtype, on_all), entries in kinds.items():
            for members in owners.buckets(entries, self.how.bucket_bytes, exchange.channel.size):
                items = [member.item for member in members if member.item is not None]
                keeps = self.how.keep_weights and not on_all
                route = Route(items, exchange.channel.rank) if on_all else exchange.route(items)
                bucket = Bucket(members, route, dtype, on_all, self.how.wire, keeps)
                for member in members:
                    self._describe(member, len(exchange.buckets), costs[member.label].flops, bucket)
                exchange.buckets.append(bucket)

    @staticmethod
    def _describe(member: Member, number: int, cost: int, bucket: Bucket) -> None:
        item = member.item
        assert item is not None
        at = bucket.members.index(member)
        moved = bucket.route.moved(at, bucket.usual_copies)
        member.row = Row(
            member.name,
            tuple(member.key.shape),
            "matrix, whole on every rank" if bucket.on_all else "matrix, in pieces",
            item.owner,
            number,
            cost,
            bucket.sent_dtype.itemsize * moved,
        )

    def _furnish(self) -> None:
        """Memory for the whole matrices of buckets, which take turns."""
        for exchange in self.exchanges:
            for dtype in {bucket.dtype for bucket in exchange.buckets}:
                same = [bucket for bucket in exchange.buckets if bucket.dtype == dtype]
                self._furnish_alike(exchange, dtype, same)

    @staticmethod
    def _furnish_alike(exchange: Exchange, dtype: torch.dtype, same: Sequence[Bucket]) -> None:
        owned = [[bucket.members[at] for at in bucket.route.owned] for bucket in same]
        sizes = [
            sum(bucket.room * member.key.numel() for member in members)
            for bucket, members in zip(same, owned, strict=True)
        ]
        device, turns = exchange.channel.device, exchange.channel.turns
        rooms = [
            torch.zeros(max(sizes[turn::turns]), dtype=dtype, device=device)
            for turn in range(min(turns, len(same)))
        ]
        exchange.rooms[dtype] = rooms
        for which, (bucket, members) in enumerate(zip(same, owned, strict=True)):
            room, at = rooms[which % turns], 0
            bucket.lasts = bucket.keeps or turns == 1 or which + turns >= len(same)
            for member in members:
                count, shape = member.key.numel(), member.key.shape
                kept = member.whole[:1] if bucket.keeps and member.whole else []
                if bucket.keeps and not kept:
                    kept = [torch.zeros(shape, dtype=dtype, device=device)]
                member.whole = kept + [
                    room[at + i * count : at + (i + 1) * count].view(shape)
                    for i in range(bucket.room)
                ]
                at += count * bucket.room

    def here(self, key: Tensor) -> Tensor | None:
        """The plain tensor that the state of a parameter fits on this rank, if it has any here."""
        member = self.members.get(key)
        if member is None:
            return key
        if member.item is None:
            return plain(key)
        return None if member.whole is None else member.whole[0]

    def pieces(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of a parameter and of its gradient.

        Raises:
            TypeError, ValueError: a gradient that lies elsewhere than its parameter.
            RuntimeError: a parameter that was none when the groups were compared.
        """
        grad = key.grad
        assert grad is not None
        member = self.members.get(key)
        if member is None:
            if isinstance(key, DTensor):
                raise RuntimeError(
                    "a parameter of a group was replaced by another DTensor, of which no other "
                    "rank knows: make a new optimizer"
                )
            return key, grad
        if not isinstance(key, DTensor):
            return key, grad
        if not isinstance(grad, DTensor):
            raise TypeError(
                f"the gradient of {member.name} is a {type(grad).__name__}, the parameter a DTensor"
            )
        if grad.placements != key.placements or grad.device_mesh != key.device_mesh:
            raise ValueError(
                f"the gradient of {member.name} has placements {tuple(grad.placements)}, the "
                f"parameter {tuple(key.placements)}"
            )
        return key.to_local(), grad.to_local()

    def table(self) -> Table:
        """Which rank does what."""
        rows = []
        for index, group in enumerate(self.optimizer.param_groups):
            routes = self.optimizer._routes_of(index, group)
            for position, (key, is_matrix) in enumerate(zip(group["params"], routes, strict=True)):
                member = self.members.get(key)
                how = "matrix, on every rank" if is_matrix else "adamw"
                name = self.optimizer._name(index, position)
                known = None if member is None else member.row
                rows.append(known or Row(name, tuple(key.shape), how))
        ranks = max(exchange.channel.size for exchange in self.exchanges)
        return Table(ranks, tuple(rows))


def _lines_of(mesh: DeviceMesh, device: torch.device, patience: float) -> list[Line]:
    """The lines of this rank in a mesh, but for those of itself alone."""
    place = mesh.get_coordinate()
    assert place is not None
    lines = []
    for dim, size in enumerate(mesh.mesh.shape):
        if size == 1:
            continue
        channel = Channel(mesh.get_group(dim), device, patience)
        at = tuple(slice(None) if other == dim else place[other] for other in range(mesh.ndim))
        ranks = tuple(channel.members.index(member) for member in mesh.mesh[at].tolist())
        lines.append(Line(dim, channel, ranks))
    return lines


def _group_of(mesh: DeviceMesh) -> Any:
    """The process group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = sorted(mesh.mesh.flatten().tolist())
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD
    # A new group would have the default timeout.
    seconds = timeout_of(mesh.get_group(0), torch.device(mesh.device_type))
    key = (*ranks, seconds)
    made = _groups.setdefault(dist.group.WORLD, {})
    if key not in made:
        # Its own ranks alone take part, so meshes of pipeline stages do not wait for one another.
        timeout = datetime.timedelta(seconds=seconds)
        made[key] = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    return made[key]

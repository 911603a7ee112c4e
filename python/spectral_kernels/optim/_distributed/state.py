"""State that is whole at owners, as DTensors in checkpoints, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from ... import _checks
from .layout import Region, no_region, whole_region
from .members import Exchange, Member
from .routes import Item, Route

if TYPE_CHECKING:
    from .step import Spread

Found = dict[Tensor, dict[str, Any] | None]

# A number for every place of a tensor of this size tells one rank's part from another's.
_PLACES = 4096


@dataclass(frozen=True)
class Leaf:
    """What all ranks know of a tensor that its owner has.

    Attributes:
        shape, dtype: its own.
        value: the tensor itself, on the CPU, where it is one number or none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Tensor | None


def mapped(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The function of every leaf in nested dicts and lists, and of the same leaf of others.

    An other that is None has None for every leaf.
    """
    if isinstance(tree, Mapping):
        return {
            name: mapped(function, each, *[x if x is None else x[name] for x in others])
            for name, each in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return [
            mapped(function, each, *[x if x is None else x[i] for x in others])
            for i, each in enumerate(tree)
        ]
    return function(tree, *others)


@dataclass(eq=False)
class Move:
    """One tensor on its way between its owner and the ranks.

    Attributes:
        item: its owner and who holds what.
        shape, dtype: of the whole tensor.
        own: the whole tensor at the owner, or this rank's part, whichever is sent.
    """

    item: Item
    shape: tuple[int, ...]
    dtype: torch.dtype
    own: Tensor | None


def _onward(move: Move, regions: Sequence[Region], whole: Tensor | None) -> Move:
    """The way on of a tensor from its owner to all that get a part."""
    item = Item(move.item.owner, regions, move.item.coordinates)
    return Move(item, move.shape, move.dtype, whole)


def _batches(moves: Sequence[Move], most: int) -> Iterator[list[Move]]:
    """Moves of one dtype, cut where they have enough bytes."""
    for dtype in sorted({move.dtype for move in moves}, key=str):
        batch: list[Move] = []
        size = 0
        for move in moves:
            if move.dtype != dtype:
                continue
            more = dtype.itemsize * sum(region.numel for region in move.item.regions)
            if batch and size + more > most:
                yield batch
                batch, size = [], 0
            batch.append(move)
            size += more
        yield batch


def _routed(
    spread: Spread, exchange: Exchange, moves: Sequence[Move]
) -> Iterator[tuple[list[Move], Route]]:
    """Batches of moves, and how each travels."""
    for batch in _batches(moves, spread.how.bucket_bytes):
        yield batch, exchange.route([move.item for move in batch])


def _scatter(spread: Spread, exchange: Exchange, moves: Sequence[Move]) -> dict[Move, Tensor]:
    """This rank's part of every tensor that an owner has whole."""
    channel = exchange.channel
    found: dict[Move, Tensor] = {}
    for batch, route in _routed(spread, exchange, moves):
        with channel.saying("send state out"):
            parts = route.scattered(
                route.scatter(channel, [move.own for move in batch], batch[0].dtype)
            )
        for move, part in zip(batch, parts, strict=True):
            found[move] = part.clone().view(move.item.regions[channel.rank].shape)
    return found


def _gather(spread: Spread, exchange: Exchange, moves: Sequence[Move]) -> dict[Move, Tensor]:
    """The whole tensors that this rank owns, of parts on all ranks."""
    channel = exchange.channel
    found: dict[Move, Tensor] = {}
    for batch, route in _routed(spread, exchange, moves):
        dtype = batch[0].dtype
        empty = torch.empty(0, dtype=dtype, device=channel.device)
        pieces = [[empty if move.own is None else move.own.to(channel.device)] for move in batch]
        for move in batch:
            if move.item.owner == channel.rank:
                found[move] = torch.empty(move.shape, dtype=dtype, device=channel.device)
        with channel.saying("bring state to its owners"):
            whole = [[found[move]] if move in found else None for move in batch]
            route.gathered(route.gather(channel, pieces, whole, dtype), whole)
    return found


# How state lies on the ranks.


def _placements(
    spread: Spread, exchange: Exchange, member: Member, name: str, shape: tuple[int, ...]
) -> tuple[Placement, ...]:
    """Those of a state tensor, by its name and its whole shape."""
    rows = (Shard(0),) * exchange.mesh.ndim
    if shape == tuple(member.key.shape):
        return rows if member.item is not None and member.on_all else member.placements
    if member.item is not None:
        return rows
    if not member.is_matrix:
        return member.placements
    dims = _batch_dims(spread, member, name, shape)
    return tuple(_at(placement, dims) for placement in member.placements)


def _at(placement: Placement, dims: Mapping[int, int]) -> Placement:
    """A placement whose dimension has another number."""
    dim = getattr(placement, "dim", None)
    if dim is None or dims[dim] == dim:
        return placement
    parts = getattr(placement, "split_factor", None)
    kind: Any = type(placement)
    return Shard(dims[dim]) if parts is None else kind(dims[dim], split_factor=parts)


def _batch_dims(spread: Spread, member: Member, name: str, shape: Sequence[int]) -> dict[int, int]:
    """For every batch dimension of a parameter the one of a state tensor, which leads.

    But in step counts, which have one for blocks before it. Empty for what has no batch.
    """
    group = spread.optimizer.param_groups[member.index]
    form = spread.optimizer._form(member.key, group)
    count = len(form.shape) - 2
    if name == "step":
        return {form.order[i]: len(shape) - count + i for i in range(count)}
    return {form.order[i]: i for i in range(count)} if len(shape) > count else {}


def _whole_shape(
    spread: Spread, member: Member, name: str, local: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The shape of a tensor of which every rank has its own part; None where it has none."""
    if not local or not isinstance(member.key, DTensor):
        return None
    if not member.is_matrix:
        return tuple(member.key.shape)
    dims = _batch_dims(spread, member, name, local)
    if not dims:
        return None
    shape = list(local)
    for theirs, ours in dims.items():
        shape[ours] = member.key.shape[theirs]
    return tuple(shape)


def _dtensor(
    exchange: Exchange, part: Tensor, placements: Sequence[Placement], shape: tuple[int, ...]
) -> DTensor:
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        part, exchange.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


# Out.


def _manifest(spread: Spread, exchange: Exchange) -> list[dict[str, Any]]:
    """For every member that has an owner the state that it has, as leaves; else nothing."""
    channel = exchange.channel

    def described(tensor: Tensor) -> Leaf:
        small = tensor.ndim == 0 or tensor.numel() == 0
        value = tensor.detach().cpu() if small else None
        return Leaf(tuple(tensor.shape), tensor.dtype, value)

    own = {
        at: mapped(described, dict(spread.optimizer.state[member.key]))
        for at, member in enumerate(exchange.members)
        if member.item is not None and member.item.owner == channel.rank
    }
    every: dict[int, dict[str, Any]] = {}
    for theirs in channel.objects(own, "say what state they have"):
        every.update(theirs)
    return [every.get(at, {}) for at in range(len(exchange.members))]


def _owned(
    spread: Spread, exchange: Exchange, regions: Callable[[Member, str, Leaf], list[Region]]
) -> dict[Member, dict[str, Any]]:
    """The state of what has an owner, with a Move in the place of every tensor that travels."""
    rank, coordinates = exchange.channel.rank, exchange.grid.coordinates
    trees: dict[Member, dict[str, Any]] = {}
    for member, manifest in zip(exchange.members, _manifest(spread, exchange), strict=True):
        item = member.item
        if item is None:
            continue
        own = spread.optimizer.state[member.key] if item.owner == rank else None

        def move(name: str, owner: int, leaf: Leaf, tensor: Tensor | None, member: Member) -> Any:
            if leaf.value is not None:
                return leaf.value.clone()
            travels = Item(owner, regions(member, name, leaf), coordinates)
            return Move(travels, leaf.shape, leaf.dtype, tensor)

        trees[member] = {
            name: mapped(
                partial(move, name, item.owner, member=member),
                leaves,
                None if own is None else own[name],
            )
            for name, leaves in manifest.items()
        }
    return trees


def _moves_in(tree: Any) -> list[Move]:
    found: list[Move] = []
    mapped(lambda leaf: found.append(leaf) if isinstance(leaf, Move) else None, tree)
    return found


def _numbered(spread: Spread, found: dict[str, Any]) -> dict[Tensor, int]:
    """The number of every parameter in a state dict of torch's."""
    return {
        key: number
        for group, packed in zip(spread.optimizer.param_groups, found["param_groups"], strict=True)
        for key, number in zip(group["params"], packed["params"], strict=True)
    }


def as_dtensors(spread: Spread, found: dict[str, Any]) -> dict[str, Any]:
    """A state dict in which what ranks share is DTensors, of which this rank has its part."""
    for exchange in spread.exchanges:
        exchange.channel.meet("state_dict()")
    numbers = _numbered(spread, found)
    state = dict(found["state"])
    for exchange in spread.exchanges:
        for member, tree in _shown(spread, exchange).items():
            state[numbers[member.key]] = tree
    marks = {str(i): _places(exchange) for i, exchange in enumerate(spread.exchanges)}
    return {**found, "state": state, "places": marks}


def _shown(spread: Spread, exchange: Exchange) -> dict[Member, dict[str, Any]]:
    """The state of every member, with tensors that ranks share as DTensors."""
    trees = _owned(spread, exchange, partial(_regions, spread, exchange))
    parts = _scatter(spread, exchange, _moves_in(list(trees.values())))

    def shown(member: Member, name: str, leaf: Any) -> Any:
        shape: tuple[int, ...] | None
        if isinstance(leaf, Move):
            shape, part = leaf.shape, parts[leaf]
        elif member.item is not None or not isinstance(leaf, Tensor):
            return leaf
        else:
            shape, part = _whole_shape(spread, member, name, tuple(leaf.shape)), leaf
        if shape is None:
            return leaf
        return _dtensor(exchange, part, _placements(spread, exchange, member, name, shape), shape)

    return {
        member: {
            name: mapped(partial(shown, member, name), leaves)
            for name, leaves in trees.get(member, spread.optimizer.state[member.key]).items()
        }
        for member in exchange.members
    }


def _regions(spread: Spread, exchange: Exchange, member: Member, name: str, leaf: Leaf) -> Any:
    return exchange.grid.regions(
        leaf.shape, _placements(spread, exchange, member, name, leaf.shape)
    )


def _places(exchange: Exchange) -> DTensor:
    """Numbers by which a part tells which rank it is of."""
    rows = (Shard(0),) * exchange.mesh.ndim
    region = exchange.grid.regions((_PLACES,), rows)[exchange.channel.rank]
    numbers = torch.arange(_PLACES, dtype=torch.int32, device=exchange.channel.device)
    return _dtensor(exchange, region.cut(numbers).clone(), rows, (_PLACES,))


def check_rank(spread: Spread, given: Mapping[str, Any]) -> None:
    """That a state dict with parts of tensors has those of this rank.

    Raises:
        ValueError: it has those of another.
    """
    for i, exchange in enumerate(spread.exchanges):
        found = given.get("places", {}).get(str(i))
        if isinstance(found, DTensor) and found.device_mesh.mesh.equal(exchange.mesh.mesh):
            expected = _places(exchange).to_local()
            if not torch.equal(found.to_local().to(expected.device), expected):
                raise ValueError(
                    "the state dict has the parts of another rank: a file that one rank has saved "
                    "with torch.save has the parts of that rank alone; save consolidate(), or all "
                    "ranks' with torch.distributed.checkpoint"
                )


def consolidated(spread: Spread, found: dict[str, Any], to: int | None) -> dict[str, Any] | None:
    """A state dict of whole tensors, on one rank or on all."""
    if to is not None:
        _checks.integer("to", to, 0, torch.distributed.get_world_size() - 1)
    # A mesh that `to` is not in has nothing that its optimizer holds.
    exchanges = [each for each in spread.exchanges if to is None or to in each.channel.members]
    for exchange in exchanges:
        exchange.channel.meet("consolidate()")
    numbers = _numbered(spread, found)
    state = dict(found["state"])
    for exchange in exchanges:
        target = None if to is None else exchange.channel.members.index(to)
        for member, tree in _whole_at(spread, exchange, target).items():
            state[numbers[member.key]] = tree
    here = to is None or to == torch.distributed.get_rank()
    return {**found, "state": state} if here else None


def _whole_at(
    spread: Spread, exchange: Exchange, target: int | None
) -> dict[Member, dict[str, Any]]:
    """The state of every member, whole on one rank or, if it is None, on all."""
    ranks = range(exchange.channel.size)

    def everywhere(_: Member, __: str, leaf: Leaf) -> list[Region]:
        return [
            whole_region(leaf.shape) if target in (None, rank) else no_region(leaf.shape)
            for rank in ranks
        ]

    trees = _owned(spread, exchange, everywhere)
    whole = _scatter(spread, exchange, _moves_in(list(trees.values())))
    parts = {
        member: {
            name: mapped(partial(_part_of, spread, exchange, member, name, target), leaves)
            for name, leaves in spread.optimizer.state[member.key].items()
        }
        for member in exchange.members
        if member.item is None
    }
    whole.update(_assembled(spread, exchange, _moves_in(list(parts.values())), target))
    return mapped(
        lambda leaf: whole.get(leaf) if isinstance(leaf, Move) else leaf, {**trees, **parts}
    )


def _part_of(
    spread: Spread, exchange: Exchange, member: Member, name: str, target: int | None, leaf: Any
) -> Any:
    """A move of the parts that every rank has to one rank, the first if all are to have it."""
    if not isinstance(leaf, Tensor):
        return leaf
    shape = _whole_shape(spread, member, name, tuple(leaf.shape))
    if shape is None:
        return leaf.clone()
    placements = _placements(spread, exchange, member, name, shape)
    regions = exchange.grid.regions(shape, placements)
    return Move(Item(target or 0, regions, exchange.grid.coordinates), shape, leaf.dtype, leaf)


def _assembled(
    spread: Spread, exchange: Exchange, moves: Sequence[Move], target: int | None
) -> dict[Move, Tensor]:
    """Whole tensors of parts, on one rank or, if it is None, on all."""
    whole = _gather(spread, exchange, moves)
    if target is not None:
        return whole
    onward = {
        move: _onward(move, [whole_region(move.shape)] * exchange.channel.size, whole.get(move))
        for move in moves
    }
    arrived = _scatter(spread, exchange, list(onward.values()))
    return {move: arrived[further] for move, further in onward.items()}


# In.


def brought_here(spread: Spread, found: Found) -> Found:
    """Of saved state, what this rank has to have: whole at the owner, its part of the rest."""
    spread.tell(None)
    unlike: ValueError | None = None
    for exchange in spread.exchanges:
        unlike = _compare(exchange, found) or unlike
    spread.tell(unlike)
    result = dict(found)
    for exchange in spread.exchanges:
        error = None
        trees: dict[Member, Any] = {}
        try:
            trees = {
                member: {
                    name: mapped(partial(_coming, spread, exchange, member, name), leaves)
                    for name, leaves in (found[member.key] or {}).items()
                }
                for member in exchange.members
            }
        except (TypeError, ValueError) as raised:
            error = raised
        spread.tell(error)
        for member, tree in _arrived(spread, exchange, trees).items():
            result[member.key] = tree
    return result


def _compare(exchange: Exchange, found: Found) -> ValueError | None:
    """What is said where ranks were not given the same state."""

    def described(leaf: Any) -> str:
        if isinstance(leaf, DTensor):
            return f"DTensor {tuple(leaf.shape)} {leaf.dtype} {leaf.placements}"
        if isinstance(leaf, Tensor):
            return f"tensor {tuple(leaf.shape)} {leaf.dtype}"
        return type(leaf).__name__

    lines = [
        f"{member.name}: {mapped(described, found[member.key] or {})}"
        for member in exchange.members
    ]
    of_all = exchange.channel.objects(lines, "compare what they were given")
    for member, theirs in zip(exchange.members, zip(*of_all, strict=True), strict=True):
        if len(set(theirs)) > 1:
            return ValueError(
                f"the ranks {exchange.channel.members} were given different state of "
                f"{member.name}: give all of them the same state dict, or load with "
                "broadcast_from_rank0"
            )
    return None


@dataclass(eq=False)
class Way:
    """A tensor that is brought to its owner, or through one rank to those that hold a part.

    Attributes:
        move: the way to the owner.
        onward: what each rank gets; None if it stays with the owner.
    """

    move: Move
    onward: Sequence[Region] | None


def _coming(spread: Spread, exchange: Exchange, member: Member, name: str, leaf: Any) -> Any:
    """What has to be done to a saved value so that it is where it belongs."""
    if not isinstance(leaf, Tensor):
        return leaf
    shape, rank = tuple(leaf.shape), exchange.channel.rank
    owner = 0 if member.item is None else member.item.owner
    onward = None
    if member.item is None:
        if not leaf.numel():
            # A side that has no factor.
            return leaf
        if not shape:
            return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf
        if not member.is_matrix and shape != tuple(member.key.shape):
            raise ValueError(
                f"{name} of {member.name} has shape {shape}, expected {tuple(member.key.shape)}"
            )
        placements = _placements(spread, exchange, member, name, shape)
        onward = exchange.grid.regions(shape, placements)
    if not isinstance(leaf, DTensor):
        return leaf if onward is None else onward[rank].cut(leaf)
    if {*leaf.device_mesh.mesh.flatten().tolist()} != {*exchange.channel.members}:
        raise ValueError(
            f"{name} of {member.name} lies on the ranks {leaf.device_mesh.mesh.tolist()}, the "
            f"parameter on {exchange.mesh.mesh.tolist()}: load it by torch.distributed.checkpoint"
        )
    there = type(exchange.grid).of(leaf.device_mesh, exchange.channel.members)
    regions = there.regions(shape, leaf.placements)
    if onward == regions:
        return leaf.to_local()
    item = Item(owner, regions, exchange.grid.coordinates)
    return Way(Move(item, shape, leaf.dtype, leaf.to_local()), onward)


def _arrived(
    spread: Spread, exchange: Exchange, trees: Mapping[Member, Any]
) -> dict[Member, dict[str, Any] | None]:
    """State where it belongs, once everything has travelled."""
    ways: list[Way] = []
    mapped(lambda leaf: ways.append(leaf) if isinstance(leaf, Way) else None, list(trees.values()))
    whole = _gather(spread, exchange, [way.move for way in ways])
    onward = {
        way.move: _onward(way.move, way.onward, whole.get(way.move))
        for way in ways
        if way.onward is not None
    }
    parts = _scatter(spread, exchange, list(onward.values()))

    def here(leaf: Any) -> Any:
        if not isinstance(leaf, Way):
            return leaf
        return whole.get(leaf.move) if leaf.onward is None else parts[onward[leaf.move]]

    rank = exchange.channel.rank
    return {
        member: mapped(here, tree) if member.item is None or member.item.owner == rank else None
        for member, tree in trees.items()
    }

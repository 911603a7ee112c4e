"""Which elements of a tensor each rank holds."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from .._forms import Form

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Region:
    """A product of index sets, one for every dimension of a tensor.

    Attributes:
        ranges: of every dimension the (start, length) of the indices, in the order in which the
            rank's own tensor has them.
    """

    ranges: tuple[Ranges, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rank's own tensor."""
        return tuple(sum(length for _, length in ranges) for ranges in self.ranges)

    @cached_property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        """The rank's own part of a whole tensor; a view where it is one block."""
        blocks = list(self._blocks())
        if len(blocks) == 1:
            return whole[blocks[0][0]]
        piece = whole.new_empty(self.shape)
        for there, here in blocks:
            piece[here] = whole[there]
        return piece

    def flat(self, whole: Tensor) -> Tensor | None:
        """The rank's own part as a flat view, where its elements follow one another."""
        blocks = list(self._blocks())
        part = whole[blocks[0][0]] if len(blocks) == 1 else None
        return None if part is None or not part.is_contiguous() else part.view(-1)

    def fill(self, whole: Tensor, piece: Tensor) -> None:
        """Writes the rank's own part, of any shape with as many elements, into a whole tensor."""
        piece = piece.reshape(self.shape)
        for there, here in self._blocks():
            whole[there].copy_(piece[here])

    def _blocks(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Slices of the whole tensor, and the same elements of the rank's own."""
        sides = []
        for ranges in self.ranges:
            side, at = [], 0
            for start, length in ranges:
                side.append((slice(start, start + length), slice(at, at + length)))
                at += length
            sides.append(side)
        for block in itertools.product(*sides):
            yield tuple(there for there, _ in block), tuple(here for _, here in block)


def whole_region(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return Region(tuple(((0, size),) for size in shape))


def no_region(shape: Sequence[int]) -> Region:
    """Nothing of a tensor."""
    return Region(tuple(() for _ in shape) or (((0, 0),),))


@dataclass(frozen=True)
class Grid:
    """The ranks of a group as coordinates in a mesh.

    Attributes:
        sizes: of the mesh's dimensions.
        coordinates: of every rank of the group, in its order.
    """

    sizes: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, mesh: DeviceMesh, members: Sequence[int]) -> Grid:
        """That of a mesh, for the global ranks of a group."""
        where = {int(mesh.mesh[at]): at for at in itertools.product(*map(range, mesh.mesh.shape))}
        return cls(tuple(mesh.mesh.shape), tuple(where[member] for member in members))

    def regions(self, shape: Sequence[int], placements: Sequence[Placement]) -> list[Region]:
        """What every rank of the group holds of a tensor.

        Dimension by dimension of the mesh, from left to right, as distribute_tensor does it.
        """
        sides = [
            _sides(size, self.sizes, tuple(_cut_of(placement, dim) for placement in placements))
            for dim, size in enumerate(shape)
        ]
        return [Region(tuple(side[at] for side in sides)) for at in self.coordinates]


def _cut_of(placement: Placement, dim: int) -> int:
    """Into how many parts a dimension is cut before each is sharded; 0 where it is not sharded."""
    if isinstance(placement, Replicate) or placement.dim != dim:  # type: ignore[attr-defined]
        return 0
    return int(getattr(placement, "split_factor", 1))


@functools.cache
def _sides(
    size: int, mesh: tuple[int, ...], cuts: tuple[int, ...]
) -> dict[tuple[int, ...], Ranges]:
    """The indices of one dimension at every coordinate of a mesh."""
    found: dict[tuple[int, ...], list[int]] = {(): list(range(size))}
    for count, parts in zip(mesh, cuts, strict=True):
        found = {
            (*at, i): _share(indices, parts, count, i) if parts else indices
            for at, indices in found.items()
            for i in range(count)
        }
    once = {id(indices): _compressed(indices) for indices in found.values()}
    return {at: once[id(indices)] for at, indices in found.items()}


def _share(indices: list[int], parts: int, count: int, which: int) -> list[int]:
    return [i for part in _chunks(indices, parts) for i in _chunks(part, count)[which]]


def _chunks(indices: list[int], count: int) -> list[list[int]]:
    """As torch.chunk, with empty ones at the end so that there are `count`."""
    step = -(-len(indices) // count)
    return [indices[step * i : step * (i + 1)] for i in range(count)]


def _compressed(indices: list[int]) -> Ranges:
    ranges: list[tuple[int, int]] = []
    for i in indices:
        if ranges and sum(ranges[-1]) == i:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + 1
        else:
            ranges.append((i, 1))
    return tuple(ranges)


def checked_local(name: str, x: Tensor) -> Tensor:
    """This rank's part of a DTensor.

    Raises:
        TypeError, ValueError: parts that are sums, a mesh without this rank, or parts that lie
            elsewhere than the mesh's device.
    """
    assert isinstance(x, DTensor)
    mesh = x.device_mesh
    for placement in x.placements:
        if not isinstance(placement, Replicate) and not hasattr(placement, "dim"):
            raise TypeError(
                f"{name} has the placement {placement}: its elements are sums over ranks that "
                "nobody has taken; redistribute it to Replicate() or Shard() first"
            )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} is on a mesh of the ranks {mesh.mesh.flatten().tolist()}, of which this one "
            "is none: leave it out of this rank's optimizer"
        )
    with torch.no_grad():
        local = x.to_local()
    if local.device.type not in (mesh.device_type, "meta"):
        raise ValueError(
            f"{name} lies on {local.device} and its mesh on {mesh.device_type}: matrices of "
            "offloaded parameters cannot be exchanged; take the offload policy away"
        )
    return local


def check_regions(name: str, x: Tensor, region: Region) -> None:
    """That this rank holds what its region says.

    Raises:
        ValueError: it does not.
    """
    assert isinstance(x, DTensor)
    local = x.to_local()
    held = tuple(local.shape) == region.shape
    if held and x.device_mesh.ndim > 1:
        held = all(
            _indices(x, dim) == [i for start, n in ranges for i in range(start, start + n)]
            for dim, ranges in enumerate(region.ranges)
        )
    if not held:
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} and placements {tuple(x.placements)} has a part of "
            f"shape {tuple(local.shape)} on this rank that is not where these placements put it"
        )


def _indices(x: DTensor, dim: int) -> list[int]:
    """Those of one dimension that this rank holds, as DTensor itself shards them."""
    numbers = torch.arange(x.shape[dim], dtype=torch.int64, device=x.device_mesh.device_type)
    numbers = numbers.view([-1 if i == dim else 1 for i in range(x.ndim)])
    placements = [
        placement if getattr(placement, "dim", None) == dim else Replicate()
        for placement in x.placements
    ]
    placed: Any = distribute_tensor(numbers, x.device_mesh, placements, src_data_rank=None)
    return [int(i) for i in placed.to_local().flatten().tolist()]


def only_batches(form: Form, shape: Sequence[int], regions: Sequence[Region]) -> bool:
    """Whether the ranks hold whole matrices of a batch, and not all of them the same ones."""
    matrix_dims = form.order[len(form.shape) - 2 :]
    kept = {region for region in regions if region.numel}
    return len(kept) > 1 and all(
        region.ranges[dim] == ((0, shape[dim]),) for region in kept for dim in matrix_dims
    )

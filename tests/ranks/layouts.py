"""How a model lies on ranks: each makes the parameters of a net DTensors, or leaves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


@cache
def mesh_of(shape: tuple[int, ...], *names: str) -> DeviceMesh:
    """A mesh of all ranks. A new one would have process groups, and their threads, of its own."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names or None)


def mesh_of_all() -> DeviceMesh:
    return mesh_of((dist.get_world_size(),))


def grid(*names: str) -> DeviceMesh:
    return mesh_of((2, dist.get_world_size() // 2), *names)


def place(
    net: nn.Module, where: Callable[[Tensor], tuple[DeviceMesh, Sequence[Any]] | None]
) -> None:
    for name, param in list(net.named_parameters()):
        placed = where(param)
        if placed is not None:
            net.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), *placed)))


def fsdp(net: nn.Module) -> None:
    fully_shard(net, mesh=mesh_of_all())


def sharded_by_columns(net: nn.Module) -> None:
    mesh = mesh_of_all()
    place(net, lambda x: (mesh, [Shard(x.ndim - 1)]))


def replicated(net: nn.Module) -> None:
    mesh = mesh_of_all()
    place(net, lambda x: (mesh, [Replicate()]))


def ddp(net: nn.Module) -> None:
    """Plain parameters, which the optimizer is given a group for."""


def hsdp(net: nn.Module) -> None:
    """Two replicas, each sharded over the other ranks."""
    fully_shard(net, mesh=grid("dp_replicate", "dp_shard"))


def fsdp_of_tensor_parallel(net: nn.Module) -> None:
    """Some matrices sharded over the second dimension of the mesh, all by FSDP2 over the first."""
    mesh = grid("dp", "tp")
    # Others are on the first dimension alone, so that there are two meshes.
    choices = {"even": [Shard(0)], "uneven": [Shard(0)], "tall": [Shard(1)], "conv": [Shard(0)]}
    chosen = {id(getattr(net, name)): placements for name, placements in choices.items()}
    place(net, lambda x: (mesh["tp"], chosen[id(x)]) if id(x) in chosen else None)
    fully_shard(net, mesh=mesh["dp"])


def both_dimensions(net: nn.Module) -> None:
    """Rows over one dimension of the mesh, columns over the other, both unevenly."""
    mesh = grid("rows", "columns")
    place(net, lambda x: (mesh, [Shard(0), Shard(x.ndim - 1)]))


def pipeline_stages(net: nn.Module) -> None:
    """Each half of the ranks has a mesh of two dimensions of its own."""
    mesh = mesh_of((2, dist.get_world_size() // 2, 1), "stage", "rows", "rest")
    place(net, lambda x: (mesh["rows", "rest"], [Shard(0), Replicate()]))


def _chain(net: nn.Module, shape: tuple[int, int, int], *, stages: bool = False) -> None:
    """FSDP2 over the first two dimensions of a mesh, some matrices tensor parallel over the last.

    So FSDP2 replicates over the first one, or, where that is of pipeline stages, has the second one
    alone.
    """
    mesh = mesh_of(shape, "first", "dp", "tp")
    choices = {"even": 0, "uneven": 1, "tall": 1, "conv": 0, "three_rows": 1}
    chosen = {id(getattr(net, name)): Shard(dim) for name, dim in choices.items()}
    place(net, lambda x: (mesh["tp"], [chosen[id(x)]]) if id(x) in chosen else None)
    fully_shard(net, mesh=mesh["dp"] if stages else mesh["first", "dp"])


def _cut_twice(net: nn.Module, shape: tuple[int, int, int]) -> None:
    """Replicas, each of rows cut over two dimensions of the mesh; biases over the last alone."""
    mesh = mesh_of(shape, "replicas", "rows", "more_rows")
    place(
        net,
        lambda x: (mesh, [Replicate(), Shard(0) if x.ndim > 1 else Replicate(), Shard(0)]),
    )


def some_plain(net: nn.Module) -> None:
    """Every other parameter sharded, the others plain and the same on all ranks."""
    mesh = mesh_of_all()
    chosen = {id(x) for x in list(net.parameters())[::2]}
    place(net, lambda x: (mesh, [Shard(0)]) if id(x) in chosen else None)


LAYOUTS = {
    "fsdp": fsdp,
    "columns": sharded_by_columns,
    "replicated": replicated,
    "ddp": ddp,
}
# Of meshes of two dimensions, and what is tried on four ranks alone.
GRIDS = {
    "hsdp": hsdp,
    "fsdp_tp": fsdp_of_tensor_parallel,
    "both": both_dimensions,
    "stages": pipeline_stages,
    "some_plain": some_plain,
}
# Meshes of three dimensions: what is cut in another way over each of them.
CHAINS: dict[str, Callable[[nn.Module], None]] = {
    "hsdp_tp 2x2x1": partial(_chain, shape=(2, 2, 1)),
    "hsdp_tp 1x2x2": partial(_chain, shape=(1, 2, 2)),
    "hsdp_tp 2x1x2": partial(_chain, shape=(2, 1, 2)),
    "pp_fsdp_tp 2x1x2": partial(_chain, shape=(2, 1, 2), stages=True),
    "pp_fsdp_tp 1x2x2": partial(_chain, shape=(1, 2, 2), stages=True),
    "replicate_shard_shard 2x2x1": partial(_cut_twice, shape=(2, 2, 1)),
    "replicate_shard_shard 1x2x2": partial(_cut_twice, shape=(1, 2, 2)),
    "hsdp_tp 2x2x2": partial(_chain, shape=(2, 2, 2)),
}


def full(x: Tensor) -> Tensor:
    return x.full_tensor().detach() if isinstance(x, DTensor) else x.detach()


def local(x: Tensor) -> Tensor:
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()


def part_of(x: Tensor, whole: Tensor) -> Tensor:
    """What this rank has of a whole tensor that lies as x does."""
    if not isinstance(x, DTensor):
        return whole
    placed: Any = distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
    return placed.to_local()

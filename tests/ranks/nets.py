"""Optimizers, small nets and how they lie on ranks, for what the ranks do in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import spectral_kernels as sk
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "muon": partial(sk.optim.Muon, lr=0.02),
    "shampoo": partial(sk.optim.Shampoo, lr=0.01, block_size=16, precondition_frequency=3),
    "soap": partial(sk.optim.SOAP, lr=0.01, precondition_frequency=3, stagger=True),
    "deva": partial(sk.optim.DeVA, lr=0.05, precondition_frequency=3),
    "deva_low_memory": partial(sk.optim.DeVA, lr=0.05, variant="low_memory"),
}

# Settings whose state or step has another form, for some tests.
ALL = OPTIMIZERS | {
    "muon_sphere": partial(
        sk.optim.Muon, lr=0.02, hyperball=True, state_dtype=torch.bfloat16, beta2=0.9
    )
}

# A run, and where it is interrupted, between two refreshes.
STEPS, HALF = 6, 4

# Rows that four ranks share evenly and not, fewer rows than ranks, one column, a convolution, and
# what takes AdamW.
SHAPES: dict[str, tuple[int, ...]] = {
    "even": (16, 24),
    "uneven": (18, 33),
    "tall": (33, 18),
    "one_row": (1, 18),
    "one_column": (5, 1),
    "three_rows": (3, 7),
    "conv": (6, 4, 3, 3),
    "bias": (18,),
    "short_bias": (3,),
}


def weights(dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        for name, shape in shapes.items()
    }


def gradients(
    step: int, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(77 + step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        for name, shape in shapes.items()
    }


class Net(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


# How a model lies on the ranks: each makes the parameters of a net DTensors, or leaves them.


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _grid(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=names)


def place(net: Net, where: Callable[[Tensor], tuple[DeviceMesh, Sequence[Any]] | None]) -> None:
    for name, param in list(net.named_parameters()):
        placed = where(param)
        if placed is not None:
            net.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), *placed)))


def fsdp(net: Net) -> None:
    fully_shard(net, mesh=mesh_of_all())


def sharded_by_columns(net: Net) -> None:
    mesh = mesh_of_all()
    place(net, lambda x: (mesh, [Shard(x.ndim - 1)]))


def replicated(net: Net) -> None:
    mesh = mesh_of_all()
    place(net, lambda x: (mesh, [Replicate()]))


def ddp(net: Net) -> None:
    """Plain parameters, which the optimizer is given a group for."""


def hsdp(net: Net) -> None:
    """Two replicas, each sharded over the other ranks."""
    fully_shard(net, mesh=_grid("dp_replicate", "dp_shard"))


def fsdp_of_tensor_parallel(net: Net) -> None:
    """Some matrices sharded over the second dimension of the mesh, all by FSDP2 over the first."""
    mesh = _grid("dp", "tp")
    # Others are on the first dimension alone, so that there are two meshes.
    choices = {"even": [Shard(0)], "uneven": [Shard(0)], "tall": [Shard(1)], "conv": [Shard(0)]}
    chosen = {id(getattr(net, name)): placements for name, placements in choices.items()}
    place(net, lambda x: (mesh["tp"], chosen[id(x)]) if id(x) in chosen else None)
    fully_shard(net, mesh=mesh["dp"])


def both_dimensions(net: Net) -> None:
    """Rows over one dimension of the mesh, columns over the other, both unevenly."""
    mesh = _grid("rows", "columns")
    place(net, lambda x: (mesh, [Shard(0), Shard(x.ndim - 1)]))


def pipeline_stages(net: Net) -> None:
    """Each half of the ranks has a mesh of two dimensions of its own."""
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half, 1), mesh_dim_names=("stage", "rows", "rest"))
    place(net, lambda x: (mesh["rows", "rest"], [Shard(0), Replicate()]))


LAYOUTS = {
    "fsdp": fsdp,
    "columns": sharded_by_columns,
    "replicated": replicated,
    "ddp": ddp,
}
# Of meshes of two dimensions.
GRIDS = {
    "hsdp": hsdp,
    "fsdp_tp": fsdp_of_tensor_parallel,
    "both": both_dimensions,
    "stages": pipeline_stages,
}


def options(layout: str, **more: Any) -> dict[str, Any]:
    """What a constructor is told; nothing of ranks for "alone"."""
    if layout == "alone":
        return {}
    group = dist.group.WORLD if layout == "ddp" else None
    return {"distributed": sk.optim.Distributed(group, **more)}


def give(net: nn.Module, grads: dict[str, Tensor], but: Iterable[str] = ()) -> None:
    """Sets the gradients, each as its parameter lies."""
    for name, param in net.named_parameters():
        if name in but:
            param.grad = None
        elif isinstance(param, DTensor):
            param.grad = distribute_tensor(
                grads[name], param.device_mesh, param.placements, src_data_rank=None
            )
        else:
            param.grad = grads[name].clone()


def made(
    name: str, layout: str, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[Net, Any]:
    net = Net(weights(dtype))
    if layout != "alone":
        {**LAYOUTS, **GRIDS}[layout](net)
    # Several buckets, so that two are in flight.
    return net, ALL[name](net.named_parameters(), **options(layout, bucket_bytes=2500, **more))


def stepped(net: nn.Module, optimizer: Any, steps: Iterable[int], dtype: torch.dtype) -> None:
    for step in steps:
        give(net, gradients(step, dtype))
        optimizer.step()


def alone(name: str, dtype: torch.dtype = torch.float32, steps: int = STEPS) -> dict[str, Tensor]:
    """The weights after some steps in one process."""
    return _alone(name, dtype, steps)


@cache
def _alone(name: str, dtype: torch.dtype, steps: int) -> dict[str, Tensor]:
    net = Net(weights(dtype))
    stepped(net, ALL[name](net.named_parameters()), range(steps), dtype)
    return {key: param.detach() for key, param in net.named_parameters()}


def full(x: Tensor) -> Tensor:
    return x.full_tensor().detach() if isinstance(x, DTensor) else x.detach()


def local(x: Tensor) -> Tensor:
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()


def different(net: nn.Module, expected: dict[str, Tensor]) -> list[str]:
    """Names of parameters that are not equal bit for bit."""
    return [
        name for name, mine in net.named_parameters() if not torch.equal(full(mine), expected[name])
    ]


def set_weights(net: Net, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, param in net.named_parameters():
            value = values[name]
            if isinstance(param, DTensor):
                value = distribute_tensor(
                    value, param.device_mesh, param.placements, src_data_rank=None
                ).to_local()
            local(param).copy_(value)


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""

"""What ranks do under other people's layers; each function runs in every worker."""

from __future__ import annotations

import importlib
import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from spectral_kernels import call_counts, swap_in
from swap_support import DOUBLES, modules_of
from torch.distributed.tensor import Shard

from ranks.nets import (
    OPTIMIZERS,
    Net,
    different,
    full,
    give,
    gradients,
    mesh_of_all,
    place,
    weights,
)
from ranks.trainings import classifier, loss_of


def _swapped(target: str, *, spread: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The weights after some steps of a swapped optimizer, and its calls of our kernels."""
    shapes = {f"w{i}": (8, 12) for i in range(2 * dist.get_world_size())}
    net = Net(weights(torch.float32, shapes))
    more: dict[str, Any] = {}
    if target != "dion":
        types = importlib.import_module(f"{target}.preconditioner.matrix_functions_types")
        more["config"] = types.CoupledNewtonConfig()
    if spread and target == "dion":
        mesh = mesh_of_all()
        place(net, lambda x: (mesh, [Shard(0)]))
        more["distributed_mesh"] = mesh
    elif spread:
        more["process_group"] = dist.group.WORLD
    package = importlib.import_module(target)
    make = package.Muon if target == "dion" else package.DistributedShampoo
    optimizer = make(list(net.parameters()), **more)
    call_counts(reset=True)
    for step in range(3):
        give(net, gradients(step, torch.float32, shapes))
        optimizer.step()
    ours = "newton_schulz/" if target == "dion" else "inverse_root/"
    calls = sum(count for name, count in call_counts().items() if name.startswith(ours))
    return {name: full(param) for name, param in net.named_parameters()}, calls


def swapped(target: str) -> tuple[list[str], int, int]:
    """Distributors that hand whole, plain matrices to what is swapped: the bits of one process."""
    with modules_of([DOUBLES]):
        importlib.import_module(target)
        with swap_in(target):
            alone, of_one = _swapped(target, spread=False)
            found, calls = _swapped(target, spread=True)
    return [name for name, x in found.items() if not torch.equal(x, alone[name])], calls, of_one


def _as_launched() -> Any:
    """The environment that torch.distributed.run gives to a rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return mock.patch.dict(
        os.environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29511",
        TORCHELASTIC_RUN_ID="ranks",
    )


def trained_by(package: str) -> list[str] | None:
    """DDP as a trainer sets it up: as in one process. None where there is no such package."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return None
    net, one = classifier(), classifier()
    optimizer = OPTIMIZERS["muon"](net.named_parameters(), distributed=dist.group.WORLD)
    reference = OPTIMIZERS["muon"](one.named_parameters())
    with _as_launched():
        if package == "accelerate":
            trainer = importlib.import_module(package).Accelerator(cpu=True)
            model, stepping = trainer.prepare(net, optimizer)
        else:
            fabric = importlib.import_module("lightning.fabric")
            trainer = fabric.Fabric(
                accelerator="cpu", devices=dist.get_world_size(), strategy="ddp"
            )
            trainer.launch()
            model, stepping = trainer.setup(net, optimizer)
        for step in range(4):
            loss = loss_of(model, step, slice(0, 8))
            trainer.backward(loss)
            loss_of(one, step, slice(0, 8)).backward()
            for each in (stepping, reference):
                each.step()
                each.zero_grad()
    parallel = torch.nn.parallel.DistributedDataParallel
    assert any(isinstance(x, parallel) for x in model.modules())
    assert any(row.owner == 1 for row in optimizer.plan().rows)
    return different(net, dict(one.named_parameters()))

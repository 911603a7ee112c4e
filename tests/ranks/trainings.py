"""Forward, backward and step of small models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import fully_shard

from ranks.layouts import full, grid, mesh_of_all
from ranks.nets import Net, give, gradients, weights
from ranks.runs import OPTIMIZERS, alone, different, made


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 18), nn.Tanh(), nn.Linear(18, 10), nn.Tanh(), nn.Linear(10, 4)
    )


def loss_of(net: nn.Module, step: int, part: slice) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float32)[part]
    return net(x).square().mean()


def trained(kind: str, name: str) -> tuple[list[str], list[int]]:
    """Ranks with the same batches: forward, backward, clipping; as in one process."""
    net: nn.Module = classifier()
    one = classifier()
    more: dict[str, Any] = {}
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
        more["distributed"] = net.process_group
    elif kind == "replicate":
        replicate(net, mesh=mesh_of_all())
    else:
        mesh = mesh_of_all() if kind == "fsdp" else grid("dp_replicate", "dp_shard")
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = OPTIMIZERS[name](net.named_parameters(), **more)
    reference = OPTIMIZERS[name](one.named_parameters())
    if kind == "replicate":
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = torch.tensor(each.param_groups[0]["lr"])
    schedules = [
        torch.optim.lr_scheduler.StepLR(each, 2, gamma=0.5) for each in (optimizer, reference)
    ]
    for step in range(4):
        for each, stepping, schedule in zip(
            (net, one), (optimizer, reference), schedules, strict=True
        ):
            for half in (slice(0, 4), slice(4, 8)):
                waiting = kind == "ddp" and each is net and half.start == 0
                with net.no_sync() if waiting else nullcontext():
                    loss_of(each, step, half).backward()
            stepping.step()
            schedule.step()
            stepping.zero_grad()
    expected = dict(zip([n for n, _ in net.named_parameters()], one.parameters(), strict=True))
    return different(net, {key: x.detach() for key, x in expected.items()}), [
        optimizer.memory_estimate(),
        reference.memory_estimate(),
    ]


def clipped(name: str) -> tuple[bool, float]:
    """clip_grad_norm_ takes its norm of all parts, and what it leaves is what the owners get."""
    net, optimizer = made(name, "fsdp")
    give(net, gradients(0, torch.float32))
    norm = full(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5))
    scaled = {
        key: full(param.grad) for key, param in net.named_parameters() if param.grad is not None
    }
    one = Net(weights(torch.float32))
    reference = OPTIMIZERS[name](one.named_parameters())
    give(one, scaled)
    reference.step()
    optimizer.step()
    expected = {key: param.detach() for key, param in one.named_parameters()}
    whole = torch.cat([g.flatten() for g in gradients(0, torch.float32).values()]).norm()
    return different(net, expected) == [], float(norm / whole)


def overflowed() -> tuple[list[str], list[str]]:
    """GradScaler: an overflow on one rank skips the step on all."""
    net, optimizer = made("muon", "fsdp")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    found = []
    for step in range(2):
        grads = {key: 2.0 * grad for key, grad in gradients(0, torch.float32).items()}
        if step == 0:
            grads["uneven"][0, 0] = torch.inf
        give(net, grads)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update(2.0)
        expected = weights(torch.float32) if step == 0 else alone("muon", steps=1)
        found.append(different(net, expected))
    return found[0], found[1]

"""What a spread optimizer refuses, and what ranks are told that wait in vain."""

from __future__ import annotations

import copy
import os
import signal
import time
import warnings
from typing import Any
from unittest import mock

import spectral_kernels as sk
import torch
import torch.distributed as dist
from spectral_kernels.optim._distributed import exchange as exchange_module
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ranks.layouts import fsdp, fsdp_of_tensor_parallel, full, local, mesh_of, mesh_of_all
from ranks.nets import Net, give, gradients, weights
from ranks.runs import OPTIMIZERS, STEPS, alone, different, made, options, raised, stepped


def called_by_the_first_rank(what: str) -> str:
    """Others are never there; afterwards it works."""
    net, optimizer = made("soap", "fsdp", patience=0.5)
    stepped(net, optimizer, range(2), torch.float32)
    message = ""
    if dist.get_rank() == 0:
        try:
            if what == "load_state_dict":
                optimizer.load_state_dict({})
            else:
                getattr(optimizer, what)()
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    for exchange in optimizer._spread.exchanges:
        exchange.channel.patience = 30.0  # all are there now, on a machine that may be busy
    optimizer.load_state_dict(optimizer.state_dict())
    stepped(net, optimizer, range(2, STEPS), torch.float32)
    assert different(net, alone("soap")) == []
    return message


def made_by_the_first_rank() -> tuple[list[str], str]:
    """Others make none; afterwards all make one."""
    warned, message = [], ""
    net = Net(weights(torch.float32))
    fsdp(net)
    if dist.get_rank() == 0:
        with (
            mock.patch.object(exchange_module, "timeout_of", lambda *_: 0.5),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            try:
                OPTIMIZERS["muon"](net.named_parameters(), **options("fsdp", patience=0.2))
            except RuntimeError as error:
                message = str(error)
        warned = [str(each.message) for each in caught if "ranks" in str(each.message)]
    dist.barrier()
    net, optimizer = made("muon", "fsdp")
    stepped(net, optimizer, range(STEPS), torch.float32)
    assert different(net, alone("muon")) == []
    return warned, message


def absent_on_one_rank(
    layout: str, name: str = "tall", rank: int = 1
) -> tuple[str, list[str], list[str]]:
    """Raises on all ranks before anything is written, and the next step goes on."""
    net, optimizer = made("muon", layout)
    give(net, gradients(0, torch.float32), (name,) if dist.get_rank() == rank else ())
    message = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    before = different(net, weights(torch.float32))
    stepped(net, optimizer, range(STEPS), torch.float32)
    return message, before, different(net, alone("muon"))


def wrong_on_one_rank(what: str) -> tuple[str, str, list[str], list[str]]:
    """What one rank alone cannot do raises the same on all, before anything is written."""
    net, optimizer = made("shampoo", "fsdp")
    give(net, gradients(0, torch.float32))
    if dist.get_rank() == 1:
        if what == "lr":
            optimizer.param_groups[0]["lr"] = -1.0
        elif what == "another lr":
            optimizer.param_groups[0]["lr"] = 0.02
        elif what == "gradient":
            net.tall.grad = nn.Parameter(torch.zeros(33, 18))
        else:
            shared = net.tall.grad
            net.tall.grad = DTensor.from_local(
                shared.to_local(),
                shared.device_mesh,
                [Replicate()],
                run_check=False,
                shape=shared.shape,
                stride=shared.stride(),
            )
    kind = message = ""
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        kind, message = type(error).__name__, str(error)
    before = different(net, weights(torch.float32))
    optimizer.param_groups[0]["lr"] = 0.01
    stepped(net, optimizer, range(STEPS), torch.float32)
    return kind, message, before, different(net, alone("shampoo"))


def state_that_an_owner_has_lost(wrong: str) -> tuple[str, str, list[str], list[str]]:
    """State that does not fit, on one rank alone: all raise before anything is written."""
    net, optimizer = made("muon", "fsdp")
    stepped(net, optimizer, range(2), torch.float32)
    before = {key: full(param).clone() for key, param in net.named_parameters()}
    key = "momentum_buffer" if wrong == "tall" else "exp_avg"
    owner = next(row.owner for row in optimizer.plan().rows if row.name == wrong) or 0
    state = optimizer.state[getattr(net, wrong)]
    if dist.get_rank() == owner:
        kept, state[key] = state[key], torch.zeros(2)
    give(net, gradients(2, torch.float32))
    kind = message = ""
    try:
        optimizer.step()
    except ValueError as error:
        kind, message = type(error).__name__, str(error)
    after = different(net, before)
    if dist.get_rank() == owner:
        state[key] = kept
    stepped(net, optimizer, range(2, STEPS), torch.float32)
    return kind, message, after, different(net, alone("muon"))


def different_copies(what: str) -> tuple[str, list[str]]:
    """A gradient or a weight that one rank has otherwise, though all hold it whole."""
    net, optimizer = made("muon", "replicated" if what == "replicated" else "ddp")
    give(net, gradients(0, torch.float32))
    if dist.get_rank() == 1:
        with torch.no_grad():
            local(net.tall if what == "weights" else net.tall.grad)[0, 0] += 1.0
    message = ""
    try:
        optimizer.step()
    except ValueError as error:
        message = str(error)
    with torch.no_grad():
        for name, x in weights(torch.float32).items():
            local(getattr(net, name)).copy_(x)
    stepped(net, optimizer, range(STEPS), torch.float32)
    return message, different(net, alone("muon"))


def interrupted(how: str, phase: str, which: int) -> tuple[str, str, list[str], list[str], float]:
    """The last rank dies or stops in a step; what the others are told, and how soon: the seconds
    beyond those of the two steps before, for the machine may be busy.
    """
    net, optimizer = made("muon", "fsdp")
    start = time.monotonic()
    stepped(net, optimizer, range(2), torch.float32)
    usual = time.monotonic() - start
    before = {key: local(param).clone() for key, param in net.named_parameters()}
    give(net, gradients(2, torch.float32))
    exchange = optimizer._spread.exchanges[0]
    if dist.get_rank() == dist.get_world_size() - 1:
        ended = exchange.buckets[which].route
        real = getattr(ended, phase)

        def end(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
            return real(*args)

        setattr(ended, phase, end)
    start = time.monotonic()
    try:
        optimizer.step()
        first = ""
    except RuntimeError as error:
        first = str(error)
    took = time.monotonic() - start - usual
    changed = [
        key for key, param in net.named_parameters() if not torch.equal(local(param), before[key])
    ]
    try:
        optimizer.step()
        second = ""
    except RuntimeError as error:
        second = str(error)
    names = [bucket.members[0].name for bucket in exchange.buckets]
    return first, second, changed, names, took


def refused(what: str) -> tuple[str, str]:
    """The exception of a constructor."""
    net = Net(weights(torch.float32))
    mesh = mesh_of_all()
    more: dict[str, Any] = {}
    members: Any = None
    rank = dist.get_rank()
    if what == "partial":
        part = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
        members = [("summed", part)]
    elif what == "group and DTensors":
        fsdp(net)
        more["distributed"] = dist.group.WORLD
    elif what == "offloaded":
        part = DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)], run_check=False)
        # There is no card here, so the mesh says it lies on one.
        with mock.patch.object(DeviceMesh, "device_type", "cuda"):
            return raised(lambda: OPTIMIZERS["muon"]([("moved", nn.Parameter(part))]))
    elif what == "flat":
        flat = nn.Parameter(torch.ones(16))
        flat._is_flat_param = True
        members = [("flat", flat)]
    elif what == "not a group":
        more["distributed"] = 4
    elif what == "wire":
        return raised(lambda: sk.optim.Distributed(wire=torch.float16))
    elif what == "other wire":
        fsdp(net)
        wire = torch.bfloat16 if rank == 1 else None
        more["distributed"] = sk.optim.Distributed(wire=wire)
    elif what == "a sphere and a wire":
        fsdp(net)
        how = sk.optim.Distributed(wire=torch.bfloat16)
        return raised(
            lambda: sk.optim.Muon(net.named_parameters(), hyperball=True, distributed=how)
        )
    elif what == "mesh of two dimensions":
        more["distributed"] = init_device_mesh("cpu", (1, dist.get_world_size()))
    elif what == "lr":
        fsdp(net)
        more["lr"] = 0.5 if rank == 1 else 0.25
    elif what == "order":
        fsdp(net)
        members = list(net.named_parameters())
        members = members[::-1] if rank == 1 else members
    elif what == "shape":
        fsdp(net)
        if rank == 1:
            net.tall = nn.Parameter(
                distribute_tensor(torch.ones(34, 18), mesh, [Shard(0)], src_data_rank=None)
            )
        members = list(net.named_parameters())
    elif what == "dtype":
        fsdp(net)
        if rank == 1:
            other = distribute_tensor(
                torch.ones(33, 18, dtype=torch.bfloat16), mesh, [Shard(0)], src_data_rank=None
            )
            net.tall = nn.Parameter(other)
        members = list(net.named_parameters())
    elif what == "number":
        fsdp(net)
        members = list(net.named_parameters())[: 3 if rank == 1 else 4]
    return raised(lambda: OPTIMIZERS["muon"](members or net.named_parameters(), **more))


def refused_sums(shape: tuple[int, ...], which: int) -> list[tuple[str, str]]:
    """A parameter whose elements are sums over one dimension of a mesh, in each kind of group."""
    mesh = mesh_of(shape, "first", "second", "third")
    placements: list[Any] = [Replicate(), Shard(0), Shard(1)]
    placements[which] = Partial()
    net = Net(weights(torch.float32))
    local_part = torch.ones(4, 4)
    wrong = nn.Parameter(DTensor.from_local(local_part, mesh, placements, run_check=False))
    named = [("right", net.even), ("summed", wrong)]
    return [raised(lambda make=make: make(named)) for make in OPTIMIZERS.values()]


def refused_on_a_line(wrong: str) -> tuple[str, str, list[str]]:
    """Groups differ between two ranks of a mesh, of which the others share a larger one."""
    net = Net(weights(torch.float32))
    fsdp_of_tensor_parallel(net)
    named = dict(net.named_parameters())
    if dist.get_rank() == 2:
        mesh = named[wrong].device_mesh
        other = distribute_tensor(torch.ones(2, 18), mesh, [Shard(0)], src_data_rank=None)
        named[wrong] = nn.Parameter(other)
    kind, message = raised(lambda: OPTIMIZERS["muon"](named.items()))
    # Nothing is left that anybody waits for.
    net, optimizer = made("muon", "fsdp_tp")
    stepped(net, optimizer, range(STEPS), torch.float32)
    return kind, message, different(net, alone("muon"))


def wire_and_a_later_sphere() -> tuple[str, list[str]]:
    net, optimizer = made("muon", "fsdp", wire=torch.bfloat16)
    optimizer.param_groups[0]["hyperball"] = True
    give(net, gradients(0, torch.float32))
    _, message = raised(optimizer.step)
    return message, different(net, weights(torch.float32))


def copied() -> tuple[str, str]:
    return raised(lambda: copy.deepcopy(made("muon", "fsdp")[1]))

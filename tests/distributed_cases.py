"""What the ranks of test_distributed.py do; each function runs in every worker."""

from __future__ import annotations

import copy
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import spectral_kernels as sk
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optim_support import assert_same
from spectral_kernels import _dispatch
from spectral_kernels.optim._distributed import exchange as exchange_module
from spectral_kernels.optim._distributed.layout import Grid
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "muon": partial(sk.optim.Muon, lr=0.02),
    "shampoo": partial(sk.optim.Shampoo, lr=0.01, block_size=16, precondition_frequency=3),
    "soap": partial(sk.optim.SOAP, lr=0.01, precondition_frequency=3, stagger=True),
    "deva": partial(sk.optim.DeVA, lr=0.05, precondition_frequency=3),
    "deva_low_memory": partial(sk.optim.DeVA, lr=0.05, variant="low_memory"),
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


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _grid(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=names)


def _placed(net: Net, place: Callable[[Tensor], tuple[DeviceMesh, Sequence[Any]] | None]) -> None:
    for name, param in list(net.named_parameters()):
        placed = place(param)
        if placed is not None:
            net.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), *placed)))


def fsdp(net: Net) -> None:
    fully_shard(net, mesh=_mesh())


def sharded_by_columns(net: Net) -> None:
    mesh = _mesh()
    _placed(net, lambda x: (mesh, [Shard(x.ndim - 1)]))


def replicated(net: Net) -> None:
    mesh = _mesh()
    _placed(net, lambda x: (mesh, [Replicate()]))


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
    _placed(net, lambda x: (mesh["tp"], chosen[id(x)]) if id(x) in chosen else None)
    fully_shard(net, mesh=mesh["dp"])


def both_dimensions(net: Net) -> None:
    """Rows over one dimension of the mesh, columns over the other, both unevenly."""
    mesh = _grid("rows", "columns")
    _placed(net, lambda x: (mesh, [Shard(0), Shard(x.ndim - 1)]))


def pipeline_stages(net: Net) -> None:
    """Each half of the ranks has a mesh of two dimensions of its own."""
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half, 1), mesh_dim_names=("stage", "rows", "rest"))
    _placed(net, lambda x: (mesh["rows", "rest"], [Shard(0), Replicate()]))


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
    return net, OPTIMIZERS[name](
        net.named_parameters(), **options(layout, bucket_bytes=2500, **more)
    )


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
    stepped(net, OPTIMIZERS[name](net.named_parameters()), range(steps), dtype)
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


# The cases.


def equal_to_one_process(layout: str, dtype: torch.dtype) -> dict[str, list[str]]:
    found = {}
    for name in OPTIMIZERS:
        net, optimizer = made(name, layout, dtype)
        stepped(net, optimizer, range(STEPS), dtype)
        found[name] = different(net, alone(name, dtype))
    return found


def on_a_narrow_wire(layout: str, dtype: torch.dtype) -> tuple[Any, Any, list[str]]:
    """Every step against one of one process from the same weights, with the rounded gradients.

    Returns:
        Of every optimizer the largest error of an element, as a share of what it may be; whether
        what is skipped or absent was left alone; and what differs between ranks.
    """
    worst, left_alone = {}, {}
    differs = []
    for name in OPTIMIZERS:
        net, optimizer = made(name, layout, dtype, wire=torch.bfloat16)
        one = Net(weights(dtype))
        reference = OPTIMIZERS[name](one.named_parameters())
        group = reference.param_groups[0]
        decay = 1.0 - group["lr"] * group["weight_decay"]
        share, same = 0.0, True
        for step in range(STEPS):
            before = {key: full(param).clone() for key, param in net.named_parameters()}
            _set_weights(one, before)
            grads = gradients(step, dtype)
            if step == 2:
                grads["uneven"][-1, -1] = torch.nan
            absent = ("conv",) if step == 1 else ()
            give(net, grads, absent)
            # Who holds all has gradients as they are.
            rounded = {key: grad.bfloat16().to(dtype) for key, grad in grads.items()}
            give(one, grads if layout in ("ddp", "replicated") else rounded, absent)
            optimizer.step()
            reference.step()
            for key, param in net.named_parameters():
                now, expected = full(param), getattr(one, key).detach()
                if reference.algorithm_of(getattr(one, key)) != "matrix":
                    continue
                if key in absent or (step == 2 and key == "uneven"):
                    # Shampoo skips one block of it, and moves the others.
                    still = expected == before[key]
                    same = same and bool(still.any()) and now[still].equal(expected[still])
                update = expected.double() - decay * before[key].double()
                ulps = 2.0 * torch.finfo(dtype).eps * expected.double().abs()
                error = (now.double() - expected.double()).abs()
                share = max(share, float((error / (update.abs() / 256.0 + ulps)).max()))
        worst[name], left_alone[name] = share, same
        bits: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(bits, {key: full(x) for key, x in net.named_parameters()})
        differs += [key for key, x in bits[0].items() if any(not x.equal(b[key]) for b in bits)]
    return worst, left_alone, differs


def forms_on_a_narrow_wire() -> list[str]:
    """Blocks, batches and matrices that are no views: the same update as of a plain matrix."""
    start = weights(torch.float32, {"plain": (6, 20)})["plain"]
    tensors = {"plain": start, "batch": torch.stack([start, -start]), "moved": start.mT}
    net = Net({key: tensor.contiguous() for key, tensor in tensors.items()})
    mesh = _mesh()
    _placed(net, lambda x: (mesh, [Shard(x.ndim - 1)]))
    groups = [
        {"params": [net.plain]},
        {"params": [net.batch], "batched": True},
        {"params": [net.moved], "matrix_dims": (1, 0)},
    ]
    how = sk.optim.Distributed(wire=torch.bfloat16)
    optimizer = sk.optim.Shampoo(
        groups, lr=0.01, block_size=4, precondition_frequency=1, distributed=how
    )
    for step in range(4):
        grad = gradients(step, torch.float32, {"plain": (6, 20)})["plain"]
        grads = {"plain": grad, "batch": torch.stack([grad, -grad]), "moved": grad.mT}
        give(net, {key: each.contiguous() for key, each in grads.items()})
        optimizer.step()
    plain, (first, second), moved = (full(x) for x in (net.plain, net.batch, net.moved))
    assert not torch.equal(plain, start)
    found = {"first": first, "second": -second, "moved": moved.mT}
    return [key for key, x in found.items() if not torch.equal(x, plain)]


def asked_for_state_before_the_first_step(layout: str) -> dict[str, list[str]]:
    """torch has it made by a step of zeros at lr = 0, which counts nowhere."""
    found = {}
    for name in OPTIMIZERS:
        net, optimizer = made(name, layout)
        get_optimizer_state_dict(net, optimizer)
        stepped(net, optimizer, range(STEPS), torch.float32)
        found[name] = different(net, alone(name))
    return found


def _checkpoint(net: Net, optimizer: Any) -> dict[str, Any]:
    return {
        "net": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer),
    }


def save_in_the_middle(layout: str, folder: str) -> None:
    """Between two refreshes."""
    for name in OPTIMIZERS:
        net, optimizer = made(name, layout)
        stepped(net, optimizer, range(HALF), torch.float32)
        dcp.save(_checkpoint(net, optimizer), checkpoint_id=f"{folder}/{name}")


def resume(
    layout: str, folder: str, names: Sequence[str] = tuple(OPTIMIZERS)
) -> dict[str, list[str]]:
    """Goes on with what another world has saved, from other weights and other state."""
    found = {}
    for name in names:
        net, optimizer = made(name, layout)
        stepped(net, optimizer, [50], torch.float32)
        target = _checkpoint(net, optimizer)
        dcp.load(target, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(net, target["net"])
        set_optimizer_state_dict(net, optimizer, target["optimizer"])
        stepped(net, optimizer, range(HALF, STEPS), torch.float32)
        found[name] = different(net, alone(name))
    return found


def save_while_training(folder: str) -> dict[str, list[str]]:
    """async_save writes the state as it was, whatever the steps do that are taken meanwhile."""
    net, optimizer = made("shampoo", "fsdp")
    stepped(net, optimizer, range(HALF), torch.float32)
    # It talks to the other ranks from a thread of its own, so over a group of its own.
    writing = dcp.async_save(
        _checkpoint(net, optimizer),
        checkpoint_id=f"{folder}/shampoo",
        process_group=dist.new_group(backend="gloo"),
    )
    stepped(net, optimizer, range(HALF, STEPS), torch.float32)
    writing.result()
    return {"shampoo": different(net, alone("shampoo"))}


def _set_weights(net: Net, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, param in net.named_parameters():
            value = values[name]
            if isinstance(param, DTensor):
                value = distribute_tensor(
                    value, param.device_mesh, param.placements, src_data_rank=None
                ).to_local()
            local(param).copy_(value)


def there_and_back(layout: str) -> dict[str, Any]:
    """One process, then ranks, then one process, by ordinary state dicts."""
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        one = Net(weights(torch.float32))
        reference = OPTIMIZERS[name](one.named_parameters())
        stepped(one, reference, range(2), torch.float32)
        net, optimizer = made(name, layout)
        _set_weights(net, {key: x.detach() for key, x in one.named_parameters()})
        optimizer.load_state_dict(reference.state_dict())
        stepped(net, optimizer, range(2, HALF), torch.float32)
        of_all = optimizer.consolidate(None)
        of_last = optimizer.consolidate(dist.get_world_size() - 1)
        again = Net({key: full(x) for key, x in net.named_parameters()})
        reference = OPTIMIZERS[name](again.named_parameters())
        reference.load_state_dict(of_all)
        stepped(again, reference, range(HALF, STEPS), torch.float32)
        last = dist.get_rank() == dist.get_world_size() - 1
        assert (of_last is not None) == last
        if last:
            assert_same(of_last, of_all)
        found[name] = different(again, alone(name))
    return found


def parts_are_a_rank_s_own(layout: str, folder: str) -> list[str]:
    """What one rank saves with torch.save is refused by the others."""
    net, optimizer = made("muon", layout)
    stepped(net, optimizer, range(2), torch.float32)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    if dist.get_rank() == 0:
        torch.save(state, f"{folder}/rank0.pt")
    dist.barrier()
    try:
        optimizer.load_state_dict(torch.load(f"{folder}/rank0.pt", weights_only=False))
    except ValueError as error:
        return [str(error)]
    return []


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


# Gradients.


def absent_everywhere(layout: str) -> dict[str, Any]:
    """Some parameters have no gradient in the first steps: as in one process, and nobody waits."""
    late = ("uneven", "conv", "bias")
    found = {}
    for name in OPTIMIZERS:
        net, optimizer = made(name, layout)
        one = Net(weights(torch.float32))
        reference = OPTIMIZERS[name](one.named_parameters())
        for step in range(4):
            for each, stepping in ((net, optimizer), (one, reference)):
                give(each, gradients(step, torch.float32), late if step < 2 else ())
                stepping.step()
        expected = {key: param.detach() for key, param in one.named_parameters()}
        found[name] = different(net, expected), optimizer.skipped
    return found


def absent_on_one_rank(layout: str) -> tuple[str, list[str], list[str]]:
    """Raises on all ranks before anything is written, and the next step goes on."""
    net, optimizer = made("muon", layout)
    give(net, gradients(0, torch.float32), ("tall",) if dist.get_rank() == 1 else ())
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


def not_finite(layout: str, nonfinite: str) -> dict[str, Any]:
    """NaN in one element, which one rank has: as in one process."""
    found: dict[str, Any] = {}
    for name in ("muon", "shampoo", "soap", "deva"):
        net, optimizer = made(name, layout)
        one = Net(weights(torch.float32))
        reference = OPTIMIZERS[name](one.named_parameters())
        for step in range(3):
            grads = gradients(step, torch.float32)
            if step == 1:
                for key in ("uneven", "bias"):
                    grads[key].view(-1)[-1] = torch.nan
            for each, stepping in ((net, optimizer), (one, reference)):
                for group in stepping.param_groups:
                    group["nonfinite"] = nonfinite
                give(each, grads)
                try:
                    stepping.step()
                except ValueError as error:
                    found.setdefault("messages", set()).add(str(error).partition(" (on rank")[0])
        of_all = optimizer.skipped
        counts = [None] * dist.get_world_size()
        dist.all_gather_object(counts, of_all)
        expected = {key: param.detach() for key, param in one.named_parameters()}
        same = [
            key
            for key, param in net.named_parameters()
            if not torch.equal(full(param).nan_to_num(7.5), expected[key].nan_to_num(7.5))
        ]
        found[name] = same, counts, reference.skipped
    return found


# Trainings.


def _classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 18), nn.Tanh(), nn.Linear(18, 10), nn.Tanh(), nn.Linear(10, 4)
    )


def _loss(net: nn.Module, step: int, part: slice) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float32)[part]
    return net(x).square().mean()


def trained(kind: str, name: str) -> tuple[list[str], list[int]]:
    """Two ranks with the same batches: forward, backward, clipping; as in one process."""
    net: nn.Module = _classifier()
    one = _classifier()
    more: dict[str, Any] = {}
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
        more["distributed"] = net.process_group
    elif kind == "replicate":
        replicate(net, mesh=_mesh())
    else:
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=_mesh())
        fully_shard(net, mesh=_mesh())
    optimizer = OPTIMIZERS[name](net.named_parameters(), **more)
    reference = OPTIMIZERS[name](one.named_parameters())
    schedules = [
        torch.optim.lr_scheduler.StepLR(each, 2, gamma=0.5) for each in (optimizer, reference)
    ]
    for step in range(4):
        for each, stepping, schedule in zip(
            (net, one), (optimizer, reference), schedules, strict=True
        ):
            for half in (slice(0, 4), slice(4, 8)):
                _loss(each, step, half).backward()
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


# What is done and moved.


def work_done(layout: str, wire: torch.dtype | None = None) -> dict[str, Any]:
    """The second step's calls of the operator, bytes and collectives; full_tensor raises."""
    net, optimizer = made("muon", layout, wire=wire)
    stepped(net, optimizer, range(1), torch.float32)
    give(net, gradients(0, torch.float32))
    entries: list[int] = []
    sent: list[int] = []
    real_run, real_all, real_gather = (
        _dispatch.run,
        dist.all_to_all_single,
        exchange_module._all_gather(),
    )

    def run(operator: str, like: Any, out: Any, params: Sequence[Tensor], *args: Any, **more: Any):
        entries.append(len(params))
        return real_run(operator, like, out, params, *args, **more)

    def exchange(received: Tensor, packed: Tensor, into: Any, out: list[int], **more: Any) -> Any:
        me = dist.get_rank()
        sent.append(packed.element_size() * (sum(out) - out[me]))
        return real_all(received, packed, into, out, **more)

    def gather(received: Tensor, packed: Tensor, **more: Any) -> Any:
        sent.append(packed.element_size() * packed.numel() * (dist.get_world_size() - 1))
        return real_gather(received, packed, **more)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("full_tensor")

    with ExitStack() as stack:
        for target, attribute, value in (
            (_dispatch, "run", run),
            (dist, "all_to_all_single", exchange),
            (exchange_module, "_all_gather", lambda: gather),
            (DTensor, "full_tensor", never),
        ):
            stack.enter_context(mock.patch.object(target, attribute, value))
        counted = stack.enter_context(CommDebugMode())
        optimizer.step()
    table = optimizer.plan()
    return {
        "entries": sum(entries),
        "sent": sum(sent),
        "planned": sum(row.bytes for row in table.rows),
        "buckets": len({row.bucket for row in table.rows if row.bucket is not None}),
        "loads": table.loads,
        "collectives": counted.get_total_counts(),
        "state": optimizer.memory_estimate(),
        "text": str(table),
    }


def whole_state() -> int:
    net = Net(weights(torch.float32))
    return OPTIMIZERS["muon"](net.named_parameters()).memory_estimate()


def owners_by_name(order: int) -> dict[str, Any]:
    """Owners do not depend on the order of parameters."""
    net = Net(weights(torch.float32))
    fsdp(net)
    named = sorted(net.named_parameters(), key=lambda pair: hash((pair[0][order:], order)))
    named = list(reversed(named)) if order else named
    optimizer = OPTIMIZERS["soap"](named)
    return {row.name: row.owner for row in optimizer.plan().rows}


# Failures.


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


# Refusals.


def refused(what: str) -> tuple[str, str]:
    """The exception of a constructor."""
    net = Net(weights(torch.float32))
    mesh = _mesh()
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
            return _raised(lambda: OPTIMIZERS["muon"]([("moved", nn.Parameter(part))]))
    elif what == "flat":
        flat = nn.Parameter(torch.ones(16))
        flat._is_flat_param = True
        members = [("flat", flat)]
    elif what == "not a group":
        more["distributed"] = 4
    elif what == "wire":
        return _raised(lambda: sk.optim.Distributed(wire=torch.float16))
    elif what == "other wire":
        fsdp(net)
        wire = torch.bfloat16 if rank == 1 else None
        more["distributed"] = sk.optim.Distributed(wire=wire)
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
    return _raised(lambda: OPTIMIZERS["muon"](members or net.named_parameters(), **more))


def _raised(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def other_state_on_one_rank() -> tuple[str, list[str]]:
    """Loading raises on all ranks where one was given something else; nothing is changed."""
    net, optimizer = made("soap", "fsdp")
    stepped(net, optimizer, range(2), torch.float32)
    state = optimizer.consolidate(None)
    if dist.get_rank() == 1:
        state["state"] = {}
    message = ""
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        message = str(error)
    stepped(net, optimizer, range(2, STEPS), torch.float32)
    return message, different(net, alone("soap"))


def state_that_does_not_fit() -> tuple[str, str, list[str]]:
    """An owner alone sees that a factor has the wrong shape; all raise, nothing is changed."""
    net, optimizer = made("soap", "fsdp")
    stepped(net, optimizer, range(2), torch.float32)
    state = optimizer.consolidate(None)
    state["state"][1]["left"] = torch.zeros(5, 5)
    kind = message = ""
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        kind, message = type(error).__name__, str(error)
    stepped(net, optimizer, range(2, STEPS), torch.float32)
    return kind, message, different(net, alone("soap"))


def added_later() -> list[str]:
    """A group that is added after some steps."""
    net = Net(weights(torch.float32))
    fsdp(net)
    one = Net(weights(torch.float32))
    pairs = []
    for each in (net, one):
        named = list(each.named_parameters())
        pairs.append((each, OPTIMIZERS["shampoo"](named[:3]), named[3:]))
    for step in range(4):
        for each, optimizer, rest in pairs:
            if step == 2:
                optimizer.add_param_group({"params": rest})
            give(each, gradients(step, torch.float32))
            optimizer.step()
    return different(net, {key: param.detach() for key, param in one.named_parameters()})


def experts(how: str) -> tuple[list[str], list[Any]]:
    """Batches of matrices that ranks have whole: no exchange; cut ones have owners."""
    # Fewer than ranks, so that one has none.
    count = {"whole": 5, "few": 2, "cut": 2}[how]
    whole = {"experts": torch.randn(count, 9, 6, generator=torch.Generator().manual_seed(3))}
    found = []
    one_side = partial(sk.optim.SOAP, lr=0.01, max_precond_dim=8, precondition_frequency=2)
    no_graft = partial(sk.optim.Shampoo, lr=0.01, block_size=4, graft="none", sides="right")
    more = {"soap_one_side": one_side, "shampoo_no_graft": no_graft}
    for name, make in {**OPTIMIZERS, **more}.items():
        net, one = Net(whole), Net(whole)
        mesh = _mesh()
        _placed(net, lambda x, mesh=mesh: (mesh, [Shard(1 if how == "cut" else 0)]))
        optimizer, reference = (
            make([{"params": [each.experts], "batched": True}]) for each in (net, one)
        )
        for step in range(4):
            grad = torch.randn(count, 9, 6, generator=torch.Generator().manual_seed(step))
            give(net, {"experts": grad})
            give(one, {"experts": grad})
            optimizer.step()
            reference.step()
            if step == 1:
                state = optimizer.state_dict()
                assert_same(optimizer.consolidate(None)["state"], reference.state_dict()["state"])
                optimizer.load_state_dict(state)
                optimizer.load_state_dict(reference.state_dict())
        found += [name for _ in different(net, {"experts": one.experts.detach()})]
        rows = optimizer.plan().rows
    return found, [row.owner for row in rows]


def copied() -> tuple[str, str]:
    return _raised(lambda: copy.deepcopy(made("muon", "fsdp")[1]))


def watched() -> list[str]:
    """The matrices that a rank has figures of."""
    net, optimizer = made("shampoo", "fsdp")
    optimizer.watch()
    stepped(net, optimizer, range(2), torch.float32)
    assert different(net, alone("shampoo", steps=2)) == []
    found = optimizer.diagnostics().parameters
    return [name for name, figures in found.items() if figures.algorithm == "matrix"]


def benchmarked() -> tuple[Any, Any]:
    """What the benchmark measures of small matrices, uneven ones among them."""
    from spectral_kernels.benchmarks.distributed_ranks import Campaign, measured

    shapes = ((16, 24), (7, 5), (24, 16), (3, 8), (10, 10))
    campaign = Campaign(shapes, ("muon",), budget=1e-3, most=1 << 12)
    return campaign, measured(campaign)


# What hypothesis draws.


def drawn(
    name: str,
    mesh_shape: tuple[int, ...],
    drawn_params: Sequence[tuple[tuple[int, ...], tuple[int | None, ...]]],
    bucket_bytes: int,
) -> list[str]:
    """Any shapes in any placements on any mesh, through a state dict in the middle."""
    names = ("rows", "columns")[: len(mesh_shape)]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    shapes = {f"p{i}": shape for i, (shape, _) in enumerate(drawn_params)}
    net, one = (Net(weights(torch.float32, shapes)) for _ in range(2))
    for (param_name, param), (_, dims) in zip(
        list(net.named_parameters()), drawn_params, strict=True
    ):
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        shared = distribute_tensor(param.detach(), mesh, placements)
        net.register_parameter(param_name, nn.Parameter(shared))
    how = sk.optim.Distributed(bucket_bytes=bucket_bytes)
    make = OPTIMIZERS[name]
    optimizer = make(net.named_parameters(), distributed=how)
    reference = make(one.named_parameters())
    for step in range(3):
        for each, stepping in ((net, optimizer), (one, reference)):
            give(each, gradients(step, torch.float32, shapes))
            stepping.step()
        if step == 1:
            state = optimizer.state_dict()
            optimizer = make(net.named_parameters(), distributed=how)
            optimizer.load_state_dict(state)
    assert_same(optimizer.consolidate(None)["state"], reference.state_dict()["state"])
    return different(net, {key: param.detach() for key, param in one.named_parameters()})


def placed_as_dtensor_does(
    mesh_shape: tuple[int, ...],
    shape: tuple[int, ...],
    cuts: Sequence[tuple[int, int] | None],
) -> bool:
    """A rank's region against the indices that DTensor gives it, in its strided way too."""
    mesh = init_device_mesh("cpu", mesh_shape)
    placements = [
        Replicate()
        if cut is None
        else Shard(cut[0])
        if cut[1] == 1
        else _StridedShard(cut[0], split_factor=cut[1])
        for cut in cuts
    ]
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    placed = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local()
    grid = Grid.of(mesh, list(range(dist.get_world_size())))
    region = grid.regions(shape, placements)[dist.get_rank()]
    whole = torch.full(shape, -1)
    region.fill(whole, placed)
    written = whole >= 0
    return bool(
        torch.equal(region.cut(numbers), placed)
        and torch.equal(whole[written], numbers[written])
        and int(written.sum()) == region.numel
    )


def soak(steps: int) -> tuple[int, list[str]]:
    """Many steps: memory does not grow, and the bits are still those of one process."""
    net, optimizer = made("soap", "fsdp")
    one = Net(weights(torch.float32))
    reference = OPTIMIZERS["soap"](one.named_parameters())
    sizes = []
    for step in range(steps):
        for each, stepping in ((net, optimizer), (one, reference)):
            give(each, gradients(step, torch.float32))
            stepping.step()
        if step in (steps // 2, steps - 1):
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))
    return sizes[1] - sizes[0], different(
        net, {key: param.detach() for key, param in one.named_parameters()}
    )

"""What is compared with one process bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import spectral_kernels as sk
import torch
import torch.distributed as dist
from spectral_kernels.optim._distributed import transport
from spectral_kernels.optim._distributed.layout import Grid
from support.states import assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from ranks.layouts import fsdp, full, mesh_of, mesh_of_all, place
from ranks.nets import Net, give, gradients, set_weights, weights
from ranks.runs import ALL, FEW, OPTIMIZERS, STEPS, alone, different, made, stepped


def equal_to_one_process(
    layout: str,
    dtype: torch.dtype,
    how: Mapping[str, Any] = MappingProxyType({}),
    names: Sequence[str] = tuple(OPTIMIZERS),
) -> dict[str, list[str]]:
    found = {}
    for name in names:
        net, optimizer = made(name, layout, dtype, **how)
        stepped(net, optimizer, range(STEPS), dtype)
        found[name] = different(net, alone(name, dtype))
    return found


def by_collectives(layout: str) -> tuple[dict[str, list[str]], int]:
    """What differs from one process where collectives are used, as on cards, and how many were."""
    calls = 0

    def counted(real: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*args, **more)

        return call

    gather = transport._all_gather()
    with (
        mock.patch.object(transport, "Messages", transport.Collectives),
        mock.patch.object(transport, "_all_gather", lambda: counted(gather)),
        mock.patch.object(dist, "all_to_all_single", counted(dist.all_to_all_single)),
        mock.patch.object(dist, "isend", side_effect=AssertionError("a message")),
    ):
        return equal_to_one_process(layout, torch.float32, names=FEW), calls


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
        after = weights(dtype)
        for step in range(STEPS):
            before = after
            set_weights(one, before)
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
            after = {key: full(param).clone() for key, param in net.named_parameters()}
            for key, now in after.items():
                expected = getattr(one, key).detach()
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
        dist.all_gather_object(bits, after)
        differs += [key for key, x in bits[0].items() if any(not x.equal(b[key]) for b in bits)]
    return worst, left_alone, differs


def forms_on_a_narrow_wire() -> list[str]:
    """Blocks, batches and matrices that are no views: the same update as of a plain matrix."""
    start = weights(torch.float32, {"plain": (6, 20)})["plain"]
    tensors = {"plain": start, "batch": torch.stack([start, -start]), "moved": start.mT}
    net = Net({key: tensor.contiguous() for key, tensor in tensors.items()})
    mesh = mesh_of_all()
    place(net, lambda x: (mesh, [Shard(x.ndim - 1)]))
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
        mesh = mesh_of_all()
        place(net, lambda x, mesh=mesh: (mesh, [Shard(1 if how == "cut" else 0)]))
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


def drawn(
    name: str,
    mesh_shape: tuple[int, ...],
    drawn_params: Sequence[tuple[tuple[int, ...], tuple[int | None, ...]]],
    how: dict[str, Any],
    dtype: torch.dtype,
    small: int,
) -> list[str]:
    """Any shapes in any placements on any mesh, through a state dict in the middle.

    Parts of at least `small` bytes travel by themselves.
    """
    names = ("rows", "columns", "more")[: len(mesh_shape)]
    mesh = mesh_of(mesh_shape, *names)
    shapes = {f"p{i}": shape for i, (shape, _) in enumerate(drawn_params)}
    net, one = (Net(weights(dtype, shapes)) for _ in range(2))
    for (param_name, param), (_, dims) in zip(
        list(net.named_parameters()), drawn_params, strict=True
    ):
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        shared = distribute_tensor(param.detach(), mesh, placements)
        net.register_parameter(param_name, nn.Parameter(shared))
    make = ALL[name]
    optimizer = make(net.named_parameters(), distributed=sk.optim.Distributed(**how))
    reference = make(one.named_parameters())
    with mock.patch.object(transport, "_SMALL", small):
        for step in range(3):
            for each, stepping in ((net, optimizer), (one, reference)):
                give(each, gradients(step, dtype, shapes))
                stepping.step()
            if step == 1:
                state = optimizer.state_dict()
                how_again = sk.optim.Distributed(**how)
                optimizer = make(net.named_parameters(), distributed=how_again)
                optimizer.load_state_dict(state)
        assert_same(optimizer.consolidate(None)["state"], reference.state_dict()["state"])
    return different(net, {key: param.detach() for key, param in one.named_parameters()})


def placed_as_dtensor_does(
    mesh_shape: tuple[int, ...],
    shape: tuple[int, ...],
    cuts: Sequence[tuple[int, int] | None],
) -> bool:
    """A rank's region against the indices that DTensor gives it, in its strided way too."""
    mesh = mesh_of(mesh_shape)
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

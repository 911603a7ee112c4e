"""What is done, moved and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from spectral_kernels import _dispatch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from ranks.layouts import fsdp
from ranks.nets import Net, give, gradients, weights
from ranks.runs import OPTIMIZERS, alone, different, made, stepped


def work_done(layout: str, how: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The second step's calls of the operator, bytes and collectives; full_tensor raises."""
    net, optimizer = made("muon", layout, **how)
    stepped(net, optimizer, range(1), torch.float32)
    give(net, gradients(0, torch.float32))
    entries: list[int] = []
    sent: list[int] = []
    of_group: list[int] = []
    real_run, real_message = _dispatch.run, dist.isend

    def run(operator: str, like: Any, out: Any, params: Sequence[Tensor], *args: Any, **more: Any):
        entries.append(len(params))
        return real_run(operator, like, out, params, *args, **more)

    def message(part: Tensor, **more: Any) -> Any:
        assert more["group_dst"] != dist.get_rank(more["group"])
        of_group.append(dist.get_world_size(more["group"]))
        sent.append(part.element_size() * part.numel())
        return real_message(part, **more)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("full_tensor")

    with ExitStack() as stack:
        for target, attribute, value in (
            (_dispatch, "run", run),
            (dist, "isend", message),
            (DTensor, "full_tensor", never),
        ):
            stack.enter_context(mock.patch.object(target, attribute, value))
        counted = stack.enter_context(CommDebugMode())
        optimizer.step()
    table = optimizer.plan()
    return {
        "entries": sum(entries),
        "sent": sum(sent),
        "messages": len(sent),
        "of_group": max(of_group, default=0),
        "bytes": {row.name: row.bytes for row in table.rows},
        "costs": {row.name: row.flops for row in table.rows},
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
    # Without turns, which are by place.
    optimizer = OPTIMIZERS["soap"](named, stagger=False)
    return {row.name: row.owner for row in optimizer.plan().rows}


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
    campaign = Campaign({"muon": shapes}, budget=1e-3, most=1 << 12)
    return campaign, measured(campaign)


def groups_of_another() -> tuple[int, bool]:
    """How many process groups a second optimizer of the same mesh makes, and whether both step."""
    first = made("muon", "stages")
    known = dist.distributed_c10d._world.pg_map
    before = len(known)
    second = made("muon", "stages")
    more = len(known) - before
    for step in range(2):
        for each in (first, second):
            stepped(*each, range(step, step + 1), torch.float32)
    expected = alone("muon", steps=2)
    return more, different(first[0], expected) == different(second[0], expected) == []

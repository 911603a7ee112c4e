"""Optimizers over ranks and in one process, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import spectral_kernels as sk
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranks.layouts import CHAINS, GRIDS, LAYOUTS, local, part_of
from ranks.nets import Net, give, gradients, weights

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "muon": partial(sk.optim.Muon, lr=0.02),
    "shampoo": partial(sk.optim.Shampoo, lr=0.01, block_size=16, precondition_frequency=3),
    "soap": partial(sk.optim.SOAP, lr=0.01, precondition_frequency=3, stagger=True),
    "deva": partial(sk.optim.DeVA, lr=0.05, precondition_frequency=3),
    "deva_low_memory": partial(sk.optim.DeVA, lr=0.05, variant="low_memory"),
}


def _in_parts(named: Iterable[tuple[str, Tensor]], **more: Any) -> Any:
    """Muon of matrices that are several, equal ones or not."""
    parts = {"even": 4, "uneven": (5, 13), "tall": 3}
    by_split: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, param in named:
        by_split.setdefault(parts.get(name), []).append((name, param))
    groups = [{"params": each, "split": split} for split, each in by_split.items()]
    return sk.optim.Muon(groups, lr=0.02, **more)


_NARROW = {"state_dtype": torch.bfloat16}
# Settings whose state or step has another form, for some tests.
FORMS: dict[str, Callable[..., Any]] = {
    "muon_sphere": partial(sk.optim.Muon, lr=0.02, hyperball=True, beta2=0.9, **_NARROW),
    "muon_narrow": partial(sk.optim.Muon, lr=0.02, **_NARROW),
    "normuon_cautious": partial(
        sk.optim.Muon, lr=0.02, beta2=0.95, weight_decay=0.5, cautious_weight_decay=True
    ),
    "muon_in_parts": _in_parts,
    "shampoo_narrow": partial(OPTIMIZERS["shampoo"], **_NARROW),
    "soap_narrow": partial(OPTIMIZERS["soap"], **_NARROW),
    "deva_narrow": partial(OPTIMIZERS["deva"], **_NARROW),
}
ALL = OPTIMIZERS | FORMS

# For tests of ways that are the same whatever is stepped.
FEW = ("muon", "shampoo")

# A run, and where it is interrupted, between two refreshes.
STEPS, HALF = 5, 3


def options(layout: str, **more: Any) -> dict[str, Any]:
    """What a constructor is told; nothing of ranks for "alone"."""
    if layout == "alone":
        return {}
    group = dist.group.WORLD if layout == "ddp" else None
    return {"distributed": sk.optim.Distributed(group, **more)}


def made(
    name: str, layout: str, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[Net, Any]:
    net = Net(weights(dtype))
    if layout != "alone":
        {**LAYOUTS, **GRIDS, **CHAINS}[layout](net)
    # Several buckets, so that two are in flight.
    how = options(layout, **{"bucket_bytes": 2500, **more})
    return net, ALL[name](net.named_parameters(), **how)


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


def different(net: nn.Module, expected: dict[str, Tensor]) -> list[str]:
    """Names of parameters of which this rank's part is not equal bit for bit."""
    return [
        name
        for name, mine in net.named_parameters()
        if not torch.equal(local(mine), part_of(mine, expected[name].detach()))
    ]


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""

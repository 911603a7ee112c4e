"""State that is saved, loaded and handed from one world to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.states import assert_same
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ranks.layouts import full
from ranks.nets import Net, set_weights, weights
from ranks.runs import ALL, HALF, OPTIMIZERS, STEPS, alone, different, made, stepped


def _checkpoint(net: Net, optimizer: Any) -> dict[str, Any]:
    return {
        "net": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer),
    }


def save_in_the_middle(layout: str, folder: str, names: Sequence[str]) -> None:
    """Between two refreshes."""
    for name in names:
        net, optimizer = made(name, layout)
        stepped(net, optimizer, range(HALF), torch.float32)
        dcp.save(_checkpoint(net, optimizer), checkpoint_id=f"{folder}/{name}")


def resume(layout: str, folder: str, names: Sequence[str]) -> dict[str, list[str]]:
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


def there_and_back(layout: str, names: Sequence[str] = tuple(OPTIMIZERS)) -> dict[str, Any]:
    """One process, then ranks, then one process, by ordinary state dicts."""
    found: dict[str, Any] = {}
    for name in names:
        one = Net(weights(torch.float32))
        reference = ALL[name](one.named_parameters())
        stepped(one, reference, range(2), torch.float32)
        net, optimizer = made(name, layout)
        set_weights(net, {key: x.detach() for key, x in one.named_parameters()})
        optimizer.load_state_dict(reference.state_dict())
        stepped(net, optimizer, range(2, HALF), torch.float32)
        of_all = optimizer.consolidate(None)
        of_last = optimizer.consolidate(dist.get_world_size() - 1)
        again = Net({key: full(x) for key, x in net.named_parameters()})
        reference = ALL[name](again.named_parameters())
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

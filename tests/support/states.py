"""What an optimizer holds: copies of it, and comparison bit by bit."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .optimizers import stepped, with_grads

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> ModuleType:
    """The program in tests/golden that writes files of that name."""
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists and dicts, in order."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def snapshot(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Any]:
    """Copies of all parameters and state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [param.detach().clone() for param in params], copy.deepcopy(optimizer.state_dict())


def assert_go_on_alike(
    one: tuple[torch.optim.Optimizer, list[nn.Parameter]],
    other: tuple[torch.optim.Optimizer, list[nn.Parameter]],
    seeds: Iterable[int],
) -> None:
    """Two optimizers with their own copies of the same parameters, after every step."""
    for seed in seeds:
        for optimizer, params in (one, other):
            with_grads(params, seed)
            optimizer.step()
        assert_same([p.detach().contiguous() for p in one[1]], [p.detach() for p in other[1]])


def assert_refused_when_written_later(
    param: nn.Parameter, field: str, value: Any, said: str
) -> torch.optim.Optimizer:
    """A value that Muon's group is given after a step is refused, and nothing moves."""
    optimizer = sk.optim.Muon([param], lr=0.1)
    stepped(optimizer, [param], 1)
    optimizer.param_groups[0][field] = value
    before = param.detach().clone()
    with_grads([param])
    with pytest.raises(ValueError, match=said):
        optimizer.step()
    assert torch.equal(param, before)
    return optimizer


def assert_resumes(
    one: tuple[torch.optim.Optimizer, nn.Parameter],
    other: Callable[[nn.Parameter], torch.optim.Optimizer],
    steps: int,
) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer of a copy of the parameter loads the state, and goes on alike; both are moved.

    Returns:
        The other optimizer and its parameter.
    """
    first, param = one
    copied = nn.Parameter(param.detach().clone())
    second = other(copied)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, each in ((first, param), (second, copied)):
        stepped(optimizer, [each], steps)
    assert torch.equal(param, copied)
    assert_same(first.state_dict()["state"], second.state_dict()["state"])
    return second, copied


def assert_same(one: Any, other: Any) -> None:
    """The same structure, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        one, other = one.detach(), other.detach()
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
        assert torch.equal(one.isnan(), other.isnan())
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other

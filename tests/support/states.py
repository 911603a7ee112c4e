"""What an optimizer holds: copies of it, and comparison bit by bit."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .optimizers import with_grads

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

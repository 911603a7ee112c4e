"""Which parameters, gradients and names an optimizer can work with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import _checks
from .._backend import check_writable
from . import _distributed
from ._groups import Group

_COMPLEX = (torch.complex128, torch.complex64)


def check_param(name: str, param: Any) -> None:
    """A parameter that an optimizer here can update."""
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(param).__name__}")
    if is_lazy(param):
        raise TypeError(f"{name} has no shape yet: run the lazy module once before")
    check_whole(name, param)
    param = _distributed.local_of(name, param)
    _checks.dense(name, param, dtypes=_COMPLEX if param.is_complex() else _checks.FLOATS)
    check_writable(name, param)


def check_whole(name: str, param: Tensor) -> None:
    """A parameter that no wrapper made a piece of a flat one."""
    if getattr(param, "_is_flat_param", False):
        wrapper = "FSDP1"
    elif getattr(param, "_fsdp_flattened", False):
        # It marks the original parameters so, whose shapes it changes to those of 1-D pieces.
        wrapper = "FSDP1 with use_orig_params=True"
    elif hasattr(param, "ds_id") or hasattr(param, "ds_tensor"):
        wrapper = "DeepSpeed's ZeRO"
    else:
        return
    raise TypeError(
        f"{name} is flattened or partitioned by a wrapper ({wrapper}), so its matrix is out of "
        "sight: use fully_shard (FSDP2) in its place, or DDP, which leaves parameters whole"
    )


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """A gradient that can be used, whatever made the quick look doubt it."""
    name = f"the gradient of {name}"
    _checks.dense(name, grad, dtypes=_COMPLEX if param.is_complex() else _checks.FLOATS)
    if grad.is_meta:
        raise TypeError(f"{name} is on the meta device")
    if grad.shape != param.shape:
        raise ValueError(
            f"{name} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}"
        )


def names_of(group: Group, members: Sequence[Any], where: str) -> list[str]:
    """The parameters' names, from pairs or from param_names; "" where there are none."""
    pairs = [member[0] for member in members if isinstance(member, tuple)]
    given = group.get("param_names")
    if given is None:
        return [member[0] if isinstance(member, tuple) else "" for member in members]
    if pairs:
        raise ValueError(f"{where} names its parameters twice: in pairs and by param_names")
    group["param_names"] = names = checked_names(given, len(members), where)
    return names


def checked_names(given: Any, count: int, where: str) -> list[str]:
    """One name for each of some parameters."""
    names = [] if isinstance(given, str) else list(given)
    if len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where}: param_names must be one str for each of {count} parameters, not {given!r}"
        )
    return names

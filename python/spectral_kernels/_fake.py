"""Shapes and dtypes of every operator's results, for torch.compile and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension
from ._backend import check_device
from ._operators import TABLE


def _gram(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2])


def _like(x: Tensor, *args: object, **options: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _in_place(name: str) -> Callable[..., None]:
    """Nothing but a look at the devices.

    A call of which one tensor is on the meta device comes here and not to a kernel. If that is not
    so of the others, it would return with nothing done.
    """

    def fake(*args: Any, **options: Any) -> None:
        schema = getattr(torch.ops.spectral_kernels, name).default._schema
        names = [argument.name for argument in schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **options}
        tensors = [
            (key if isinstance(value, Tensor) else f"{key}[{i}]", x)
            for key, value in given.items()
            if isinstance(value, Tensor | list | tuple)
            for i, x in enumerate([value] if isinstance(value, Tensor) else value)
            if isinstance(x, Tensor)
        ]
        if not given.get("params", tensors):
            return
        like = given["params"][0] if "params" in given else given["grad"]
        for key, x in tensors:
            allowed = key == "lr" and x.device.type == "cpu"
            if x.device != like.device and not allowed and x.numel():
                check_device(key, x, like)

    return fake


def _kron_precondition(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    rows = left.shape[-2] if left.numel() else grad.shape[-2]
    cols = right.shape[-1] if right.numel() else grad.shape[-1]
    return grad.new_empty(*grad.shape[:-2], rows, cols)


def _inverse_root(
    a: Tensor, p: int, **options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = a.shape[:-2]
    return (
        _like(a),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch),
        a.new_empty(batch),
    )


def _eigenbasis(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:-1]), _like(a)


def _refresh_eigenbasis(q: Tensor, a: Tensor, *, sort: bool) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:-1]), _like(q)


_RESULTS: dict[str, Callable[..., Any]] = {
    "gram": _gram,
    "newton_schulz": _like,
    "polar": _like,
    "kron_precondition": _kron_precondition,
    "inverse_root": _inverse_root,
    "eigenbasis": _eigenbasis,
    "refresh_eigenbasis": _refresh_eigenbasis,
}
FAKES: dict[str, Callable[..., Any]] = {
    name: _in_place(name) if operator.in_place else _RESULTS[name]
    for name, operator in TABLE.items()
}

if _extension.MODULE is not None:
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"spectral_kernels::{_name}", _fake)

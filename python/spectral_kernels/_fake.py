"""Shapes and dtypes of every operator's results, for torch.compile and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension
from ._backend import check_device
from ._operators import TABLE


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


FAKES: dict[str, Callable[..., Any]] = {
    name: _in_place(name) if operator.in_place else operator.result
    for name, operator in TABLE.items()
}

if _extension.MODULE is not None:
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"spectral_kernels::{_name}", _fake)

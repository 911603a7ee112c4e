"""What torch is told of every operator besides its kernels.

Shapes and dtypes of results, for torch.compile and meta tensors; and that there is no derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension
from ._backend import check_device
from ._native import any_requires_grad
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


def _without_derivative(name: str) -> Callable[..., Any]:
    """The operator's kernel under the key Autograd.

    A result that does not require grad would cut the graph without a word. _native.py goes past it
    where nothing requires grad.
    """
    operator = getattr(torch.ops.spectral_kernels, name).default

    def kernel(keys: Any, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad((*args, *options.values())):
            raise RuntimeError(
                f"spectral_kernels::{name} has no derivative, and an argument requires grad: "
                "detach it, or call under torch.no_grad()"
            )
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args, **options)

    return kernel


if _extension.MODULE is not None:
    # Unregistered when it is dropped.
    _LIBRARY = torch.library.Library("spectral_kernels", "IMPL")
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"spectral_kernels::{_name}", _fake)
        _LIBRARY.impl(_name, _without_derivative(_name), "Autograd", with_keyset=True)

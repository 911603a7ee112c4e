"""What the operators of this room ask of their lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from spectral_kernels import _backend
from spectral_kernels._backend import (
    check_device,
    check_list,
    check_writable,
    raise_if_nonfinite,
)
from torch import Tensor


def check_float32(name: str, x: Tensor) -> None:
    """What a state is kept in here."""
    if x.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, not {x.dtype}")


def check_state(name: str, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """A float32 state of the parameters' shapes."""
    check_list(name, state, len(params))
    for i, (x, param) in enumerate(zip(state, params, strict=True)):
        check_float32(f"{name}[{i}]", x)
        check_device(f"{name}[{i}]", x, param)
        if x.shape != param.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(x.shape)}, params[{i}] {tuple(param.shape)}"
            )
        check_writable(f"{name}[{i}]", x)


def check_momentum(name: str, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """A float32 state of the parameters' shapes, or bfloat16."""
    narrow = _backend.check_momentum(name, state, params)
    full = [i for i in range(len(params)) if i not in narrow]
    check_state(name, [state[i] for i in full], [params[i] for i in full])


def check_side(name: str, x: Tensor, like: Tensor, side: int) -> None:
    """A float32 factor over rows (side -2) or columns (-1) of a batch; size 0 where absent."""
    if not x.numel():
        return
    check_float32(name, x)
    check_device(name, x, like)
    expected = (*like.shape[:-2], like.shape[side], like.shape[side])
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, not {tuple(x.shape)}")


def check_number(name: str, value: float) -> None:
    """A finite number of at least 0."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, not {value}")


def raise_nonfinite(nonfinite: str, **lists: Sequence[Tensor]) -> None:
    """nonfinite="raise": before anything is written, at the price of waiting for the card."""
    if nonfinite == "raise":
        raise_if_nonfinite(**lists)

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


def check_state(name: str, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """A float32 state of the parameters' shapes."""
    check_list(name, state, len(params))
    for i, (x, param) in enumerate(zip(state, params, strict=True)):
        if x.dtype != torch.float32:
            raise TypeError(f"{name}[{i}] must be float32, not {x.dtype}")
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


def check_sides(
    params: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    left_partners: Sequence[Tensor],
    right_partners: Sequence[Tensor],
    partner: str,
) -> None:
    """Factors and, on the same sides, their partners: "roots" or "bases"; size 0 where absent."""
    for side, dim, factors, partners in (
        ("left", -2, lefts, left_partners),
        ("right", -1, rights, right_partners),
    ):
        for name, tensors in ((f"{side}s", factors), (f"{side}_{partner}", partners)):
            check_list(name, tensors, len(params))
            for i, (x, param) in enumerate(zip(tensors, params, strict=True)):
                expected = (*param.shape[:-2], param.shape[dim], param.shape[dim])
                if not x.numel():
                    continue
                if x.dtype != torch.float32:
                    raise TypeError(f"{name}[{i}] must be float32, not {x.dtype}")
                check_device(f"{name}[{i}]", x, param)
                if x.shape != expected:
                    raise ValueError(
                        f"{name}[{i}] must have shape {expected}, not {tuple(x.shape)}"
                    )
                check_writable(f"{name}[{i}]", x)
        for i, (factor, other) in enumerate(zip(factors, partners, strict=True)):
            if bool(factor.numel()) != bool(other.numel()):
                raise ValueError(
                    f"{side}s[{i}] has shape {tuple(factor.shape)}, "
                    f"{side}_{partner}[{i}] {tuple(other.shape)}"
                )


def check_number(name: str, value: float) -> None:
    """A finite number of at least 0."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, not {value}")


def raise_nonfinite(nonfinite: str, **lists: Sequence[Tensor]) -> None:
    """nonfinite="raise": before anything is written, at the price of waiting for the card."""
    if nonfinite == "raise":
        raise_if_nonfinite(**lists)

"""What the operators of this room ask of their lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from spectral_kernels._backend import check_device, raise_if_nonfinite
from spectral_kernels._step_checks import Backend
from torch import Tensor


def check_float32(name: str, x: Tensor) -> None:
    """What a state is kept in here."""
    if x.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, not {x.dtype}")


def check_side(name: str, x: Tensor, like: Tensor, side: int) -> None:
    """A float32 factor over rows (side -2) or columns (-1) of a batch; size 0 where absent."""
    if not x.numel():
        return
    check_float32(name, x)
    check_device(name, x, like)
    expected = (*like.shape[:-2], like.shape[side], like.shape[side])
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, not {tuple(x.shape)}")


def raise_nonfinite(nonfinite: str, **lists: Sequence[Tensor]) -> None:
    """nonfinite="raise": before anything is written, at the price of waiting for the card."""
    if nonfinite == "raise":
        raise_if_nonfinite(**lists)


TRITON = Backend(check_float32, check_side, raise_nonfinite, distinct=True)

"""Shapes and dtypes of every operator's results, for torch.compile and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension


def _gram(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2])


def _like(x: Tensor, *args: object, **options: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _nothing(*args: object, **options: object) -> None:
    return None


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


FAKES: dict[str, Callable[..., Any]] = {
    "gram": _gram,
    "newton_schulz": _like,
    "polar": _like,
    "muon_step_": _nothing,
    "kron_factors_update_": _nothing,
    "kron_precondition": _kron_precondition,
    "inverse_root": _inverse_root,
    "shampoo_step_": _nothing,
    "eigenbasis": _eigenbasis,
    "refresh_eigenbasis": _refresh_eigenbasis,
    "soap_step_": _nothing,
    "deva_step_": _nothing,
}

if _extension.MODULE is not None:
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"spectral_kernels::{_name}", _fake)

"""Every operator: the table that backends, fakes and dispatch are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._options import (
    BasisLists,
    DevaOptions,
    MuonLists,
    MuonOptions,
    Options,
    ShampooLists,
    ShampooOptions,
    SoapOptions,
)


def _like(x: Tensor, *args: object, **options: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gram(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2])


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


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        family: the file that holds it in every folder, and the public function of its name.
        result: empty tensors of the shapes and dtypes of what a function returns.
        cuda: whether it is written in CUDA C++ too.
        options: of a list step, what it takes beside its lists.
        lists: of a list step, its tensors in their order.
        home: the module of a backend in Python, where that is not the family's.
        in_place: whether it writes its arguments and returns nothing.
        moments: of a list step, the places of the lists that may be in bfloat16 beside other state.
    """

    family: str
    result: Callable[..., Any] = _like
    cuda: bool = True
    options: type[Options] | None = None
    lists: type[MuonLists] | type[ShampooLists] | type[BasisLists] | None = None
    home: str = ""
    in_place: bool = False
    moments: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """The module that holds it in a backend written in Python."""
        return self.home or self.family

    @property
    def states(self) -> tuple[str, ...]:
        """Of a list step, the lists that hold state: those between gradients and step counts."""
        names: tuple[str, ...] = self.lists._fields if self.lists is not None else ()
        return names[2:-3]


_MOMENTS = ("momentum_buffers", "graft_squares", "exp_avgs", "exp_avg_sqs")


def _step(
    family: str,
    lists: type[MuonLists] | type[ShampooLists] | type[BasisLists],
    options: type[Options],
    home: str = "",
    *,
    cuda: bool = True,
) -> Operator:
    moments = tuple(i for i, name in enumerate(lists._fields) if name in _MOMENTS)
    return Operator(
        family,
        options=options,
        lists=lists,
        home=home,
        cuda=cuda,
        in_place=True,
        moments=moments,
    )


TABLE = {
    "gram": Operator("symmetric_matmul", _gram),
    "newton_schulz": Operator("newton_schulz"),
    "polar": Operator("newton_schulz", cuda=False),
    "muon_step_": _step("newton_schulz", MuonLists, MuonOptions),
    "kron_factors_update_": Operator("kron_factor", in_place=True),
    "kron_precondition": Operator("kron_factor", _kron_precondition),
    "inverse_root": Operator("inverse_root", _inverse_root),
    "shampoo_step_": _step(
        "inverse_root", ShampooLists, ShampooOptions, "inverse_root_step", cuda=False
    ),
    "eigenbasis": Operator("eigenbasis", _eigenbasis),
    "refresh_eigenbasis": Operator("eigenbasis", _refresh_eigenbasis),
    "soap_step_": _step("eigenbasis", BasisLists, SoapOptions),
    "deva_step_": _step("deva", BasisLists, DevaOptions),
}
FAMILIES = tuple(dict.fromkeys(operator.family for operator in TABLE.values()))

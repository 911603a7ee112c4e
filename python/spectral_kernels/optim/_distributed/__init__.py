"""Matrices whole at one owner, on the process groups and device meshes of torch.distributed.

Nothing here is loaded, but for what says whether it is needed, by an optimizer of plain parameters.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .config import Distributed, config
from .table import Row, Table

if TYPE_CHECKING:
    from .._base import MatrixOptimizer
    from .step import Spread

__all__ = [
    "Distributed",
    "Row",
    "Table",
    "config",
    "is_dtensor",
    "local_of",
    "spread_of",
    "table_of",
]


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor, without loading what DTensors need where there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local_of(name: str, x: Tensor) -> Tensor:
    """The plain tensor that holds this rank's part of x, which is x itself if it is no DTensor.

    Raises:
        TypeError, ValueError: a DTensor that no optimizer here can update.
    """
    if not is_dtensor(x):
        return x
    from .layout import checked_local

    return checked_local(name, x)


def spread_of(optimizer: MatrixOptimizer, given: Distributed | None) -> Spread | None:
    """What spreads an optimizer over ranks; None where nothing asks for it."""
    groups = optimizer.param_groups
    by_group = given is not None and given.group is not None
    if not by_group and not any(is_dtensor(x) for group in groups for x in group["params"]):
        return None
    from .step import Spread

    return Spread(optimizer, Distributed() if given is None else given)


def table_of(optimizer: Any, spread: Spread | None) -> Table:
    """Which rank does what in an optimizer."""
    if spread is not None:
        return spread.table()
    rows = []
    for index, group in enumerate(optimizer.param_groups):
        routes = optimizer._routes_of(index, group)
        for position, (param, is_matrix) in enumerate(zip(group["params"], routes, strict=True)):
            how = "matrix, whole on every rank" if is_matrix else "adamw"
            rows.append(Row(optimizer._name(index, position), tuple(param.shape), how))
    return Table(1, tuple(rows))

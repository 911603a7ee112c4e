"""The base of the optimizers: layers for groups, plans, the step and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _checks
from . import _distributed, _rules
from ._checkpoint import STATE_VERSION, Checkpointed
from ._groups import Values
from ._state import as_blocks

__all__ = ["STATE_VERSION", "MatrixOptimizer", "Params"]

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_WARNED = ("_warned", "_warned_of_skip", "_warned_of_names")


class MatrixOptimizer(Checkpointed):
    """Base of the optimizers: matrices by one list operator, everything else by AdamW.

    A subclass names its operator and hyper-parameters, lays out the state of a parameter, and turns
    values into the operator's options.
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        adamw: Values | None,
        distributed: Any = None,
    ) -> None:
        self._built = False
        self._how = _distributed.config(distributed)
        given = dict(adamw or {})
        for name in given:
            _checks.choice("a key of adamw", name, tuple(_rules.ADAMW))
        self._adamw = _rules.check(given, {name: _rules.ADAMW[name] for name in given}, "adamw: ")
        self._skipped: dict[torch.device, Tensor] = {}
        self._warned = False
        self._warned_of_skip = False
        # Whether a graph holds a step, so that counts may rise unseen by the host.
        self._recorded = False
        self._warned_of_names = False
        self._routes: dict[int, tuple[list[Tensor], list[bool]]] = {}
        self._forget()
        values = self._check_matrix_values({"batched": False, "matrix_dims": None, **defaults})
        self._unwritten = {
            name: values[name]
            for name in self._shared
            if isinstance(defaults[name], _rules.Unwritten)
        }
        super().__init__(params, values)
        self._built = True
        self._warn_of_names()
        self._join_ranks()

    def _join_ranks(self) -> None:
        """Says to the other ranks, where there are any, what this one holds, and who owns it."""
        if self._spread is None:
            self._spread = _distributed.spread_of(self, self._how)
        if self._spread is not None:
            self._spread.extend()

    def plan(self) -> _distributed.Table:
        """Which rank does what: one row a parameter, which print as a table."""
        return _distributed.table_of(self, self._spread)

    def __getstate__(self) -> dict[str, Any]:
        if self._spread is not None:
            raise TypeError(
                f"a {type(self).__name__} that is spread over ranks cannot be copied or pickled: "
                "save its state_dict(), or consolidate() for one process"
            )
        names = ("_adamw", "_unwritten", "_skipped", "_built", "_recorded", *_WARNED)
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a version that had none
            if group["algorithm"] != "adamw":
                group.setdefault("state_dtype", None)
        for each in self.state.values():
            each.update({key: as_blocks(x) for key, x in each.items() if isinstance(x, list)})
        if "param_groups" in state:
            self._routes = {}
        self._forget()

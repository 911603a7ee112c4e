"""What a subclass says about its rule, and what every layer of an optimizer keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import _diagnostics, _distributed, _groups, _rules
from ._forms import Form, Layout, Slot, form_of
from ._groups import Values
from ._schedule import Counts
from ._state import as_matrices
from ._work import Current, Part, Plan


class Declared(_diagnostics.Watched, Optimizer):
    """A rule for matrices: its operator, its hyper-parameters, and the state that it keeps."""

    _operator: ClassVar[str]
    _own_rules: ClassVar[Mapping[str, _rules.Rule]] = {}
    # Values that decide the shapes of entries and state.
    _structure: ClassVar[tuple[str, ...]] = ()
    # Values of the matrix rule that mean the same to AdamW, besides lr, maximize and nonfinite.
    _shared: ClassVar[tuple[str, ...]] = ("weight_decay",)
    # A key of groups that other code of this kind says the algorithm by.
    _flag: ClassVar[str | None] = None
    # Steps so far in which nothing had a gradient; None once something had one. A copy starts anew.
    _idle: int | None = 0
    # Of copies, and of optimizers that an earlier version pickled.
    _built = True
    _recorded = False
    _how: _distributed.Distributed | None = None
    _warned_of_names = False
    _matrix_rules: ClassVar[Mapping[str, _rules.Rule]]
    _names: ClassVar[Mapping[str, tuple[str, ...]]]
    _spread: _distributed.Spread | None = None
    # Of the constructor: AdamW's own values, and values of `_shared` that nobody wrote.
    _adamw: dict[str, Any]
    _unwritten: dict[str, Any]
    # Skipped matrices and AdamW's tensors.
    _skipped: dict[torch.device, Tensor]
    _warned: bool
    _warned_of_skip: bool
    # For every group its parameters, and whether each takes the matrix rule.
    _routes: dict[int, tuple[list[Tensor], list[bool]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._matrix_rules = {**_rules.MATRIX, **cls._own_rules}
        both = (*cls._matrix_rules, *_rules.ADAMW, *_groups.ONLY_AUTO)
        cls._names = {
            "matrix": tuple(cls._matrix_rules),
            "adamw": tuple(_rules.ADAMW_GROUP),
            "auto": tuple(dict.fromkeys(both)),
        }

    def _layout(self, form: Form, values: Values) -> Layout:
        """The state of a parameter: step, and the others in the operator's order."""
        raise NotImplementedError

    def _options(self, values: Values, part: Part) -> dict[str, Any]:
        """The operator's options, as long as the values stay."""
        raise NotImplementedError

    def _check_together(self, values: Values) -> None:
        """Raises ValueError for values that are in range but do not fit one another."""

    def _check_form(self, form: Form, values: Values) -> None:
        """Raises ValueError for matrices that the values do not fit."""

    def _check_ready(self) -> None:
        """Raises RuntimeError where an earlier step left something that forbids the next."""

    def _cut(self, matrices: Tensor, values: Values) -> list[Tensor]:
        """The blocks of a parameter's matrices that are entries of their own."""
        return [matrices]

    def _entries(
        self, matrices: Tensor, state: Values, form: Form, layout: Layout, values: Values
    ) -> list[list[Tensor]]:
        """The entries of one parameter: matrices, states in the operator's order, step count."""
        tensors = [
            as_matrices(name, state[name], form) if slot.shape is None else state[name]
            for name, slot in layout.items()
            if name != "step" and isinstance(slot, Slot)
        ]
        return [[matrices, *tensors, state["step"]]]

    def _adopt_values(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values of a group that other code saved, under our names."""
        return values

    def _adopt_state(self, name: str, state: dict[str, Any], form: Form) -> dict[str, Any]:
        """The state of a parameter that other code saved, under our names."""
        return state

    def _fit_state(self, state: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """Saved state as the values of the group now ask for it."""
        return state

    # What the layers share.

    @staticmethod
    def _form(param: Tensor, values: Values) -> Form:
        return form_of(param.shape, batched=values["batched"], matrix_dims=values["matrix_dims"])

    def _name(self, index: int, position: int) -> str:
        names = self.param_groups[index].get("param_names")
        return names[position] if names else f"param_groups[{index}]['params'][{position}]"

    def _forget(self) -> None:
        """Drops what is derived from groups and state."""
        self._plans: dict[tuple[int, str, int], Plan] = {}
        self._checked: dict[int, tuple[dict[str, Any], Current]] = {}
        self._counts = Counts()

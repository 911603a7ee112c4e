"""The state of every parameter, and the plan of the calls that step them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _adamw
from ._forms import Form, Layout, adamw_layout, layouts
from ._groups import Group, Values
from ._membership import Membership
from ._state import check_state, new_state
from ._work import Part, Plan, Share


class Planning(Membership):
    """What an optimizer keeps for its parameters, and how it calls the operators on them."""

    def _plan(self, index: int, group: Group, share: Share, values: Values, batch: int = 0) -> Plan:
        """The calls of the matrix rule."""
        params = share.params
        plan = self._plans.get((index, "matrix", batch))
        if plan is not None and plan.fits(params, self._states_of(share.keys)):
            return plan
        self._check_whole()
        offsets = self._offsets_of(index, group)
        parts: dict[torch.device, Part] = {}
        based: list[Tensor] = []
        for place, (param, position, key) in enumerate(
            zip(params, share.positions, share.keys, strict=True)
        ):
            name = self._name(index, position)
            form = self._form(param, values)
            layout = self._layout(form, values)
            self._ensure_state(name, key, param, form, layout)
            state = self.state[key]
            part = parts.setdefault(param.device, Part([]))
            matrices = form.view(param)
            if matrices is None:
                matrices = param.new_empty(form.shape)
                part.staged.append((param, form, matrices))
            entries = self._entries(matrices, state, form, layout, values)
            part.lists = part.lists or [[] for _ in entries[0]]
            for block, entry in enumerate(entries):
                for tensors, tensor in zip(part.lists, entry, strict=True):
                    tensors.append(tensor)
                part.names.append(name)
                part.offsets.append(offsets[position] + block)
            part.sources.append((place, None if form.trivial else form))
            if len(entries) > 1 or entries[0][0] is not param:
                based += [value for value in state.values() if isinstance(value, Tensor)]
        plan = self._new_plan(share, based)
        plan.parts = list(parts.values())
        self._plans[index, "matrix", batch] = plan
        return plan

    def _adamw_plan(self, index: int, share: Share, values: Values) -> Plan:
        """The calls of AdamW."""
        params = share.params
        plan = self._plans.get((index, "adamw", 0))
        how = values["amsgrad"], values["nonfinite"], values["capturable"]
        if (
            plan is not None
            and all(part.how == how for part in plan.adamw)
            and plan.fits(params, self._states_of(share.keys))
        ):
            return plan
        self._check_whole()
        parts: dict[torch.device, _adamw.Part] = {}
        for place, (param, position, key) in enumerate(
            zip(params, share.positions, share.keys, strict=True)
        ):
            on_device = how[1] == "skip" or how[2]
            layout = adamw_layout(param, amsgrad=how[0], on_device=on_device)
            state = self.state[key]
            missing = {name: layout[name] for name in layout if state and name not in state}
            state.update(new_state(param, None, missing))
            self._ensure_state(self._name(index, position), key, param, None, layout)
            part = parts.setdefault(param.device, _adamw.Part(param.device, how))
            part.add(place, param, state)
        plan = self._new_plan(share, [])
        plan.adamw = list(parts.values())
        self._plans[index, "adamw", 0] = plan
        return plan

    def _ensure_state(
        self, name: str, key: Tensor, param: Tensor, form: Form | None, layout: Layout
    ) -> None:
        """Checks the state of a parameter, or creates it."""
        if self.state[key]:
            check_state(name, self.state[key], layout, param)
        else:
            self.state[key].update(new_state(param, form, layout))

    def _staggered(self, values: Values) -> bool:
        """Whether the entries of a group refresh roots or bases on different steps."""
        return False

    def _offsets_of(self, index: int, group: Group) -> dict[int, int]:
        """For every matrix of a group its place in a staggered schedule: matrices come first."""
        before = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        routes = self._routes_of(index, group)
        positions = [position for position, is_matrix in enumerate(routes) if is_matrix]
        return {position: before + rank for rank, position in enumerate(positions)}

    def _new_plan(self, share: Share, based: list[Tensor]) -> Plan:
        params, states = share.params, self._states_of(share.keys)
        listed = [([*value.values()], value) for value in states if isinstance(value, dict)]
        return Plan(list(params), layouts(params), states, listed, based, layouts(based))

    def _states_of(self, keys: Sequence[Tensor]) -> list[Any]:
        states: list[Any] = []
        for key in keys:
            states += self.state[key].values()
        return states

    def _slots(self, param: Tensor, group: Group, *, is_matrix: bool) -> tuple[Form | None, Layout]:
        if not is_matrix:
            amsgrad = group.get("adamw_amsgrad")
            amsgrad = group.get("amsgrad") if amsgrad is None else amsgrad
            on_device = group["nonfinite"] == "skip" or group["capturable"]
            return None, adamw_layout(param, amsgrad=bool(amsgrad), on_device=on_device)
        form = self._form(param, group)
        return form, self._layout(form, group)

    def _here(self, key: Tensor) -> Tensor | None:
        """The plain tensor that a parameter's state fits on this rank; None if another has it."""
        return key if self._spread is None else self._spread.here(key)

    def _all_slots(self) -> Iterator[tuple[Tensor, Tensor, Form | None, Layout]]:
        """What has its state here: parameters, their plain tensors, forms and slots."""
        for index, group in enumerate(self.param_groups):
            routes = self._routes_of(index, group)
            for key, is_matrix in zip(group["params"], routes, strict=True):
                param = self._here(key)
                if param is not None:
                    yield key, param, *self._slots(param, group, is_matrix=is_matrix)

    def init_state(self) -> None:
        """Creates the state of every parameter that requires grad, as its first step would."""
        for key, param, form, layout in self._all_slots():
            if key.requires_grad:
                self._counter(param.device)
            if key.requires_grad and not self.state[key]:
                self.state[key].update(new_state(param, form, layout))

    def memory_estimate(self) -> int:
        """Bytes of state, on this rank, once every parameter has been stepped."""
        return sum(
            slot.bytes(param)
            for _, param, _, layout in self._all_slots()
            for slots in layout.values()
            for slot in (slots if isinstance(slots, list) else [slots])
        )

    def _counter(self, device: torch.device) -> Tensor:
        counter = self._skipped.get(device)
        if counter is None:
            with torch.inference_mode(False):
                counter = torch.zeros((), dtype=torch.int64, device=device)
            self._skipped[device] = counter
        return counter

    @property
    def skipped(self) -> int:
        """How many matrices and AdamW's tensors have been skipped so far."""
        return sum(int(counter) for counter in self._skipped.values())

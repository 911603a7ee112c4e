"""State dicts: written, and read from this version, earlier ones and the public classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import _groups
from ._groups import Group
from ._parameters import checked_names
from ._state import loaded_state
from ._step import Stepping

# 1 had two groups, one of each algorithm, where there is one of both kinds now; up to 2 the blocks
# of a parameter were lists.
STATE_VERSION = 3


class Checkpointed(Stepping):
    """State dicts of an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer, with the version of the state's layout.

        Spread over ranks, all of them call it: state comes as DTensors, of a parameter's shape in
        its placements and otherwise cut by rows over the same ranks, and nothing of it is shared
        with this optimizer. `consolidate` gives an ordinary dict.

        Raises:
            RuntimeError: spread over ranks, and some of them have not called it.
        """
        found = {**super().state_dict(), "state_version": STATE_VERSION}
        return found if self._spread is None else self._spread.state_dict(found)

    def consolidate(self, to: int | None = 0) -> dict[str, Any] | None:
        """An ordinary state dict of plain, whole tensors, as one process would have it.

        Spread over ranks, all of them call it.

        Args:
            to: the rank that gets it, None for all.

        Returns:
            The dict, or None on another rank.

        Raises:
            TypeError, ValueError: `to` is no rank.
            RuntimeError: spread over ranks, and some of them have not called it.
        """
        if self._spread is None:
            return self.state_dict()
        return self._spread.consolidate(
            {**super().state_dict(), "state_version": STATE_VERSION}, to
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or the state of the public optimizer of this name.

        State keeps its own dtype whatever the parameters have, and is copied. State of earlier
        versions, which had two groups where there is one of both kinds now, loads too.

        Args:
            state_dict: of this class; of torch.optim.Muon, or the public SOAP and DeVA classes.

        Raises:
            TypeError, ValueError: groups, values or state that do not fit, naming them; nothing is
                changed then.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            groups, state = (
                self._fitted(given) if self._spread is None else self._spread.fitted(given)
            )
            loaded.update(state)
            return {"state": {}, "param_groups": groups}

        def put(_: Optimizer) -> None:
            self.state = defaultdict(dict, loaded)
            if self._spread is not None:
                self._spread.loaded()

        # torch would cast state to the parameters' dtype between these two, so it gets none. The
        # first is the last of its kind and sees what other hooks made of the dict.
        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _fitted(self, given: dict[str, Any]) -> tuple[list[Group], dict[Tensor, dict[str, Any]]]:
        """Groups and state of a state dict, checked against this optimizer's."""
        version = given.get("state_version", STATE_VERSION)
        if version > STATE_VERSION:
            raise ValueError(
                f"state_version is {version}, and this version reads up to {STATE_VERSION}"
            )
        native = any("algorithm" in group for group in given["param_groups"])
        saved = self._regrouped(given["param_groups"], native=native)
        found = {
            key: given["state"].get(saved_key)
            for group, theirs in zip(self.param_groups, saved, strict=True)
            for key, saved_key in zip(group["params"], theirs["params"], strict=True)
        }
        if self._spread is not None:
            found = self._spread.brought_here(found)
        groups: list[Group] = []
        state: dict[Tensor, dict[str, Any]] = {}
        for index, (group, theirs) in enumerate(zip(self.param_groups, saved, strict=True)):
            groups.append(self._fitted_group(index, group, theirs, native=native))
            routes = self._routes_of(index, group)
            for position, (key, is_matrix) in enumerate(zip(group["params"], routes, strict=True)):
                param = self._here(key)
                if not found[key] or param is None:
                    continue
                name = self._name(index, position)
                form, layout = self._slots(param, groups[-1], is_matrix=is_matrix)
                value = dict(found[key])
                if not native and form is not None:
                    value = self._adopt_state(name, value, form)
                value = self._fit_state(value, layout)
                state[key] = loaded_state(name, value, layout, param, form)
        return groups, state

    def _fitted_group(self, index: int, group: Group, theirs: Group, *, native: bool) -> Group:
        algorithm = group["algorithm"]
        if native:
            theirs = self._converted(index, group, theirs)
        else:
            adopted = self._adopt_values(dict(theirs))
            theirs = {
                name: value
                for name, value in adopted.items()
                if name in self._names[algorithm] or name in ("params", "param_names", "initial_lr")
            }
        values = {**group, **theirs}
        count = len(values.pop("params"))
        if values.get("param_names") is not None:
            where = f"param_groups[{index}] as saved"
            values["param_names"] = checked_names(values["param_names"], count, where)
        # What a name says of a parameter is this optimizer's, whatever it was called once.
        if group.get("param_names") is not None:
            values["param_names"] = group["param_names"]
        if "split" in group:
            values["split"] = group["split"]
        if algorithm == "auto" and not native:
            values["unwritten"] = {
                name: value for name, value in group["unwritten"].items() if name not in theirs
            }
            if values["adamw_lr"] is not None:
                values["adamw_lr_at"] = float(values.get("initial_lr", values["lr"]))
        for name in ("lr", "adamw_lr"):
            if isinstance(values.get(name), Tensor) and isinstance(group.get(name), Tensor):
                values[name] = values[name].to(group[name].device)
        self._checked_values(values, algorithm, f"param_groups[{index}]: ", update=True)
        return {**values, "params": list(theirs["params"])}

    def _converted(self, index: int, group: Group, theirs: Group) -> Group:
        """A saved group in the layout of this optimizer's, which may say another algorithm."""
        mine, other = group["algorithm"], theirs.get("algorithm", group["algorithm"])
        if mine == other:
            return theirs
        routes = self._routes_of(index, group)
        actual = "auto" if len({*routes}) == 2 else "matrix" if all(routes) else "adamw"
        if other not in (actual, "auto"):
            raise ValueError(
                f"param_groups[{index}]: its algorithm is {actual!r}, the saved one {other!r}"
            )
        if mine == "auto" and other == "matrix":
            fields = _groups.adamw_fields(theirs, {}, self._unwritten)
        elif mine == "auto":
            fields = _groups.adamw_fields({}, theirs, {})
        else:
            fields = {}
            if mine == "adamw":
                fields = _groups.adamw_values(theirs, self._matrix_rules, self._shared)
            theirs = {
                name: value
                for name, value in theirs.items()
                if name not in _groups.ONLY_AUTO
                and (name in self._names[mine] or name not in self._names["auto"])
            }
        return {**theirs, **fields, "algorithm": mine}

    def _regrouped(self, saved: Sequence[Group], *, native: bool) -> list[Group]:
        """Saved groups, one for each of this optimizer's."""
        routes = [self._routes_of(index, group) for index, group in enumerate(self.param_groups)]
        sizes = [len(group["params"]) for group in saved]
        fits = sizes == [len(group["params"]) for group in self.param_groups]
        mixed = [
            group["algorithm"] == "auto" and len({*each}) == 2
            for group, each in zip(self.param_groups, routes, strict=True)
        ]
        split: list[int] = []
        for each, two in zip(routes, mixed, strict=True):
            split += [sum(each), len(each) - sum(each)] if two else [len(each)]
        if fits or sizes != split:
            named = _groups.by_name(saved, self.param_groups, routes) if native else None
            if named is not None:
                return named
            if fits:
                return list(saved)
            raise ValueError(
                f"the loaded state dict has groups of {sizes} parameters, this optimizer of "
                f"{[len(group['params']) for group in self.param_groups]}"
            )
        rest = iter(saved)
        return [
            _groups.joined(next(rest), next(rest), each, self._unwritten) if two else next(rest)
            for each, two in zip(routes, mixed, strict=True)
        ]

"""Parameters in groups: which rule each takes, and the values of both rules."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor

from . import _groups, _names, _rules
from ._declared import Declared
from ._groups import Group
from ._parameters import check_param, check_whole, names_of
from ._work import Current, same_objects


class Membership(Declared):
    """The groups of an optimizer."""

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, which stays one group whatever it holds.

        Args:
            param_group: "params" (tensors, or (name, tensor) pairs, or tensors with their names in
                "param_names") and hyper-parameters. Its `algorithm` is "matrix" or "adamw" for all
                of its parameters, or "auto" (default): each is routed by its dimensions and, where
                it has one, its name. In such a group lr, maximize, nonfinite, weight_decay and
                whatever else both algorithms understand reach every parameter as soon as somebody
                writes them, then or later; a default that nobody wrote is that of
                torch.optim.AdamW for AdamW's. adamw_lr, adamw_betas, adamw_eps,
                adamw_weight_decay, adamw_amsgrad and adamw_maximize are AdamW's own instead, from
                the constructor's `adamw` if the group does not have them. adamw_lr follows lr in
                proportion, so that a schedule of lr is one of adamw_lr: it holds where lr is
                adamw_lr_at, its value when the group was added. `foreach` and `fused` mean to
                AdamW's what they mean to torch.optim.AdamW, and nothing to matrices.

        Raises:
            TypeError, ValueError: a parameter or value that cannot work, with its place; nothing is
                added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = dict(param_group)
        where = f"param_groups[{len(self.param_groups)}]"
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if isinstance(group["params"], (set, frozenset)):
            raise TypeError("parameters need an order, so that saved state finds them: not a set")
        self._take_flag(group, where)
        _rules.check_implementation(group, f"{where}: ")
        if group.get("split") is not None and "split" not in self._matrix_rules:
            raise ValueError(f"{where}: {type(self).__name__} steps matrices whole: no split")
        rules = {name: rule for name, rule in _rules.ROUTING.items() if name in group}
        group.update(_rules.check(group, rules, f"{where}: "))
        group["params"] = members = list(group["params"])
        tensors = [member[1] if isinstance(member, tuple) else member for member in members]
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError(f"{where} holds a parameter twice")
        names = names_of(group, members, where)
        routes = [
            self._is_matrix(f"{where}['params'][{i}]", name, tensor, group)
            for i, (name, tensor) in enumerate(zip(names, tensors, strict=True))
        ]
        for i, (tensor, is_matrix) in enumerate(zip(tensors, routes, strict=True)):
            if group.get("fused") and tensor.is_complex() and not is_matrix:
                raise TypeError(f"{where}['params'][{i}] is complex, which fused=True cannot take")
        ready = self._ready(group, f"{where}: ", has_matrix=any(routes))
        known = set(ready)
        super().add_param_group(ready)
        if ready["algorithm"] == "adamw":
            for name in self.defaults.keys() - known:
                del ready[name]
        self._forget()
        self._routes[len(self.param_groups) - 1] = tensors, routes
        if self._built:
            self._warn_of_names()
            try:
                self._join_ranks()
            except BaseException:
                self.param_groups.pop()
                self._forget()
                raise

    def _join_ranks(self) -> None:
        """Says to the other ranks, where there are any, what this one holds, and who owns it."""
        raise NotImplementedError

    def _take_flag(self, group: Group, where: str) -> None:
        """The algorithm of a group that says it by use_muon."""
        flag = group.get("use_muon")
        if flag is None:
            return
        if self._flag != "use_muon":
            raise ValueError(
                f"{where}: use_muon is a key of Muon's groups; in {type(self).__name__}'s say "
                "algorithm='matrix' or 'adamw'"
            )
        algorithm = "matrix" if _rules.flag(f"{where}: use_muon", flag) else "adamw"
        if group.setdefault("algorithm", algorithm) not in (algorithm, "auto"):
            raise ValueError(
                f"{where}: use_muon={flag} and algorithm={group['algorithm']!r} contradict"
            )
        group["algorithm"] = algorithm

    def _is_matrix(self, where: str, name: str, tensor: Tensor, group: Group) -> bool:
        """Whether a parameter takes the matrix rule; raises where neither can take it."""
        where += f" ({name})" if name else ""
        check_param(where, tensor)
        algorithm = group.get("algorithm", "auto")
        if algorithm == "auto" and tensor.ndim < 2:
            algorithm = "adamw"
        declared = group.get("batched") or group.get("matrix_dims") is not None
        if algorithm == "auto" and name and not declared:
            # With a name it is a gain or the like; without one, whoever gave it knows.
            vector = tensor.numel() and tensor.numel() == max(tensor.shape)
            if vector or _names.by_name(name, tensor.ndim):
                algorithm = "adamw"
        if algorithm == "adamw":
            return False
        if tensor.is_complex():
            raise TypeError(
                f"{where} must be float64, float32, bfloat16, float16, not {tensor.dtype}: only "
                "AdamW takes complex numbers, by algorithm='adamw' in their group"
            )
        try:
            values = {**self.defaults, **group}
            self._check_form(self._form(tensor, values), values)
        except ValueError as error:
            raise ValueError(f"{where} of shape {tuple(tensor.shape)}: {error}") from None
        return True

    def _ready(self, group: Group, where: str, *, has_matrix: bool) -> Group:
        """A group with all its values, checked."""
        algorithm = group.get("algorithm", "auto")
        if algorithm == "matrix":
            values = {**self.defaults, **group}
        elif algorithm == "auto":
            values = _groups.filled(
                group, self.defaults, self._adamw, self._unwritten, has_matrix=has_matrix
            )
        else:
            values = self._ready_adamw(group)
        self._checked_values(values, algorithm, where, update=True)
        return _groups.with_base(values) if algorithm == "auto" else values

    def _ready_adamw(self, group: Group) -> Group:
        """A group of AdamW's alone, which has its values under their plain names."""
        ours = {
            **self.defaults,
            **_groups.fields(self._adamw),
            "unwritten": self._unwritten,
        }
        fields = {
            name: group[f"adamw_{name}"]
            for name in _rules.ADAMW
            if group.get(f"adamw_{name}") is not None
        }
        kept = {
            name: value
            for name, value in group.items()
            if name in _rules.ADAMW_GROUP
            or (name not in self._matrix_rules and name not in _groups.ONLY_AUTO)
        }
        values = _groups.adamw_values(ours, self._matrix_rules, self._shared)
        shared = {name: self.defaults[name] for name in ("nonfinite", "capturable")}
        return {**values, **shared, **kept, **fields}

    def _checked_values(
        self, given: Group, algorithm: str, where: str, *, update: bool = False
    ) -> Current:
        """The values of each algorithm, checked; with update, normalised in `given` too."""
        matrix = adamw = None
        if algorithm != "adamw":
            matrix = self._check_matrix_values(given, where)
            if update:
                given.update(matrix)
        if algorithm == "auto":
            fields = _rules.check(
                {name: given.get(name) for name in _rules.ADAMW_FIELDS}, _rules.ADAMW_FIELDS, where
            )
            if update:
                given.update(fields)
            both = {**given, **fields}
            adamw = _groups.adamw_values(both, self._matrix_rules, self._shared)
            adamw = _rules.check(adamw, _rules.ADAMW, where)
            adamw.update({name: given[name] for name in ("nonfinite", "capturable")})
        elif algorithm == "adamw":
            adamw = _rules.check(given, _rules.ADAMW_GROUP, where)
            if update:
                given.update(adamw)
        return Current(matrix, adamw)

    def _check_matrix_values(self, values: dict[str, Any], where: str = "") -> dict[str, Any]:
        """Values of a matrix group, checked; those that have no rule stay as they are."""
        checked = _rules.check(values, self._matrix_rules, where)
        try:
            self._check_together(checked)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        return {**values, **checked}

    def _current(self, index: int, group: Group) -> Current:
        """The group's values as they are now, checked; the same dicts until one but lr changes."""
        algorithm = group["algorithm"]
        raw = {name: group.get(name) for name in self._names[algorithm]}
        lrs = raw.pop("lr"), raw.pop("adamw_lr", None)
        where = f"param_groups[{index}]: "
        _rules.check_implementation(group, where)
        known = self._checked.get(index)
        if known is None or known[0] != raw:
            structure = ("batched", "matrix_dims", "state_dtype", *self._structure)
            if known is None or any(known[0].get(name) != raw.get(name) for name in structure):
                for key in [key for key in self._plans if key[:2] == (index, "matrix")]:
                    del self._plans[key]
                if known is not None:
                    self._routes.pop(index, None)
            given = {**raw, "lr": lrs[0]}
            if algorithm == "auto":
                given["adamw_lr"] = lrs[1]
            values = self._checked_values(given, algorithm, where)
            known = self._checked[index] = copy.deepcopy(raw), values
        values = known[1]
        lr = _rules.check({"lr": lrs[0]}, _rules.LR, where)["lr"]
        if values.matrix is not None:
            values.matrix["lr"] = lr
        if values.adamw is not None:
            values.adamw["lr"] = lr
            if lrs[1] is not None:
                own = _rules.ADAMW_FIELDS["adamw_lr"](f"{where}adamw_lr", lrs[1])
                values.adamw["lr"] = _groups.adamw_lr({**group, "lr": lr, "adamw_lr": own})
        return values

    def _routes_of(self, index: int, group: Group) -> list[bool]:
        """For every parameter of a group whether it takes the matrix rule."""
        known = self._routes.get(index)
        params = group["params"]
        if known is not None and same_objects(known[0], params):
            return known[1]
        names = group.get("param_names") or [""] * len(params)
        routes = [
            self._is_matrix(f"param_groups[{index}]['params'][{i}]", name, param, group)
            for i, (name, param) in enumerate(zip(names, params, strict=True))
        ]
        if params and known is not None and any(known[1]) and not any(routes):
            raise TypeError(
                f"param_groups[{index}] held matrices and has none any more: its parameters were "
                "replaced by flattened ones (by a wrapper such as ZeRO?)"
            )
        self._routes[index] = list(params), routes
        return routes

    def algorithm_of(self, param: Tensor) -> str:
        """The algorithm of a parameter, "matrix" or "adamw", whatever else its group holds.

        Raises:
            ValueError: not a parameter of this optimizer.
        """
        for index, group in enumerate(self.param_groups):
            for other, is_matrix in zip(
                group["params"], self._routes_of(index, group), strict=True
            ):
                if other is param:
                    return "matrix" if is_matrix else "adamw"
        raise ValueError("not a parameter of this optimizer")

    def _warn_of_names(self) -> None:
        """Says once that matrices without names may be embeddings or heads."""
        if self._warned_of_names:
            return
        matrices = [
            (self._name(index, position), self._form(param, group).shape[-2:])
            for index, group in enumerate(self.param_groups)
            if group["algorithm"] == "auto" and not any(group.get("param_names") or ())
            for position, (param, is_matrix) in enumerate(
                zip(group["params"], self._routes_of(index, group), strict=True)
            )
            if is_matrix and param.ndim == 2
        ]
        likely = _names.likely_tables(matrices)
        if likely:
            self._warned_of_names = True
            more = f" and {len(likely) - 3} more" if len(likely) > 3 else ""
            warnings.warn(
                f"{type(self).__name__} gives {', '.join(likely[:3])}{more} the matrix rule: by "
                "their shapes they may be embeddings or heads, which belong to AdamW, and without "
                "names it cannot tell. Give named parameters or "
                "spectral_kernels.optim.param_groups(model), or say algorithm='matrix'",
                stacklevel=4,
            )

    def _check_whole(self) -> None:
        """No parameter that a wrapper cut into pieces after the optimizer was made."""
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                check_whole(self._name(index, position), param)

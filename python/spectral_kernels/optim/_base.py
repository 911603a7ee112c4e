"""What the optimizers share: groups, routing, the two-phase step, state and checkpoints."""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.optimizer import Optimizer

from .. import _checks, _dispatch
from . import _diagnostics, _routing, _rules
from ._forms import Form, Layout, Slot, adamw_layout, form_of

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group: TypeAlias = dict[str, Any]
Values: TypeAlias = Mapping[str, Any]

STATE_VERSION = 1


@dataclass
class Part:
    """The matrices of one group on one device: what one call of the list operator works on.

    Attributes:
        lists: parameters, every state in the operator's order, step counts.
        sources: for every parameter its place among the group's gradients, and its form, None where
            the gradient is a matrix as it is.
        names: for every entry its parameter's name.
        offsets: for every entry its place in a staggered schedule.
        staged: parameters that cannot be viewed as matrices, with the copies that stand for them.
        options: the operator's options.
        made_from: the values that they were made from.
    """

    lists: list[list[Tensor]]
    sources: list[tuple[int, Form | None]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    staged: list[tuple[Tensor, Form, Tensor]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    made_from: Values | None = None


@dataclass
class Plan:
    """The parts of one group, valid while its parameters, their memory and their state stay."""

    params: list[Tensor]
    pointers: list[int]
    states: list[int]
    parts: list[Part]


class MatrixOptimizer(_diagnostics.Watched, Optimizer):
    """Base of the optimizers: matrices by one list operator, everything else by AdamW.

    A subclass names its operator and hyper-parameters, lays out the state of a parameter, and turns
    values into the operator's options.
    """

    _operator: ClassVar[str]
    _own_rules: ClassVar[Mapping[str, _rules.Rule]] = {}
    # Values that decide the shapes of entries and state.
    _structure: ClassVar[tuple[str, ...]] = ()
    _matrix_rules: ClassVar[Mapping[str, _rules.Rule]]
    _every_rule: ClassVar[Mapping[str, _rules.Rule]]

    def __init__(self, params: Params, defaults: dict[str, Any], adamw: Values | None) -> None:
        given = dict(adamw or {})
        for name in given:
            _checks.choice("a key of adamw", name, tuple(_rules.ADAMW))
        self._adamw = _rules.check(given, {name: _rules.ADAMW[name] for name in given}, "adamw: ")
        self._sources: list[list[Tensor]] = []
        self._skipped: dict[torch.device, Tensor] = {}
        self._warned = False
        self._forget()
        values = {"batched": False, "matrix_dims": None, **defaults}
        super().__init__(params, self._check_matrix_values(values))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._matrix_rules = {**_rules.MATRIX, **cls._own_rules}
        cls._every_rule = {**cls._matrix_rules, **_rules.ADAMW}

    # What a subclass says.

    def _layout(self, form: Form, values: Values) -> Layout:
        """The state of a parameter: step, and the others in the operator's order."""
        raise NotImplementedError

    def _options(self, values: Values, part: Part) -> dict[str, Any]:
        """The operator's options, as long as the values stay."""
        raise NotImplementedError

    def _check_together(self, values: Values) -> None:
        """Raises ValueError for values that are in range but do not fit one another."""

    def _check_ready(self) -> None:
        """Raises RuntimeError where an earlier step left something that forbids the next."""

    def _adamw_lr(self, values: Values) -> Any:
        """The learning rate of AdamW beside matrices with these values."""
        return values["lr"]

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

    # Groups.

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; one with both matrices and other parameters becomes two.

        Args:
            param_group: "params" (tensors, or (name, tensor) pairs) and hyper-parameters. With an
                `algorithm`, "matrix" or "adamw", it stays one group. Without, parameters are routed
                by their dimensions and, where they have one, their name; if both kinds occur, those
                for AdamW take the optimizer's `adamw` values and not the group's.

        Raises:
            TypeError, ValueError: a parameter or value that cannot work, with its place; nothing is
                added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = dict(param_group)
        index = len(self.param_groups)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if isinstance(group["params"], (set, frozenset)):
            raise TypeError("parameters need an order, so that saved state finds them: not a set")
        rules = {name: rule for name, rule in _rules.ROUTING.items() if name in group}
        group.update(_rules.check(group, rules, f"param_groups[{index}]: "))
        members = list(group["params"])
        tensors = [member[1] if isinstance(member, tuple) else member for member in members]
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError(f"param_groups[{index}] holds a parameter twice")
        halves: dict[str, list[Any]] = {}
        for position, (member, tensor) in enumerate(zip(members, tensors, strict=True)):
            name = member[0] if isinstance(member, tuple) else ""
            where = f"param_groups[{index}]['params'][{position}]" + (f" ({name})" if name else "")
            check_param(where, tensor)
            halves.setdefault(self._algorithm(where, name, tensor, group), []).append(member)
        if not halves:
            halves[group.get("algorithm", "matrix")] = []
        ready = [
            self._ready(group, algorithm, halves[algorithm], index, split=len(halves) > 1)
            for algorithm in _routing.ALGORITHMS
            if algorithm in halves
        ]
        try:
            for half in ready:
                names = set(half)
                super().add_param_group(half)
                if half["algorithm"] == "adamw":
                    for name in self.defaults.keys() - names:
                        del half[name]
        except Exception:
            del self.param_groups[index:]
            raise
        self._sources.append(tensors)
        self._forget()

    def _algorithm(self, where: str, name: str, tensor: Tensor, group: Group) -> str:
        algorithm = group.get("algorithm")
        if algorithm is None and tensor.ndim < 2:
            algorithm = "adamw"
        declared = group.get("batched") or group.get("matrix_dims") is not None
        if algorithm is None and name and not declared and _routing.by_name(name):
            algorithm = "adamw"
        if algorithm != "adamw":
            try:
                self._form(tensor, {**self.defaults, **group})
            except ValueError as error:
                raise ValueError(f"{where} of shape {tuple(tensor.shape)}: {error}") from None
        return algorithm or "matrix"

    def _ready(
        self, group: Group, algorithm: str, members: list[Any], index: int, *, split: bool
    ) -> Group:
        """A group of one algorithm with all its values, checked."""
        where = f"param_groups[{index}]: "
        matrix = {**self.defaults, **group}
        if algorithm == "matrix":
            values = self._check_matrix_values(matrix, where)
        else:
            own = {
                name: value
                for name, value in group.items()
                if (name in _rules.ADAMW and not split) or name not in self._every_rule
            }
            values = {
                **_rules.ADAMW_DEFAULTS,
                "lr": self._adamw_lr(matrix),
                "maximize": matrix["maximize"],
                **self._adamw,
                **own,
            }
            values.update(_rules.check(values, _rules.ADAMW, where))
        return {**values, "params": members, "algorithm": algorithm}

    def _check_matrix_values(self, values: dict[str, Any], where: str = "") -> dict[str, Any]:
        """Values of a matrix group, checked; those that have no rule stay as they are."""
        checked = _rules.check(values, self._matrix_rules, where)
        try:
            self._check_together(checked)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        return {**values, **checked}

    @staticmethod
    def _form(param: Tensor, values: Values) -> Form:
        return form_of(param.shape, batched=values["batched"], matrix_dims=values["matrix_dims"])

    def _name(self, index: int, position: int) -> str:
        names = self.param_groups[index].get("param_names")
        return names[position] if names else f"param_groups[{index}]['params'][{position}]"

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Everything is checked before anything is written.

        Args:
            closure: evaluates the model anew, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: a gradient or hyper-parameter that cannot work, naming it.
            RuntimeError: a backend that was asked for cannot run.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    @torch._disable_dynamo
    def _step(self) -> None:
        self._check_ready()
        if self._watch is not None:
            self._watch.begin()
        checked = [
            (self._current(index, group), *self._gather(index, group))
            for index, group in enumerate(self.param_groups)
        ]
        matrix_calls: list[tuple[Part, list[Tensor], Values, Tensor]] = []
        adamw_calls: list[tuple[list[Tensor], list[Tensor], Values]] = []
        for index, (values, params, grads) in enumerate(checked):
            group = self.param_groups[index]
            if group["algorithm"] == "adamw":
                adamw_calls.append((params, grads, values))
            elif params:
                if values["nonfinite"] == "raise":
                    self._raise_nonfinite(index)
                lr = _checks.learning_rate(group["lr"])
                plan = self._plan(index, group, params)
                matrix_calls += [(part, grads, values, lr) for part in plan.parts]
        if not matrix_calls:
            self._warn(any(params for params, _, _ in adamw_calls))
        for matrix_call in matrix_calls:
            self._run(*matrix_call)
        for adamw_call in adamw_calls:
            self._run_adamw(*adamw_call)

    def _current(self, index: int, group: Group) -> dict[str, Any]:
        """The group's values as they are now, checked; the same dict until one but lr changes."""
        adamw = group["algorithm"] == "adamw"
        rules = _rules.ADAMW if adamw else self._matrix_rules
        raw = {name: group.get(name) for name in rules}
        lr = raw.pop("lr")
        where = f"param_groups[{index}]: "
        known = self._checked.get(index)
        if known is None or known[0] != raw:
            structure = ("batched", "matrix_dims", *self._structure)
            if known is None or any(known[0].get(name) != raw.get(name) for name in structure):
                self._plans.pop(index, None)
            given = {**raw, "lr": lr}
            values = (
                _rules.check(given, rules, where)
                if adamw
                else self._check_matrix_values(given, where)
            )
            known = self._checked[index] = raw, values
        known[1].update(_rules.check({"lr": lr}, _rules.LR, where))
        return known[1]

    def _gather(self, index: int, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and the gradients, checked."""
        params, grads = [], []
        for position, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if not (
                type(grad) is Tensor
                and grad.dtype is param.dtype
                and grad.layout is torch.strided
                and grad.shape == param.shape
                and not grad.is_meta
            ):
                check_grad(self._name(index, position), param, grad, group["algorithm"])
            params.append(param)
            grads.append(grad)
        return params, grads

    def _raise_nonfinite(self, index: int) -> None:
        """nonfinite="raise" for every group, before the first one is written."""
        for position, param in enumerate(self.param_groups[index]["params"]):
            if param.grad is not None and not bool(param.grad.isfinite().all()):
                raise ValueError(f"{self._name(index, position)} has a non-finite gradient")

    def _warn(self, stepping: bool) -> None:
        if stepping and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} has no matrix to update: all parameters with a gradient go "
                "to AdamW (were they flattened by a wrapper?)",
                stacklevel=7,
            )

    def _plan(self, index: int, group: Group, params: list[Tensor]) -> Plan:
        plan = self._plans.get(index)
        pointers = [param.data_ptr() for param in params]
        if (
            plan is not None
            and plan.pointers == pointers
            and all(map(operator.is_, plan.params, params))
            and plan.states == self._state_ids(params)
        ):
            return plan
        before = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        positions = {param: position for position, param in enumerate(group["params"])}
        parts: dict[torch.device, Part] = {}
        for place, param in enumerate(params):
            position = positions[param]
            name = self._name(index, position)
            form, layout = self._slots(param, group)
            assert form is not None
            if self.state[param]:
                _check_state(name, self.state[param], layout, param)
            else:
                self.state[param].update(_new_state(param, form, layout))
            part = parts.setdefault(param.device, Part([[] for _ in range(len(layout) + 1)]))
            matrices = form.view(param)
            if matrices is None:
                matrices = param.new_empty(form.shape)
                part.staged.append((param, form, matrices))
            entries = self._entries(matrices, self.state[param], form, layout, group)
            for block, entry in enumerate(entries):
                for tensors, tensor in zip(part.lists, entry, strict=True):
                    tensors.append(tensor)
                part.names.append(name)
                part.offsets.append(before + position + block)
            part.sources.append((place, None if form.trivial else form))
        plan = Plan(list(params), pointers, self._state_ids(params), list(parts.values()))
        self._plans[index] = plan
        return plan

    def _state_ids(self, params: Sequence[Tensor]) -> list[int]:
        return [id(value) for param in params for value in self.state[param].values()]

    def _run(self, part: Part, grads: list[Tensor], values: Values, lr: Tensor) -> None:
        """The step of one part."""
        if part.made_from is not values:
            part.options, part.made_from = self._options(values, part), values
        for param, form, copy in part.staged:
            copy.copy_(form.matrices(param))
        cut: list[Tensor] = []
        for place, source in part.sources:
            grad = grads[place] if source is None else source.matrices(grads[place])
            cut += self._cut(grad, values)
        self._call(part, cut, lr, values)
        for param, form, copy in part.staged:
            form.write(param, copy)

    def _call(self, part: Part, grads: list[Tensor], lr: Tensor, values: Values) -> None:
        """One call of the list operator."""
        params = part.lists[0]
        if self._watch is not None and self._watch.due:
            self._watch.rehearse(self._operator, part.lists, part.names, grads, part.options)
        _dispatch.run(
            self._operator,
            params[:1],
            None,
            params,
            grads,
            *part.lists[1:],
            self._counter(params[0].device),
            lr,
            **part.options,
        )

    def _run_adamw(self, params: list[Tensor], grads: list[Tensor], values: Values) -> None:
        """torch's own AdamW with its default flags."""
        layouts = [adamw_layout(param, amsgrad=values["amsgrad"]) for param in params]
        for param, layout in zip(params, layouts, strict=True):
            state = self.state[param]
            missing = {name: layout[name] for name in layout if name not in state}
            if missing:
                state.update(_new_state(param, None, missing))
        states = [self.state[param] for param in params]
        torch_adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if values["amsgrad"] else [],
            [state["step"] for state in states],
            amsgrad=values["amsgrad"],
            beta1=values["betas"][0],
            beta2=values["betas"][1],
            lr=values["lr"],
            weight_decay=values["weight_decay"],
            eps=values["eps"],
            maximize=values["maximize"],
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
        """How many matrices have been skipped so far, for a non-finite gradient, say."""
        return sum(int(counter) for counter in self._skipped.values())

    # State.

    def _slots(self, param: Tensor, group: Group) -> tuple[Form | None, Layout]:
        if group["algorithm"] == "adamw":
            return None, adamw_layout(param, amsgrad=group["amsgrad"])
        form = self._form(param, group)
        return form, self._layout(form, group)

    def init_state(self) -> None:
        """Creates the state of every parameter that requires grad, as its first step would."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and not self.state[param]:
                    self.state[param].update(_new_state(param, *self._slots(param, group)))

    def memory_estimate(self) -> int:
        """Bytes of state once every parameter has been stepped."""
        return sum(
            slot.bytes(param)
            for group in self.param_groups
            for param in group["params"]
            for slots in self._slots(param, group)[1].values()
            for slot in (slots if isinstance(slots, list) else [slots])
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer, with the version of the state's layout."""
        return {**super().state_dict(), "state_version": STATE_VERSION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or the state of the public optimizer of this name.

        State keeps its own dtype whatever the parameters have, and is copied. Saved groups may be
        those that the constructor was given, before they were split by algorithm.

        Args:
            state_dict: of this class; of torch.optim.Muon, or the public SOAP and DeVA classes.

        Raises:
            TypeError, ValueError: groups, values or state that do not fit, naming them; nothing is
                changed then.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            groups, state = self._fitted(given)
            loaded.update(state)
            return {"state": {}, "param_groups": groups}

        def put(_: Optimizer) -> None:
            self.state = defaultdict(dict, loaded)

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
        saved = self._regrouped(given["param_groups"])
        native = any("algorithm" in group for group in saved)
        groups: list[Group] = []
        state: dict[Tensor, dict[str, Any]] = {}
        for index, (group, theirs) in enumerate(zip(self.param_groups, saved, strict=True)):
            groups.append(self._fitted_group(index, group, theirs, native=native))
            for position, (param, key) in enumerate(
                zip(group["params"], theirs["params"], strict=True)
            ):
                if not given["state"].get(key):
                    continue
                name = self._name(index, position)
                form, layout = self._slots(param, {**groups[-1], "algorithm": group["algorithm"]})
                value = dict(given["state"][key])
                if not native and form is not None:
                    value = self._adopt_state(name, value, form)
                state[param] = _loaded_state(name, value, layout, param, form)
        return groups, state

    def _fitted_group(self, index: int, group: Group, theirs: Group, *, native: bool) -> Group:
        where = f"param_groups[{index}]: "
        algorithm = theirs.get("algorithm", group["algorithm"])
        if algorithm != group["algorithm"]:
            raise ValueError(
                f"{where}its algorithm is {group['algorithm']!r}, the saved one {algorithm!r}"
            )
        rules = _rules.ADAMW if algorithm == "adamw" else self._matrix_rules
        if not native:
            adopted = self._adopt_values(dict(theirs))
            theirs = {
                name: value
                for name, value in adopted.items()
                if name in rules or name in ("params", "param_names", "initial_lr")
            }
        values = {**group, **theirs}
        values.pop("params")
        if isinstance(values["lr"], Tensor) and isinstance(group["lr"], Tensor):
            values["lr"] = values["lr"].to(group["lr"].device)
        if algorithm == "adamw":
            values.update(_rules.check(values, rules, where))
        else:
            values = self._check_matrix_values(values, where)
        return {**values, "params": list(theirs["params"])}

    def _regrouped(self, saved: Sequence[Group]) -> list[Group]:
        """Saved groups, one for each of this optimizer's."""
        sizes = [len(group["params"]) for group in saved]
        if sizes == [len(group["params"]) for group in self.param_groups]:
            return list(saved)
        if sizes != [len(source) for source in self._sources]:
            raise ValueError(
                f"the loaded state dict has groups of {sizes} parameters, this optimizer of "
                f"{[len(group['params']) for group in self.param_groups]}"
            )
        places = {
            param: (index, position)
            for index, source in enumerate(self._sources)
            for position, param in enumerate(source)
        }
        regrouped = []
        for group in self.param_groups:
            at = [places[param] for param in group["params"]]
            theirs = saved[at[0][0]] if at else {}
            params = [theirs["params"][position] for _, position in at]
            regrouped.append({**theirs, "params": params})
        return regrouped

    def __getstate__(self) -> dict[str, Any]:
        names = ("_adamw", "_sources", "_skipped", "_warned")
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drops what is derived from groups and state."""
        self._plans: dict[int, Plan] = {}
        self._checked: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}


def check_param(name: str, param: Any) -> None:
    """A parameter that an optimizer here can update."""
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(param).__name__}")
    if is_lazy(param):
        raise TypeError(f"{name} has no shape yet: run the lazy module once before")
    if getattr(param, "_is_flat_param", False) or hasattr(param, "ds_id"):
        raise TypeError(
            f"{name} is flattened or partitioned by a wrapper (FSDP1, ZeRO), so its matrix is out "
            "of sight; DDP leaves parameters whole"
        )
    _checks.dense(name, param)
    strides = zip(param.shape, param.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in strides):
        raise ValueError(f"{name} is written in place but has strides {param.stride()}")


def check_grad(name: str, param: Tensor, grad: Tensor, algorithm: str) -> None:
    """A gradient that can be used, whatever made the quick look doubt it."""
    name = f"the gradient of {name}"
    _checks.dense(name, grad)
    if algorithm == "adamw" and grad.dtype != param.dtype:
        raise TypeError(f"{name} is {grad.dtype}, the parameter {param.dtype}")
    if grad.is_meta:
        raise TypeError(f"{name} is on the meta device")
    if grad.shape != param.shape:
        raise ValueError(
            f"{name} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}"
        )


def as_matrices(name: str, tensor: Tensor, form: Form) -> Tensor:
    matrices = form.view(tensor)
    if matrices is None:
        raise ValueError(f"{name} has strides {tensor.stride()}, which have no view as matrices")
    return matrices


def _new_state(param: Tensor, form: Form | None, layout: Layout) -> dict[str, Any]:
    # State that is made in inference mode could never be changed outside of it.
    with torch.inference_mode(False):
        return {
            name: [each.create(param, form) for each in slot]
            if isinstance(slot, list)
            else slot.create(param, form)
            for name, slot in layout.items()
        }


def _loaded_state(
    name: str, state: dict[str, Any], layout: Layout, param: Tensor, form: Form | None
) -> dict[str, Any]:
    _check_keys(name, state, layout)
    return {
        key: [
            each.load(f"{key}[{i}] of {name}", value, param, form)
            for i, (each, value) in enumerate(zip(slot, state[key], strict=True))
        ]
        if isinstance(slot, list)
        else slot.load(f"{key} of {name}", state[key], param, form)
        for key, slot in layout.items()
    }


def _check_state(name: str, state: dict[str, Any], layout: Layout, param: Tensor) -> None:
    """State that fits the group's values as they are now."""
    _check_keys(name, state, layout)
    for key, slot in layout.items():
        if isinstance(slot, list):
            for i, (each, value) in enumerate(zip(slot, state[key], strict=True)):
                each.check(f"{key}[{i}] of {name}", value, param)
        else:
            slot.check(f"{key} of {name}", state[key], param)


def _check_keys(name: str, state: dict[str, Any], layout: Layout) -> None:
    for key, slot in layout.items():
        if key not in state:
            raise ValueError(f"the state of {name} has no {key}, but {', '.join(state)}")
        if isinstance(slot, list) and len(state[key]) != len(slot):
            raise ValueError(
                f"{key} of {name} has {len(state[key])} blocks where {len(slot)} are needed: the "
                "blocks of a parameter are fixed by its first step"
            )

"""What the optimizers share: groups, routing, the two-phase step, state and checkpoints."""

from __future__ import annotations

import copy
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from .. import _backend, _checks, _dispatch
from .._backend import check_writable
from . import _adamw, _diagnostics, _distributed, _groups, _names, _rules
from ._forms import Form, Layout, Slot, adamw_layout, form_of, layouts
from ._groups import Group, Values
from ._interrupts import uninterrupted
from ._schedule import Counts, due

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

# 1 had two groups, one of each algorithm, where there is one of both kinds now; up to 2 the blocks
# of a parameter were lists.
STATE_VERSION = 3
# Steps without a single gradient, from the first one on, that look like a mistake.
IDLE_STEPS = 3
_COMPLEX = (torch.complex128, torch.complex64)
_WARNED = ("_warned", "_warned_of_skip", "_warned_of_names")


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
class Share:
    """The parameters of a group that have a gradient and take one algorithm.

    Attributes:
        params, grads: those, and their gradients; of what is spread over ranks the plain tensors
            that are stepped here.
        positions: their places in the group.
        keys: the group's own tensors, which their state is filed under.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def add(self, param: Tensor, grad: Tensor, position: int, key: Tensor) -> None:
        """Appends a parameter."""
        self.params.append(param)
        self.grads.append(grad)
        self.positions.append(position)
        self.keys.append(key)

    def only(self, kept: Callable[[Tensor], bool]) -> Share:
        """Those whose key is kept."""
        share = Share()
        for each in zip(self.params, self.grads, self.positions, self.keys, strict=True):
            if kept(each[-1]):
                share.add(*each)
        return share


@dataclass
class Current:
    """The values of a group as they are now, None for an algorithm that it does not hold."""

    matrix: dict[str, Any] | None
    adamw: dict[str, Any] | None


# A group with its place among the groups, its values, and what of it has a gradient.
Work: TypeAlias = tuple[int, Group, Current, tuple[Share, Share]]
MatrixCall: TypeAlias = tuple[Part, list[Tensor], Values, Tensor]
AdamwCall: TypeAlias = tuple[_adamw.Part, list[Tensor], Values, Group]


@dataclass
class Plan:
    """What a step is made of, valid while parameters, their memory and their state stay.

    Attributes:
        params: the parameters.
        layouts: where their elements lie.
        states: every value of their state, the same objects.
        listed: dicts of blocks among those, with the objects in them.
        based, based_layouts: state of which parts hold views, and where its elements lie.
        parts: by device.
        adamw: the same for AdamW.
    """

    params: list[Tensor]
    layouts: list[tuple[Any, ...]]
    states: list[Any]
    listed: list[tuple[list[Tensor], dict[str, Tensor]]]
    based: list[Tensor]
    based_layouts: list[tuple[Any, ...]]
    parts: list[Part] = field(default_factory=list)
    adamw: list[_adamw.Part] = field(default_factory=list)

    def fits(self, params: list[Tensor], states: list[Any]) -> bool:
        """Whether nothing has changed since it was made."""
        return (
            _same_objects(self.params, params)
            and self.layouts == layouts(params)
            and _same_objects(self.states, states)
            and all(_same_objects(known, [*now.values()]) for known, now in self.listed)
            and self.based_layouts == layouts(self.based)
        )


class MatrixOptimizer(_diagnostics.Watched, Optimizer):
    """Base of the optimizers: matrices by one list operator, everything else by AdamW.

    A subclass names its operator and hyper-parameters, lays out the state of a parameter, and turns
    values into the operator's options.
    """

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._matrix_rules = {**_rules.MATRIX, **cls._own_rules}
        both = (*cls._matrix_rules, *_rules.ADAMW, *_groups.ONLY_AUTO)
        cls._names = {
            "matrix": tuple(cls._matrix_rules),
            "adamw": tuple(_rules.ADAMW_GROUP),
            "auto": tuple(dict.fromkeys(both)),
        }

    # What a subclass says.

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

    # Groups.

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
        names = _names_of(group, members, where)
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
        if self._spread is None:
            self._spread = _distributed.spread_of(self, self._how)
        if self._spread is not None:
            self._spread.extend()

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

    @staticmethod
    def _form(param: Tensor, values: Values) -> Form:
        return form_of(param.shape, batched=values["batched"], matrix_dims=values["matrix_dims"])

    def _name(self, index: int, position: int) -> str:
        names = self.param_groups[index].get("param_names")
        return names[position] if names else f"param_groups[{index}]['params'][{position}]"

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Everything is checked before anything is written.

        A step of an optimizer that has no state yet, at which lr is 0 in every group and all
        gradients are zeros, creates the state of those parameters and does nothing else: it is
        counted nowhere, and what follows is what would follow without it. By such a step
        torch.distributed.checkpoint has state made that it wants to save or to load into.

        A CUDA graph can record it where every group has capturable=True, as in torch.optim: the
        step counts of AdamW's tensors then are on the device, and an lr that is a tensor there can
        be changed between replays. Numbers are those of the recording: a float lr, weight_decay,
        betas. Roots and bases are refreshed by the host's schedule, so no step with a refresh can
        be recorded, and a replay has none: take every precondition_frequency-th step outside.

        Args:
            closure: evaluates the model anew, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: a gradient or hyper-parameter that cannot work, naming it.
            RuntimeError: a backend that was asked for cannot run, or a graph is being recorded that
                could not repeat the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    @torch._disable_dynamo
    @uninterrupted
    def _step(self) -> None:
        if _backend.is_capturing():
            self._check_capture()
            self._recorded = True
        if self._spread is not None:
            calls = None
            matrix, adamw = self._spread.step()
        else:
            work = self._work()
            only_makes_state = self._only_makes_state(work)
            if self._watch is not None and not only_makes_state:
                self._watch.begin()
            calls = self._calls(work)
            if only_makes_state:
                return
            matrix, adamw = map(bool, calls)
            if self._idle is not None:
                self._count_idle(matrix or adamw)
        if not matrix:
            self._warn(adamw)
        if calls is not None:
            self._run_all(*calls)
        self._warn_of_skip()

    def _work(self) -> list[Work]:
        """What a step is made of, checked."""
        self._check_ready()
        work = [
            (index, group, self._current(index, group), self._gather(index, group))
            for index, group in enumerate(self.param_groups)
        ]
        for index, group, _, shares in work:
            if group["nonfinite"] == "raise":
                for share in shares:
                    self._raise_nonfinite(index, share)
        return work

    def _calls(self, work: Sequence[Work]) -> tuple[list[MatrixCall], list[AdamwCall]]:
        """The calls of both algorithms, planned."""
        matrix_calls: list[MatrixCall] = []
        adamw_calls: list[AdamwCall] = []
        for index, group, current, (matrix, adamw) in work:
            matrix_calls += self._matrix_calls(index, group, current, matrix)
            if adamw.params:
                assert current.adamw is not None
                plan = self._adamw_plan(index, adamw, current.adamw)
                adamw_calls += [(part, adamw.grads, current.adamw, group) for part in plan.adamw]
        return matrix_calls, adamw_calls

    def _matrix_calls(
        self, index: int, group: Group, current: Current, share: Share, batch: int = 0
    ) -> list[MatrixCall]:
        """The calls for a share of a group's matrices; each batch of a step has its own plans."""
        if not share.params:
            return []
        assert current.matrix is not None
        lr = _checks.learning_rate(group["lr"])
        plan = self._plan(index, group, share, current.matrix, batch)
        return [(part, share.grads, current.matrix, lr) for part in plan.parts]

    def _run_all(
        self, matrix_calls: Sequence[MatrixCall], adamw_calls: Sequence[AdamwCall]
    ) -> None:
        for matrix_call in matrix_calls:
            self._run(*matrix_call)
        for part, grads, values, how in adamw_calls:
            _adamw.run(part, grads, values, self._counter(part.device), how)

    def _check_capture(self) -> None:
        """Raises RuntimeError where a graph of this step would not repeat it."""
        where = "a CUDA graph is being recorded, and "
        if self._spread is not None:
            raise RuntimeError(f"{where}ranks tell one another of errors in every step")
        if self._watch is not None and self._watch.due:
            raise RuntimeError(f"{where}this step is one that diagnostics measure")
        for index, group in enumerate(self.param_groups):
            if not any(param.grad is not None for param in group["params"]):
                continue
            name = f"param_groups[{index}]"
            if not group["capturable"]:
                raise RuntimeError(f"{where}{name} has capturable=False")
            if group["nonfinite"] == "raise":
                raise RuntimeError(f"{where}{name} has nonfinite='raise', which reads gradients")
            for key in ("lr", "adamw_lr"):
                lr = group.get(key)
                if isinstance(lr, Tensor) and lr.device.type == "cpu":
                    raise RuntimeError(
                        f"{where}{key} of {name} is a tensor on the CPU, whose later values no "
                        "replay would see: it has to be on the device, or a number"
                    )
            for position, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if not self.state[param] or param.device not in self._skipped:
                    raise RuntimeError(
                        f"{where}{self._name(index, position)} has no state yet, which every "
                        "replay would set to zero: call init_state(), or take a step before"
                    )

    def _current(self, index: int, group: Group) -> Current:
        """The group's values as they are now, checked; the same dicts until one but lr changes."""
        algorithm = group["algorithm"]
        raw = {name: group.get(name) for name in self._names[algorithm]}
        lrs = raw.pop("lr"), raw.pop("adamw_lr", None)
        where = f"param_groups[{index}]: "
        _rules.check_implementation(group, where)
        known = self._checked.get(index)
        if known is None or known[0] != raw:
            structure = ("batched", "matrix_dims", *self._structure)
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
        if known is not None and _same_objects(known[0], params):
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

    def _gather(self, index: int, group: Group) -> tuple[Share, Share]:
        """What has a gradient, checked: matrices, and AdamW's."""
        matrix, adamw = Share(), Share()
        routes = self._routes_of(index, group)
        for position, (key, is_matrix) in enumerate(zip(group["params"], routes, strict=True)):
            if key.grad is None:
                continue
            param, grad = key, key.grad
            if self._spread is not None:
                param, grad = self._spread.pieces(key)
            if not (
                type(grad) is Tensor
                and grad.dtype is param.dtype
                and grad.layout is torch.strided
                and grad.shape == param.shape
                and not grad.is_meta
            ):
                check_grad(self._name(index, position), param, grad)
                if not is_matrix:
                    grad = grad.to(param.dtype)
            (matrix if is_matrix else adamw).add(param, grad, position, key)
        return matrix, adamw

    def _raise_nonfinite(self, index: int, share: Share) -> None:
        """nonfinite="raise" for every group, before the first one is written."""
        for position, grad in zip(share.positions, share.grads, strict=True):
            if not _adamw.all_finite(grad):
                raise ValueError(f"{self._name(index, position)} has a non-finite gradient")

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

    def _warn(self, stepping: bool) -> None:
        if stepping and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} has no matrix to update: all parameters with a gradient go "
                "to AdamW (were they flattened by a wrapper?)",
                stacklevel=7,
            )

    def _only_makes_state(self, work: Sequence[Work]) -> bool:
        """Whether a step is one that `step` says creates state only."""
        if any(self.state.values()) or not self._stands_still():
            return False
        grads = [grad for *_, shares in work for share in shares for grad in share.grads]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    def _stands_still(self) -> bool:
        """Whether lr is 0 in every group."""
        return not any(float(group["lr"]) for group in self.param_groups)

    def _count_idle(self, stepping: bool) -> None:
        """Warns once where no parameter has had a gradient in any of the first steps."""
        if stepping:
            self._idle = None
            return
        self._check_whole()
        assert self._idle is not None
        self._idle += 1
        if self._idle != IDLE_STEPS:
            return
        wanting = [
            self._name(index, position)
            for index, group in enumerate(self.param_groups)
            for position, param in enumerate(group["params"])
            if param.requires_grad
        ]
        if wanting:
            warnings.warn(
                f"nothing has moved in the first {IDLE_STEPS} steps of this "
                f"{type(self).__name__}: none of its {len(wanting)} parameters that require grad "
                f"({wanting[0]} is the first) has had a gradient. Was the model sharded "
                "(fully_shard), moved, or loaded with assign=True after the optimizer was made? It "
                "has other parameters since then: make the optimizer afterwards",
                stacklevel=7,
            )

    def _check_whole(self) -> None:
        """No parameter that a wrapper cut into pieces after the optimizer was made."""
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                check_whole(self._name(index, position), param)

    def _warn_of_skip(self) -> None:
        """Says once that something was skipped, where the counter can be read without waiting."""
        if self._warned_of_skip:
            return
        counter = self._skipped.get(torch.device("cpu"))
        if counter is not None and int(counter):
            self._warned_of_skip = True
            warnings.warn(
                f"{type(self).__name__} skipped {int(counter)} of its tensors for a non-finite or "
                "overflowing gradient; `skipped` counts further ones",
                stacklevel=7,
            )

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
            state.update(_new_state(param, None, missing))
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
            _check_state(name, self.state[key], layout, param)
        else:
            self.state[key].update(_new_state(param, form, layout))

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

    def _run(self, part: Part, grads: list[Tensor], values: Values, lr: Tensor) -> None:
        """The step of one part."""
        if part.made_from is not values:
            part.options, part.made_from = self._options(values, part), values
        for param, form, staged in part.staged:
            staged.copy_(form.matrices(param))
        cut: list[Tensor] = []
        for place, source in part.sources:
            grad = grads[place] if source is None else source.matrices(grads[place])
            cut += self._cut(grad, values)
        self._call(part, cut, lr, values)
        for param, form, staged in part.staged:
            form.write(param, staged)

    def _due(
        self,
        part: Part,
        values: Values,
        *,
        stagger: bool,
        at_first: bool = False,
        again: Iterable[bool] | None = None,
    ) -> list[int]:
        """For every entry of a part whether roots or bases are taken anew."""
        capturing = _backend.is_capturing()
        if self._recorded and not capturing:
            self._counts.forget(part.lists[-1])
        flags = due(
            part.lists[-1],
            part.offsets,
            values["precondition_frequency"],
            self._counts,
            stagger=stagger,
            at_first=at_first,
            again=again,
        )
        if capturing and any(flags):
            raise RuntimeError(
                f"a CUDA graph is being recorded, and {part.names[flags.index(1)]} is due for new "
                "roots or bases, which only some steps take: record a step without, and take those "
                "with outside of the graph"
            )
        return flags

    def _call(self, part: Part, grads: list[Tensor], lr: Tensor, values: Values) -> None:
        """One call of the list operator."""
        params = part.lists[0]
        if self._watch is not None and self._watch.due:
            self._watch.rehearse(self._operator, part.lists, part.names, grads, part.options)
        _dispatch.run_step(
            self._operator,
            None,
            params,
            grads,
            *part.lists[1:],
            self._counter(params[0].device),
            lr,
            **part.options,
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

    # State.

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
                self.state[key].update(_new_state(param, form, layout))

    def memory_estimate(self) -> int:
        """Bytes of state, on this rank, once every parameter has been stepped."""
        return sum(
            slot.bytes(param)
            for _, param, _, layout in self._all_slots()
            for slots in layout.values()
            for slot in (slots if isinstance(slots, list) else [slots])
        )

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

    def plan(self) -> _distributed.Table:
        """Which rank does what: one row a parameter, which print as a table."""
        return _distributed.table_of(self, self._spread)

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
                state[key] = _loaded_state(name, value, layout, param, form)
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
            values["param_names"] = _checked_names(values["param_names"], count, where)
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
        for each in self.state.values():
            each.update({key: as_blocks(x) for key, x in each.items() if isinstance(x, list)})
        if "param_groups" in state:
            self._routes = {}
        self._forget()

    def _forget(self) -> None:
        """Drops what is derived from groups and state."""
        self._plans: dict[tuple[int, str, int], Plan] = {}
        self._checked: dict[int, tuple[dict[str, Any], Current]] = {}
        self._counts = Counts()


def _same_objects(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def check_param(name: str, param: Any) -> None:
    """A parameter that an optimizer here can update."""
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(param).__name__}")
    if is_lazy(param):
        raise TypeError(f"{name} has no shape yet: run the lazy module once before")
    check_whole(name, param)
    param = _distributed.local_of(name, param)
    _checks.dense(name, param, dtypes=_COMPLEX if param.is_complex() else _checks.FLOATS)
    check_writable(name, param)


def check_whole(name: str, param: Tensor) -> None:
    """A parameter that no wrapper made a piece of a flat one."""
    if getattr(param, "_is_flat_param", False):
        wrapper = "FSDP1"
    elif getattr(param, "_fsdp_flattened", False):
        # It marks the original parameters so, whose shapes it changes to those of 1-D pieces.
        wrapper = "FSDP1 with use_orig_params=True"
    elif hasattr(param, "ds_id") or hasattr(param, "ds_tensor"):
        wrapper = "DeepSpeed's ZeRO"
    else:
        return
    raise TypeError(
        f"{name} is flattened or partitioned by a wrapper ({wrapper}), so its matrix is out of "
        "sight: use fully_shard (FSDP2) in its place, or DDP, which leaves parameters whole"
    )


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """A gradient that can be used, whatever made the quick look doubt it."""
    name = f"the gradient of {name}"
    _checks.dense(name, grad, dtypes=_COMPLEX if param.is_complex() else _checks.FLOATS)
    if grad.is_meta:
        raise TypeError(f"{name} is on the meta device")
    if grad.shape != param.shape:
        raise ValueError(
            f"{name} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}"
        )


def _names_of(group: Group, members: Sequence[Any], where: str) -> list[str]:
    """The parameters' names, from pairs or from param_names; "" where there are none."""
    pairs = [member[0] for member in members if isinstance(member, tuple)]
    given = group.get("param_names")
    if given is None:
        return [member[0] if isinstance(member, tuple) else "" for member in members]
    if pairs:
        raise ValueError(f"{where} names its parameters twice: in pairs and by param_names")
    group["param_names"] = names = _checked_names(given, len(members), where)
    return names


def _checked_names(given: Any, count: int, where: str) -> list[str]:
    """One name for each of some parameters."""
    names = [] if isinstance(given, str) else list(given)
    if len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where}: param_names must be one str for each of {count} parameters, not {given!r}"
        )
    return names


def as_matrices(name: str, tensor: Tensor, form: Form) -> Tensor:
    matrices = form.view(tensor)
    if matrices is None:
        raise ValueError(f"{name} has strides {tensor.stride()}, which have no view as matrices")
    return matrices


def as_blocks(value: Any) -> Any:
    """Blocks by their number as str, from a list, as earlier versions kept them, or a dict.

    Functions of torch.distributed.checkpoint take nested dicts apart, but no lists, and give them
    back with str as keys.
    """
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    return {str(block): x for block, x in value.items()} if isinstance(value, Mapping) else value


def _new_state(param: Tensor, form: Form | None, layout: Layout) -> dict[str, Any]:
    # State that is made in inference mode could never be changed outside of it.
    with torch.inference_mode(False):
        return {
            name: as_blocks([each.create(param, form) for each in slot])
            if isinstance(slot, list)
            else slot.create(param, form)
            for name, slot in layout.items()
        }


def _loaded_state(
    name: str, state: dict[str, Any], layout: Layout, param: Tensor, form: Form | None
) -> dict[str, Any]:
    state = {
        key: as_blocks(value) if isinstance(layout.get(key), list) else value
        for key, value in state.items()
    }
    _check_keys(name, state, layout)
    return {
        key: {
            block: each.load(f"{key}[{block}] of {name}", state[key][block], param, form)
            for block, each in as_blocks(slot).items()
        }
        if isinstance(slot, list)
        else slot.load(f"{key} of {name}", state[key], param, form)
        for key, slot in layout.items()
    }


def _check_state(name: str, state: dict[str, Any], layout: Layout, param: Tensor) -> None:
    """State that fits the group's values as they are now."""
    _check_keys(name, state, layout)
    for key, slot in layout.items():
        if isinstance(slot, list):
            for block, each in as_blocks(slot).items():
                each.check(f"{key}[{block}] of {name}", state[key][block], param)
        else:
            slot.check(f"{key} of {name}", state[key], param)


def _check_keys(name: str, state: dict[str, Any], layout: Layout) -> None:
    for key, slot in layout.items():
        if key not in state:
            raise ValueError(f"the state of {name} has no {key}, but {', '.join(state)}")
        if isinstance(slot, list):
            _check_blocks(f"{key} of {name}", state[key], len(slot))


def _check_blocks(name: str, blocks: Any, count: int) -> None:
    if not isinstance(blocks, dict):
        raise TypeError(f"{name} must be a dict of blocks, not {type(blocks).__name__}")
    if len(blocks) != count:
        raise ValueError(
            f"{name} has {len(blocks)} blocks where {count} are needed: the blocks of a parameter "
            "are fixed by its first step"
        )
    if blocks.keys() != {str(block) for block in range(count)}:
        raise ValueError(f"{name} has blocks {[*blocks]}, expected '0' to '{count - 1}'")

"""A call of every operator, as a value."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spectral_kernels import _dispatch, reference
from spectral_kernels._operators import TABLE
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .inputs import FLOATS, FULL, MUON, gaussian, orthogonal, semidefinite, state_dtype
from .layouts import Placed, same_bits
from .rule import ONE_DRAW, allowed_error, draws, error, errors, jittered, rms, unit_roundoff


@functools.cache
def schemas() -> dict[str, Any]:
    """The operators' schemas, from their source: kernels in Python are tested without the rest."""
    source = (Path(__file__).parents[2] / "csrc" / "ops.cpp").read_text()
    found = {}
    for literals in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', source):
        text = "".join(re.findall(r'"([^"]*)"', literals))
        found[text.partition("(")[0]] = torch._C.parse_schema(f"spectral_kernels::{text}")
    return found


@dataclass
class Case:
    """One call, `op(*args, **options)`; rows of coefficients are triples."""

    op: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    # What the case was made from, if that is all there is to it.
    recipe: str | None = None

    def clone(self) -> Case:
        """Copies of all tensors in their own layouts."""
        return replace(
            self, args=tree_map(_copied, self.args), options=tree_map(_copied, self.options)
        )

    def to(self, dtype: torch.dtype) -> Case:
        def converted(x: Any) -> Any:
            return (
                x.to(dtype, copy=True)
                if isinstance(x, Tensor) and x.is_floating_point()
                else _copied(x)
            )

        return replace(
            self, args=tree_map(converted, self.args), options=tree_map(converted, self.options)
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [x for x in tree_leaves((self.args, self.options)) if isinstance(x, Tensor)]

    def written(self) -> list[Tensor]:
        """Those that the schema says are written."""
        return [x for name in self.names(write=True) for x in tree_leaves(self[name])]

    def read(self) -> list[Tensor]:
        """Those that must not change."""
        written = {id(x) for x in self.written()}
        return [x for x in self.tensors() if id(x) not in written]

    def names(self, *, write: bool) -> list[str]:
        """Positional arguments by whether they are written."""
        arguments = schemas()[self.op].arguments[: len(self.args)]
        return [a.name for a in arguments if bool(a.alias_info and a.alias_info.is_write) == write]

    def __getitem__(self, name: str) -> Any:
        names = [argument.name for argument in schemas()[self.op].arguments]
        return self.args[names.index(name)]

    def with_(self, **changed: Any) -> Case:
        """The same call with some positional arguments or options replaced."""
        names = [argument.name for argument in schemas()[self.op].arguments[: len(self.args)]]
        args = tuple(changed.pop(name, value) for name, value in zip(names, self.args, strict=True))
        assert not set(changed) - set(self.options), f"{self.op} has no {set(changed)}"
        return replace(self, args=args, options={**self.options, **changed}, recipe=None)

    def overload(self) -> Any:
        return getattr(torch.ops.spectral_kernels, self.op).default

    def flat(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the overload itself, whose rows are flat."""

        def flattened(rows: Any) -> list[Any]:
            return [value for row in rows for value in row]

        args, options = list(self.args), dict(self.options)
        if self.op == "newton_schulz":
            args[1] = flattened(args[1])
        if "rows" in options:
            options["rows"] = flattened(options["rows"])
        if self.op == "muon_step_":
            options["restart_ends"] = list(accumulate(map(len, options["restarts"])))
            options["restarts"] = flattened(options["restarts"])
        return tuple(args), options

    def run(self, backend: str | None = None) -> list[Tensor]:
        """Calls the operator on a backend; what it returned, then what it wrote."""
        tensors = [x for x in tree_leaves(self.args) if isinstance(x, Tensor)]
        result = _dispatch.run(self.op, tensors, backend, *self.args, **self.options)
        return [x for x in tree_leaves(result) if isinstance(x, Tensor)] + self.written()

    def run_reference(self) -> Case:
        """Calls the specification on copies, which are returned as the case they became."""
        copied = self.clone()
        getattr(reference, self.op)(*copied.args, **copied.options)
        return copied


def _copied(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return copy.copy(x)
    if any(stride == 0 and n > 1 for n, stride in zip(x.shape, x.stride(), strict=True)):
        return x  # expanded: never written
    same = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return same.copy_(x)


# List steps.

STEPS = tuple(op for op, row in TABLE.items() if row.options is not None)

_ITERATION = {"rows": MUON, "compute_dtype": torch.float32}
# What these tests have otherwise than the public defaults.
_OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "muon_step_": {**_ITERATION, "momentum": 0.9, "weight_decay": 0.1},
    # Roots err by some u / relative_ridge, whatever computes them.
    "shampoo_step_": {"relative_ridge": 1e-2, "weight_decay": 0.1},
    "soap_step_": {"beta1": 0.9, "shampoo_beta": 0.9, "weight_decay": 0.1},
    "deva_step_": {**_ITERATION, "beta1": 0.9, "shampoo_beta": 0.9, "weight_decay": 0.1},
}


def step_options(op: str) -> dict[str, Any]:
    """Every option of a step but those with a value an entry."""
    record = TABLE[op].options
    assert record is not None
    found = {
        name: value for name, value in record.defaults.items() if name not in record.entry_lists
    }
    return found | _OWN_OPTIONS[op]


def new_step(
    op: str,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
    *,
    seed: int = 0,
    lr: float = 0.1,
    sides: Sequence[str] = ("left", "right"),
    per_matrix_counts: bool = False,
    **options: Any,
) -> Case:
    """The first step of a list of matrices: Gaussian params and gradients, fresh state."""
    dtypes = [dtype] * len(shapes) if isinstance(dtype, torch.dtype) else list(dtype)
    merged = step_options(op)
    assert not set(options) - {*merged, "refresh", "restarts", "scales"}, (
        f"{op} has no {set(options) - {*merged}}"
    )
    if op in ("muon_step_", "deva_step_"):
        merged["scales"] = [1.0 + 0.25 * i for i in range(len(shapes))]
    if op == "muon_step_":
        merged["restarts"] = ([(3,), (2, 4), (2,), ()] * len(shapes))[: len(shapes)]
    else:
        merged["refresh"] = [1] * len(shapes)
    merged.update(options)
    params = [
        gaussian(*s, dtype=d, seed=seed + i)
        for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    states = [
        [
            _fresh(name, s, state_dtype(d), merged, sides)
            for s, d in zip(shapes, dtypes, strict=True)
        ]
        for name in TABLE[op].states
    ]
    counts = [torch.zeros(s[:-2] if per_matrix_counts else ()) for s in shapes]
    skipped = torch.zeros((), dtype=torch.int64)
    rate = torch.tensor(lr, dtype=torch.float64)
    case = Case(op, (params, _gradients(params, seed), *states, counts, skipped, rate), merged)
    return case


def next_step(case: Case, seed: int) -> Case:
    """The same lists with new gradients."""
    return case.with_(grads=_gradients(case["params"], seed))


def assert_run_follows_reference(
    first: Case, backend: str, *, steps: int, refreshed: Callable[[int], bool], limit: float
) -> None:
    """Parameters after `steps` further steps of a backend and of the reference, side by side."""
    ours, theirs = first, first.clone()
    for t in range(steps):
        refresh = [int(refreshed(t))] * len(first["params"])
        ours, theirs = (next_step(x, seed=10 * t).with_(refresh=refresh) for x in (ours, theirs))
        ours.run(backend)
        theirs = theirs.run_reference()
    for x, y in zip(ours["params"], theirs["params"], strict=True):
        assert error(x, y) < limit


def later_step(op: str, *args: Any, taken: int = 3, seed: int = 0, **options: Any) -> Case:
    """A step in the middle of a run: the specification has taken `taken` steps before it."""
    recipe = repr((op, args, taken, seed, options))
    if recipe not in _later:
        case = new_step(op, *args, seed=seed, **options)
        for t in range(taken):
            case = next_step(case.run_reference(), seed + 1000 * (t + 1))
        _later[recipe] = replace(case, recipe=recipe)
    return _later[recipe].clone()


_later: dict[str, Case] = {}
_outcomes: dict[str | None, tuple[Case, ...]] = {}


def _outcome(case: Case) -> tuple[Case, ...]:
    """What the specification makes of it in float64, in the dtypes of the case, in float32, and in
    float64 of inputs with one rounding to float32 more.
    """
    outcome = _outcomes.get(case.recipe)
    if outcome is None:
        single = case.to(torch.float32)
        if "compute_dtype" in case.options:
            single.options["compute_dtype"] = torch.float32
        double = case.to(torch.float64)
        inputs = (double, case, single, *(_jittered_case(double, seed) for seed in (1, 2)))
        outcome = tuple(x.run_reference() for x in inputs)
        if case.recipe is not None:
            _outcomes[case.recipe] = outcome
    return outcome


def displacement_noise(case: Case, i: int) -> float:
    """What the roundings of a step's operations make of the way that parameter i moves."""
    truth, _, _, *moved = _outcome(case)
    before = case["params"][i].double()
    way = (truth["params"][i] - before).numpy()
    noise = np.concatenate([errors(other["params"][i] - before, way) for other in moved])
    scale = unit_roundoff(state_dtype(case["params"][i].dtype))
    return math.sqrt(_OPERATIONS) * rms(noise) * scale / unit_roundoff(torch.float32)


def _jittered_case(case: Case, seed: int) -> Case:
    """A float64 case, every factor still symmetric, with one rounding to float32 in its entries."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            return _copied(x)
        y = jittered(x, unit_roundoff(torch.float32), seed)
        square = x.shape[-1] == x.shape[-2] and torch.equal(x, x.mT)
        return y.tril() + y.tril(-1).mT if square else y

    return replace(case, args=tree_map(moved, case.args))


def _gradients(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    return [gaussian(*p.shape, dtype=p.dtype, seed=seed + 100 + i) for i, p in enumerate(params)]


def _fresh(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    options: dict[str, Any],
    sides: Sequence[str],
) -> Tensor:
    *batch, m, n = shape
    if name == "root_failures":
        return torch.zeros(*batch, 2, dtype=torch.int64)
    if name == "second_moments":
        return torch.zeros(*batch, m, 1, dtype=dtype)[..., : 0 if options["beta2"] is None else 1]
    if name == "graft_squares" and options["graft"] in ("none", "sgd"):
        return torch.empty(0, dtype=dtype)
    if name == "exp_avg_sqs" and options.get("variance") == "low_memory":
        return torch.zeros(*batch, m + n, dtype=dtype)
    side = next((side for side in ("left", "right") if name.startswith(side)), None)
    if side is None:
        return torch.zeros(*shape, dtype=dtype)
    if side not in sides:
        return torch.empty(0, dtype=dtype)
    size = m if side == "left" else n
    if name.endswith("roots"):
        return torch.eye(size, dtype=dtype).repeat(*batch, 1, 1)
    return torch.zeros(*batch, size, size, dtype=dtype)


# A step is a chain of some eight operations, each of which rounds its result and, being backward
# stable at best, has the error that a rounding of its input makes. The latter add in squares.
_OPERATIONS = 8.0


def assert_step_rule(case: Case, backend: str, *, roundings: float = _OPERATIONS) -> None:
    """One step obeys the error rule in everything that it writes, entry by entry.

    The truth is the specification in float64, plain torch the specification in the dtypes of the
    case. For float64 it is the one in float32, with its error scaled to the finer roundoff. Beside
    `roundings` of the result, what roundings of the input make of it is allowed: a step takes roots
    and bases of its state, which may be as ill-conditioned as it likes.

    As for `assert_rule`, it is a root mean square that obeys: over the matrices of an entry where
    they are an ensemble, as many as `draws` asks for, and over all errors of the call in units of
    what each may be. Fewer matrices are single draws: one in a hundred roots of 6 x 6 factors has
    three times the error of the others, whatever computes it.
    """
    ours = case.clone()
    ours.run(backend)
    assert_written(ours, case, case.names(write=True), roundings)


def assert_writes_nothing_around(case: Case, layout: str, backend: str) -> None:
    """A step whose tensors lie otherwise in memory, with margins that stay, obeys the rule."""
    placed = {
        name: [Placed(x, layout) for x in case[name]]
        for name in ("grads", *case.names(write=True))
        if name not in ("root_failures", "step_counts", "skipped")
    }
    moved = case.clone().with_(**{name: [x.tensor for x in xs] for name, xs in placed.items()})
    moved.run(backend)
    for xs in placed.values():
        for x in xs:
            x.assert_untouched_around()
    assert_written(moved, case, [name for name in placed if name != "grads"])


def assert_skips_the_second(op: str, scale: float, backend: str) -> None:
    """Of two matrices the one whose gradient is so large keeps every bit, and is counted."""
    case = later_step(op, ((4, 6), (4, 6)))
    case["grads"][1].mul_(scale)
    before = case.clone()
    case.run(backend)
    assert int(case["skipped"]) == 1
    for name in case.names(write=True)[:-1]:
        assert same_bits(case[name][1], before[name][1]), name
        assert name == "root_failures" or not same_bits(case[name][0], before[name][0]), name


def assert_written(
    ours: Case, case: Case, names: Sequence[str], roundings: float = _OPERATIONS
) -> None:
    """`assert_step_rule` of some of what `ours` has written, a run from the start `case`."""
    truth, plain, single, *moved = _outcome(case)
    shares = []
    for name in names:
        lists = (tree_leaves(x[name]) for x in (ours, truth, plain, single, *moved))
        for i, (x, expected, rounded, coarse, *others) in enumerate(zip(*lists, strict=True)):
            if not x.is_floating_point() or x.ndim == 0:
                assert torch.equal(x, rounded), f"{name}[{i}] is {x}, not {rounded}"
            if not x.is_floating_point() or x.ndim == 0 or x.numel() == 0:
                continue
            single_u, u = unit_roundoff(torch.float32), unit_roundoff(x.dtype)
            scale = u / single_u if x.dtype == torch.float64 else 1.0
            baseline = coarse if x.dtype == torch.float64 else rounded
            theirs = rms(errors(baseline, expected)) * scale
            noise = rms(np.concatenate([errors(y, expected) for y in others])) * scale
            floor = math.hypot(roundings * u, math.sqrt(_OPERATIONS) * noise)
            found = errors(x, expected)
            allowed = allowed_error(theirs, floor)
            shares.extend(found / allowed)
            ensemble = len(found) >= draws(*x.shape[-2:])
            assert np.isfinite(found).all() and (not ensemble or rms(found) <= allowed), (
                f"{name}[{i}]: error {rms(found):.3g} against {theirs:.3g}, {allowed:.3g} allowed"
            )
            assert found.max(initial=0.0) <= ONE_DRAW * allowed, (
                f"{name}[{i}]: {found} against {theirs:.3g}, {ONE_DRAW} times {allowed:.3g} allowed"
            )
    assert rms(np.array(shares)) <= 1.0, f"errors over those allowed: {shares}"


# A case or two of every operator, for what all of them promise.


def _newton_schulz(x: Tensor, **options: Any) -> Case:
    merged = {
        "method": "auto",
        "restarts": [3] if x.dtype in FULL else [],
        "compute_dtype": x.dtype,
        "eps": 0.0,
        "norm": "frobenius",
        "norm_factor": 1.0,
    }
    return Case("newton_schulz", (x, MUON), {**merged, **options})


def _inverse_root(a: Tensor, p: int = 4, **options: Any) -> Case:
    return Case(
        "inverse_root", (a, p), {"ridge": 0.0, "relative_ridge": 1e-5, "method": "auto", **options}
    )


def _factors(dtype: torch.dtype, batch: Sequence[int] = (), **sides: bool) -> Case:
    m, n, full = 6, 9, state_dtype(dtype)
    absent = torch.empty(0, dtype=full)

    def factor(name: str, size: int, seed: int) -> Tensor:
        if not sides.get(name, name in ("left", "right")):
            return absent.clone()
        return (
            torch.stack([semidefinite(size, 10.0, seed)] * math.prod(batch))
            .reshape(*batch, size, size)
            .to(full)
        )

    args = (
        factor("left", m, 1),
        factor("right", n, 2),
        gaussian(*batch, m, n, dtype=dtype, seed=3),
    )
    options = {
        "beta": 0.9,
        "weight": 0.1,
        "left_root": factor("left_root", m, 4),
        "right_root": factor("right_root", n, 5),
    }
    return Case("kron_factors_update_", (*args, torch.zeros((), dtype=torch.int64)), options)


# Operators with cases of their own below; all others are tried as their schema says.
_CHOSEN = {
    *("gram", "newton_schulz", "polar", "kron_factors_update_", "kron_precondition"),
    *("inverse_root", "eigenbasis", "refresh_eigenbasis", *STEPS),
}


def cases(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Case]]:
    """Label and case, for every operator that takes tensors of this dtype."""
    yield from _chosen(dtype)
    for op in _dispatch.OPERATORS:
        if op not in _CHOSEN:
            yield op, _from_schema(op, dtype)


def _from_schema(op: str, dtype: torch.dtype) -> Case:
    """What an operator whose tensors may be any matrices of one shape is tried on."""
    values = {"Tensor": gaussian(2, 5, 37, dtype=dtype), "float": 0.5, "int": 2, "bool": True}
    args, options = [], {}
    for argument in schemas()[op].arguments:
        kind = str(argument.type)
        if kind not in values:
            raise KeyError(f"{op} takes a {kind}, {argument.name}: it needs a case of its own")
        if argument.kwarg_only:
            options[argument.name] = values[kind]
        else:
            args.append(_copied(values[kind]))
    return Case(op, tuple(args), options)


def _chosen(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    full = dtype in FULL
    # Wide enough that the Gram form is chosen, tall, batched, and odd.
    yield "gram", Case("gram", (gaussian(2, 5, 37, dtype=dtype),), {})
    yield "newton_schulz", _newton_schulz(gaussian(2, 9, 37, dtype=dtype))
    yield (
        "newton_schulz-square-schatten8",
        _newton_schulz(gaussian(11, 11, dtype=dtype), norm="schatten8"),
    )
    yield "polar", Case("polar", (gaussian(2, 7, 5, dtype=dtype),), {})
    yield "kron_factors_update_", _factors(dtype)
    yield "kron_factors_update_-batch-kl", _factors(dtype, (2,), left_root=True, right_root=True)
    yield "kron_factors_update_-left", _factors(dtype, right=False)
    yield (
        "kron_precondition",
        Case(
            "kron_precondition",
            tuple(gaussian(2, m, n, dtype=dtype) for m, n in ((5, 8), (4, 5), (8, 9))),
            {},
        ),
    )
    yield (
        "kron_precondition-right",
        Case(
            "kron_precondition",
            (gaussian(5, 8, dtype=dtype), torch.empty(0), gaussian(8, 8, dtype=dtype)),
            {},
        ),
    )
    if full:
        a = torch.stack([semidefinite(12, 1e3, seed) for seed in (1, 2)]).to(dtype)
        q = torch.stack([orthogonal(12, seed) for seed in (3, 4)]).to(dtype)
        yield "inverse_root", _inverse_root(a)
        yield "inverse_root-eigen", _inverse_root(a[0], 3, method="eigen", relative_ridge=0.0)
        yield "eigenbasis", Case("eigenbasis", (a,), {})
        yield "refresh_eigenbasis", Case("refresh_eigenbasis", (q, a), {"sort": False})
        yield "refresh_eigenbasis-sort", Case("refresh_eigenbasis", (q[0], a[0]), {"sort": True})
    shapes = ((5, 8), (2, 7, 3), (0, 4), (11, 11), (3, 40))
    for op in STEPS:
        yield op, later_step(op, shapes, dtype, taken=2)
    one = ((6, 9), (2, 4, 4))
    yield "muon_step_-first-counts", new_step("muon_step_", one, dtype, per_matrix_counts=True)
    yield (
        "muon_step_-neurons",
        later_step("muon_step_", (*one, (9, 5)), dtype, taken=1, beta2=0.95, cautious=True),
    )
    yield (
        "shampoo_step_-kl",
        later_step("shampoo_step_", one, dtype, taken=1, kl=True, root=2, graft="none"),
    )
    yield (
        "shampoo_step_-left",
        later_step("shampoo_step_", one, dtype, taken=1, sides=("left",), graft="sgd"),
    )
    yield "soap_step_-first", new_step("soap_step_", one, dtype, skip_first=False)
    yield "deva_step_-first", new_step("deva_step_", one, dtype)
    yield (
        "deva_step_-low-memory",
        later_step("deva_step_", one, dtype, taken=1, variance="low_memory"),
    )
    yield "deva_step_-linf", later_step("deva_step_", one, dtype, taken=1, norm="linf", sides=())


def case(label: str, dtype: torch.dtype = torch.float32) -> Case:
    """A fresh copy of one of `cases`."""
    return _cached_cases(dtype)[label].clone()


_cache: dict[torch.dtype, dict[str, Case]] = {}


def _cached_cases(dtype: torch.dtype) -> dict[str, Case]:
    if dtype not in _cache:
        _cache[dtype] = dict(cases(dtype))
    return _cache[dtype]


def labels(dtype: torch.dtype = torch.float32) -> list[str]:
    return list(_cached_cases(dtype))


def every_case(keep: Callable[[str], bool] = lambda label: True) -> list[tuple[str, torch.dtype]]:
    """(label, dtype) of every case in every dtype."""
    return [(label, dtype) for dtype in FLOATS for label in labels(dtype) if keep(label)]


def named(pair: Any) -> str | None:
    """pytest ids of dtypes."""
    return str(pair).removeprefix("torch.") if isinstance(pair, torch.dtype) else None

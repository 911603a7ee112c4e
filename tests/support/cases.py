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

import torch
from spectral_kernels import _dispatch, reference
from spectral_kernels._operators import TABLE
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .formats import FLOATS, FULL, state_dtype
from .inputs import MUON, gaussian, orthogonal, semidefinite


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
            self, args=tree_map(copied, self.args), options=tree_map(copied, self.options)
        )

    def to(self, dtype: torch.dtype) -> Case:
        def converted(x: Any) -> Any:
            return (
                x.to(dtype, copy=True)
                if isinstance(x, Tensor) and x.is_floating_point()
                else copied(x)
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


def copied(x: Any) -> Any:
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
            args.append(copied(values[kind]))
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

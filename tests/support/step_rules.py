"""What every list step is held to: the accuracy rule, and what it must leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from spectral_kernels._operators import TABLE
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .cases import Case, copied, later_step, new_step, next_step
from .formats import state_dtype
from .layouts import Placed, same_bits
from .rule import (
    FACTOR,
    ONE_DRAW,
    allowed_error,
    draws,
    error,
    errors,
    jittered,
    rms,
    unit_roundoff,
)

# Options of steps in eigenbases, of a list of four square entries.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"maximize": True},
    {"beta1": 0.0},
    {"beta2": 0.0, "shampoo_beta": 0.0},
    {"weight_decay": 0.0},
    {"correct_bias": False},
    {"normalize_grads": True},
    {"eps": 1e-2},
    {"sides": ("left",)},
    {"sides": ("right",)},
    {"sides": ()},
    {"per_matrix_counts": True},
    {"refresh": [1, 0, 1, 0]},
    {"nonfinite": "propagate"},
    {"nonfinite": "raise"},
)


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
            return copied(x)
        y = jittered(x, unit_roundoff(torch.float32), seed)
        square = x.shape[-1] == x.shape[-2] and torch.equal(x, x.mT)
        return y.tril() + y.tril(-1).mT if square else y

    return replace(case, args=tree_map(moved, case.args))


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


def roundings_of(dtype: torch.dtype, products: torch.dtype = torch.float32) -> float:
    """`roundings` of a step whose products are coarser than its dtype; float64 keeps to itself."""
    u = unit_roundoff(dtype)
    coarse = u if dtype == torch.float64 else max(unit_roundoff(products), u)
    return _OPERATIONS * coarse / u


def assert_threads_change_no_bits(case: Case, threads: int, names: Sequence[str]) -> None:
    """What the CPU kernels write to these lists in one thread, they write in several."""
    before, one = torch.get_num_threads(), case.clone()
    try:
        torch.set_num_threads(1)
        one.run("cpu")
        torch.set_num_threads(threads)
        case.run("cpu")
    finally:
        torch.set_num_threads(before)
    for name in names:
        assert case[name] and all(map(same_bits, case[name], one[name])), name


def assert_writes_nothing_around(
    case: Case, layout: str, backend: str, *, but: Sequence[str] = ()
) -> None:
    """A step whose tensors lie otherwise in memory, with margins that stay, obeys the rule.

    Lists named in `but` stay where they are.
    """
    placed = {
        name: [Placed(x, layout) for x in case[name]]
        for name in ("grads", *case.names(write=True))
        if name not in ("root_failures", "step_counts", "skipped", *but)
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


def assert_spares_its_mates(case: Case, spoil: Callable[[Case], None], backend: str) -> None:
    """Matrix 1 of entry 0, which `spoil` makes useless, keeps every bit and is counted.

    What else is in its batch and in the list has the bits of a call without it.
    """
    clean = case.clone()
    spoil(case)
    before = case.clone()
    case.run(backend)
    clean.run(backend)
    assert int(case["skipped"]) == 1
    for name in ("params", *TABLE[case.op].states):
        assert same_bits(case[name][0][1], before[name][0][1]), name
        for i in (0, 2):
            assert same_bits(case[name][0][i], clean[name][0][i]), name
        assert same_bits(case[name][1], clean[name][1]), name


def assert_first_call(
    case: Case, backend: str, *, idle: bool, assert_basis: Callable[[Tensor], None]
) -> None:
    """A call without bases makes them from its factors; an idle one moves nothing yet."""
    before = case.clone()
    expected = case.to(torch.float64).run_reference()
    case.run(backend)
    for i, param in enumerate(case["params"]):
        for name in ("lefts", "rights"):
            limit = 8.0 * unit_roundoff(state_dtype(param.dtype))
            assert error(case[name][i], expected[name][i]) < limit
        for name in ("left_bases", "right_bases"):
            assert_basis(case[name][i])
        assert case["step_counts"][i] == (0.0 if idle else 1.0)
        if idle:
            assert same_bits(param, before["params"][i])
            assert not case["exp_avgs"][i].any() and not case["exp_avg_sqs"][i].any()
        else:
            moved = param.double() - before["params"][i].double()
            truth = expected["params"][i] - before["params"][i].double()
            assert error(moved, truth) <= FACTOR * displacement_noise(before, i)


def assert_zero_gradients_decay_only(
    op: str, backend: str, *, decays: bool = True, **options: Any
) -> None:
    """From the start on: factors and bases of zero gradients are zero, and so are moments."""
    case = new_step(op, ((4, 4),), lr=0.5, weight_decay=0.5, **options)
    case = case.with_(grads=[torch.zeros(4, 4)])
    before = case.clone()
    case.run(backend)
    decay = 0.75 if decays else 1.0
    assert torch.equal(case["params"][0], before["params"][0] * decay)
    for name in TABLE[op].states:
        assert not case[name][0].any(), name


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

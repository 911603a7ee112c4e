"""Bad arguments of every public function: TypeError or ValueError, with every input as it was."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _backend, _dispatch
from support.cases import STEPS, case
from support.inputs import gaussian
from support.layouts import same_bits
from test_public import step_arguments
from torch.utils._pytree import tree_leaves

HUGE = 10**400
META = torch.empty((), device="meta")

NUMBERS = [True, np.True_, "0.1", 1j, math.nan, -1.0, math.inf, HUGE, [0.1], META]
FLAGS = ["yes", 2, None, 0.5, math.nan, [True], 1j, torch.tensor(True)]
ROWS = [True, 3.5, "no such set", [], [[1.0, 2.0]], ["a", "b", "c"], ["abc"] * 3]
ROWS += [[x, 1.0, 1.0] for x in (True, 1j, math.nan, HUGE, "1")]

# Argument, or the type that it is declared with -> values that it must not have.
BAD: dict[str, list[Any]] = {
    "bool": FLAGS,
    "float": NUMBERS,
    "int": [True, 1.5, "3", 0, -1, HUGE, math.nan, 1j, [2]],
    "str": ["no such", 3, True, 1j, math.nan, ["skip"]],
    "lr": [
        *NUMBERS,
        *(torch.tensor(x) for x in (math.nan, math.inf, -math.inf, -0.1, 1, True, 1j)),
        torch.tensor([0.1, 0.2]),
        torch.tensor(math.nan, dtype=torch.bfloat16),
    ],
    "backend": ["no such", 3, True],
    "coefficients": ROWS,
    "compute_dtype": ["bfloat16", torch.int32, torch.complex64, 16, True],
    "refresh": ["yes", 2, 0.5, math.nan, None, [True], [2, 0, 0], ["a", "b", "c"], [0.5] * 3],
    "restarts": ["12", 7, [True], [0], [-1], [99], [1.5], [HUGE], [1j]],
    "root_failures": [3, "abc", [None] * 3, [torch.zeros(2, dtype=torch.int64)], [META] * 3],
    "scale": ["no such", *NUMBERS[:-2], [1.0], ["0.5"] * 3, [True] * 3, [HUGE] * 3, [math.nan] * 3],
    "skipped": [3, [0], torch.zeros(()), torch.zeros(2, dtype=torch.int64), META.long()],
    "step_counts": [
        *(3, "abc", [None] * 3, [torch.zeros(())], [META] * 3, [torch.zeros(7)] * 3),
        [torch.zeros((), dtype=torch.int32)] * 3,
    ],
}


def square(n: int) -> torch.Tensor:
    x = gaussian(n, 2 * n)
    return x @ x.mT


def call_of(name: str) -> tuple[list[Any], dict[str, Any]]:
    """A call that is in order."""
    if name in STEPS:
        return list(step_arguments(name)), {"lr": 0.1}
    calls: dict[str, list[Any]] = {
        "inverse_root": [square(4), 2],
        "eigenbasis": [square(4)],
        "refresh_eigenbasis": [torch.eye(4), square(4)],
        "kron_factors_update_": [square(3), square(4), gaussian(3, 4), 0.9],
        "kron_precondition": [gaussian(3, 4), square(3), square(4)],
    }
    return calls.get(name, [gaussian(3, 4)]), {}


def bad_calls() -> Iterator[tuple[str, str, int]]:
    for name in _dispatch.OPERATORS:
        for key, parameter in inspect.signature(getattr(sk, name)).parameters.items():
            kinds = str(parameter.annotation).split(" | ")
            kind = key if key in BAD else kinds[0]
            for i, value in enumerate(BAD.get(kind, ())):
                if value is not None or "None" not in kinds:
                    yield name, key, i


def bad_value(name: str, key: str, index: int) -> Any:
    annotation = inspect.signature(getattr(sk, name)).parameters[key].annotation
    return BAD[key if key in BAD else str(annotation).split(" | ")[0]][index]


CALLS = list(bad_calls())


def test_every_option_has_bad_values():
    """Only tensors and lists of them are left to other tests."""
    tried = {(name, key) for name, key, _ in CALLS}
    for name in _dispatch.OPERATORS:
        for key, parameter in inspect.signature(getattr(sk, name)).parameters.items():
            assert (name, key) in tried or "Tensor" in str(parameter.annotation), (name, key)
    assert len(CALLS) > 700


@pytest.mark.parametrize("chosen", ["auto", "reference"])
@pytest.mark.parametrize("name", _dispatch.OPERATORS)
def test_bad_options(name, chosen):
    function = getattr(sk, name)
    names = list(inspect.signature(function).parameters)
    args, given = call_of(name)
    before = [x.clone() for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    for _, key, i in (call for call in CALLS if call[0] == name):
        value = bad_value(name, key, i)
        call, options = list(args), {**given, "backend": chosen}
        if names.index(key) < len(args):
            call[names.index(key)] = value
        else:
            options[key] = value
        try:
            function(*call, **options)
        except (TypeError, ValueError):
            pass
        except Exception as error:
            pytest.fail(f"{name}({key}={value!r}) raises {type(error).__name__}: {error}")
        else:
            pytest.fail(f"{name}({key}={value!r}) is accepted")
    after = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    assert same_bits(after, before)


@pytest.mark.parametrize("value", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25)])
def test_numbers_of_other_kinds_are_taken(value):
    given, plain = step_arguments("muon_step_"), step_arguments("muon_step_")
    sk.muon_step_(*given, lr=value, momentum=value, eps=value, scale=value)
    sk.muon_step_(*plain, lr=0.25, momentum=0.25, eps=0.25, scale=0.25)
    assert same_bits(given[0], plain[0])


# Tensors of other devices.


def elsewhere() -> list[tuple[str, str]]:
    return [
        (op, name)
        for op in (*STEPS, "kron_factors_update_")
        for name in [a.name for a in case(op).overload()._schema.arguments[: len(case(op).args)]]
        if name not in ("params", "grad") and not absent(op, name)
    ]


def absent(op: str, name: str) -> bool:
    """Whether the case has size-0 tensors there, which stand for none."""
    value = case(op)[name]
    return isinstance(value, list) and not value[0].numel()


def run_as(how, one):
    """By the operator itself, or by the public function on a backend."""
    if how == "operator":
        args, options = one.flat()
        one.overload()(*args, **options)
    else:
        one.run(how)


@pytest.mark.parametrize("how", ["auto", "reference", "operator"])
@pytest.mark.parametrize("place", elsewhere(), ids="-".join)
def test_a_tensor_on_the_meta_device_is_refused(place, how):
    """It would bring the call to the kernel for shapes, which does nothing."""
    op, name = place
    one = case(op)
    value = one[name]
    moved = [value[0].to("meta"), *value[1:]] if isinstance(value, list) else value.to("meta")
    changed = one.with_(**{name: moved})
    before = one.clone()
    with pytest.raises(ValueError, match=rf"{name}.* on meta"):
        run_as(how, changed)
    assert same_bits(one.written(), before.written())


@pytest.mark.parametrize("op", STEPS)
def test_a_list_on_the_meta_device_has_no_values_and_is_taken(op):
    args, options = case(op).flat()
    meta = [
        [x.to("meta") for x in value] if isinstance(value, list) else value.to("meta")
        for value in args[:-1]
    ]
    assert case(op).overload()(*meta, args[-1], **options) is None


# Tensors whose elements share a place.


def overlapping(x: torch.Tensor) -> torch.Tensor:
    """The shape of x, in too little memory: no stride is 0, and some elements are the same."""
    *batch, m, n = x.shape
    strides = (*(m * n * 9 for _ in batch), 1, max(2, m - 2))
    memory = torch.zeros(1 + sum((k - 1) * s for k, s in zip(x.shape, strides, strict=True)))
    return memory.to(x.dtype).as_strided(x.shape, strides)


WRITTEN = [
    (op, name)
    for op in (*STEPS, "kron_factors_update_")
    for name in case(op).names(write=True)
    if name not in ("step_counts", "skipped", "root_failures") and not absent(op, name)
]


@pytest.mark.parametrize("how", ["auto", "reference"])
@pytest.mark.parametrize("place", WRITTEN, ids="-".join)
def test_overlapping_elements_are_not_written(place, how):
    op, name = place
    one = case(op)
    value = one[name]
    shared = overlapping(value[0] if isinstance(value, list) else value)
    changed = one.with_(**{name: [shared, *value[1:]] if isinstance(value, list) else shared})
    before = one.clone()
    with pytest.raises(ValueError, match=name):
        changed.run(how)
    assert not shared.any()
    assert same_bits(one.written(), before.written())


def test_overlapping_parameters_are_refused_by_optimizers():
    param = torch.nn.Parameter(torch.zeros(40).as_strided((5, 5), (1, 3)))
    with pytest.raises(ValueError, match="overlap"):
        sk.optim.Muon([param])


def test_overlap_is_seen_in_every_layout():
    """Against all addresses; what slicing and permuting make is never refused."""
    for shape in itertools.product((1, 2, 3), repeat=3):
        for strides in itertools.product((0, 1, 2, 3, 4, 7), repeat=3):
            x = torch.empty(64).as_strided(shape, strides)
            places = [
                sum(i * s for i, s in zip(index, strides, strict=True))
                for index in itertools.product(*map(range, shape))
            ]
            if len(set(places)) < len(places):
                assert _backend.may_overlap(x), (shape, strides)
    x = torch.empty(4, 6, 8)
    for view in (x, x[::2, 1::3], x[..., 1:7:2], x[1:2], x[:, :0].expand(5, 4, 0, 8)):
        for order in itertools.permutations(range(view.ndim)):
            assert not _backend.may_overlap(view.permute(order))


@pytest.mark.parametrize("how", ["auto", "reference", "operator"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-3])
@pytest.mark.parametrize("op", STEPS)
def test_the_operators_look_at_a_rate_on_the_cpu(op, value, how):
    one = case(op).with_(lr=torch.tensor(value, dtype=torch.float64))
    before = one.clone()
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\)"):
        run_as(how, one)
    assert same_bits(one.written(), before.written())

"""What the emulation of CUDA alone shows of a list step: memory, launches, order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emulated_cuda import Guarded, arranged, launches, slices
from spectral_kernels._operators import TABLE

from .cases import Case, later_step
from .layouts import same_bits


def lists(case: Case) -> list[str]:
    """Arguments with a tensor an entry."""
    return ["params", "grads", *TABLE[case.op].states, "step_counts"]


def entry_options(case: Case) -> dict[str, list[Any]]:
    """Options with a value an entry."""
    record = TABLE[case.op].options
    assert record is not None
    names = (*record.entry_lists, "restarts")
    return {name: list(case.options[name]) for name in names if name in case.options}


def entry(case: Case, i: int) -> Case:
    """Entry i as a list of its own."""
    one = case.clone()
    options = {name: [values[i]] for name, values in entry_options(case).items()}
    return one.with_(**{name: [one[name][i]] for name in lists(one)}, **options)


def assert_is_its_entries(case: Case, alone: Sequence[int], *, elements: int) -> None:
    """The bits do not depend on mates, on the order of the list, or on how it is cut to slices."""
    together = case.clone()
    together.run("cuda")
    turned = {name: values[::-1] for name, values in entry_options(case).items()}
    backwards = case.clone().with_(**turned)
    for name in lists(case):
        backwards[name].reverse()
    with slices(elements), arranged(1):
        backwards.run("cuda")
    for name in lists(case):
        assert same_bits(backwards[name][::-1], together[name]), name
    for i in alone:
        one = entry(case, i)
        one.run("cuda")
        for name in lists(case):
            assert same_bits(one[name][0], together[name][i]), (name, i)


def assert_touches_nothing_outside(case: Case, *, at_end: bool) -> None:
    """Tensors lie at the end, or at the beginning, of pages that the next one of kills."""
    expected = case.clone()
    expected.run("cuda")
    names = [name for name in lists(case) if name != "step_counts"]
    guards = {name: [Guarded(x, at_end=at_end) for x in case[name]] for name in names}
    guarded = case.with_(**{name: [x.tensor for x in xs] for name, xs in guards.items()})
    guarded.run("cuda")
    assert same_bits(guarded.written(), expected.written())


def launched(op: str, count: int) -> int:
    """Kernels that a step of so many pairs of matrices launches, between refreshes."""
    case = later_step(op, ((4, 6), (6, 3)) * count, refresh=[0] * 2 * count)
    for _ in range(2):  # the first looks whether there are bases
        launches()
        case.run("cuda")
    return launches()

"""deva_step_ of the CUDA C++ kernels: what their emulation alone shows."""

from __future__ import annotations

import pytest
import torch
from spectral_kernels import _cuda
from support.cases import later_step, next_step
from support.emulated_steps import (
    assert_is_its_entries,
    assert_touches_nothing_outside,
    launched,
)
from support.layouts import same_bits
from support.step_rules import assert_step_rule
from test_deva import NORMS_AND_VARIANCES, started

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

# More than one tile down and across, in both orders of memory, and matrices beyond one chip.
LARGE = {"momentum": ((2, 40, 140), (129, 131)), "low_memory": ((33, 130), (130, 33))}


@pytest.mark.parametrize("variance", LARGE)
def test_deva_step_of_larger_matrices(variance):
    shapes = LARGE[variance]
    case = started(shapes, torch.float32, variance=variance, taken=2, sides=("left",))
    case["exp_avgs"][0] = case["exp_avgs"][0].mT.contiguous().mT
    assert_step_rule(case, "cuda")


@pytest.mark.parametrize("norm", ["schatten", "linf"])
def test_means_of_several_blocks(norm):
    case = started(((70, 130),), torch.float32, norm=norm, eps=1e-1, sides=(), taken=2)
    assert_step_rule(case, "cuda")


@pytest.mark.parametrize(("norm", "variance"), NORMS_AND_VARIANCES)
def test_power_of_two_gradients_give_the_same_bits(norm, variance):
    """Between refreshes; the bases' own decompositions take the emulation a second each."""
    case = started(((5, 7),), torch.float32, taken=0, refresh=[0], norm=norm, variance=variance)
    for name in ("lefts", "rights"):
        case[name][0].zero_()

    def run_of_two(scale):
        x = case.clone()
        for seed in (3, 4):
            x = next_step(x, seed)
            x = x.with_(grads=[g * scale for g in x["grads"]])
            x.run("cuda")
        return x["params"]

    unit = run_of_two(1.0)
    for power in (-31, 46):
        assert same_bits(run_of_two(2.0**power), unit), power


@pytest.mark.parametrize("options", [{}, {"variance": "low_memory"}, {"norm": "linf"}], ids=str)
def test_a_list_is_its_entries(options):
    shapes = [(0, 3), *((1 + 7 * i % 12, 1 + 5 * i % 9) for i in range(8)), (4, 0), (2, 5, 3)]
    refresh = [i == 8 for i in range(len(shapes))]
    case = later_step("deva_step_", shapes, taken=2, refresh=refresh, **options)
    assert_is_its_entries(case, (1, 8, 10), elements=100)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("options", [{}, {"variance": "low_memory"}, {"norm": "linf"}], ids=str)
def test_deva_step_touches_nothing_outside(options, at_end):
    case = started(((2, 5, 6), (7, 4)), torch.float32, **options)
    assert_touches_nothing_outside(case, at_end=at_end)


def test_launches_do_not_grow_with_the_list():
    assert launched("deva_step_", 1) == launched("deva_step_", 8) < 60


@pytest.mark.parametrize(
    ("change", "error_type", "sentence"),
    [
        ({"exp_avg_sqs": [torch.zeros(5, 5)]}, ValueError, "exp_avg_sqs"),
        ({"scales": [1.0, 1.0]}, ValueError, "scales has 2 entries"),
        ({"variance": "other"}, ValueError, "variance is 'other'"),
        ({"norm": "linf", "variance": "low_memory"}, ValueError, "low_memory"),
        ({"reference": True}, ValueError, "reference=True has its eps inside"),
        ({"compute_dtype": torch.float64}, NotImplementedError, "not in fp64"),
        ({"rows": ((50.0, 0.0, 0.0),) * 5}, NotImplementedError, "grow beyond"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_anything_is_written(change, error_type, sentence):
    case = later_step("deva_step_", ((5, 6),), refresh=[1]).with_(**change)
    before = case.clone()
    with pytest.raises(error_type, match=sentence):
        case.run("cuda")
    assert same_bits(case.written(), before.written())


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match="not in fp64"):
        later_step("deva_step_", ((5, 6),), torch.float64).run("cuda")


def test_what_is_served_and_what_triton_is_preferred_for(monkeypatch):
    x, lr = torch.empty(7, 1100), torch.tensor(0.1, dtype=torch.float64)
    schatten = {"norm": "schatten", "compute_dtype": torch.float32}
    assert _cuda.rejection("soap_step_", [x, lr], {}) is None
    assert "not in fp64" in _cuda.rejection("deva_step_", [x.double()], schatten)
    assert "more accurate elsewhere" in _cuda.rejection("deva_step_", [x], schatten)
    assert _cuda.rejection("deva_step_", [x], {**schatten, "norm": "linf"}) is None
    square = torch.empty(1, 1).expand(1025, 1025)
    for capability, op, expected in (
        (8, "deva_step_", False),
        (9, "deva_step_", True),
        (9, "soap_step_", False),
        (10, "soap_step_", True),
    ):
        monkeypatch.setattr(_cuda, "_capability", lambda _, found=capability: found)
        assert _cuda.elsewhere(op, [x, lr]) is None
        assert (_cuda.elsewhere(op, [x, square, lr]) is not None) == expected

"""deva_step_ of the CUDA C++ kernels, run by the emulation."""

from __future__ import annotations

import math

import pytest
import torch
from emulated_cuda import Guarded, arranged, launches, slices
from spectral_kernels import _cuda
from support.cases import later_step, new_step, next_step
from support.inputs import gaussian
from support.layouts import LAYOUTS, Placed, same_bits
from support.rule import FACTOR, error, unit_roundoff
from support.step_rules import assert_step_rule, displacement_noise
from test_cuda_eigenbasis import LISTS, NARROW, STATE, entry
from test_deva import LIST, OPTIONS, PUBLIC, SQUARES, TRAJECTORIES, VARIANCES, started

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

U = unit_roundoff(torch.float32)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("refresh", [0, 1])
@pytest.mark.parametrize("variance", VARIANCES)
def test_deva_step(variance, refresh, dtype):
    case = started(LIST, dtype, variance=variance, refresh=[refresh] * len(LIST))
    assert_step_rule(case, "cuda")


@pytest.mark.parametrize("variance", [v for v in VARIANCES if v != "low_memory"])
def test_elementwise_norm(variance):
    case = started(LIST, torch.float32, norm="linf", variance=variance)
    assert_step_rule(case, "cuda")


@pytest.mark.parametrize("refresh", [0, 1])
@pytest.mark.parametrize(
    "options",
    TRAJECTORIES,
    ids=str,
)
def test_public_trajectory(options, refresh):
    case = started(SQUARES, torch.float32, refresh=[refresh] * len(SQUARES), **PUBLIC, **options)
    assert_step_rule(case, "cuda")


@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS,
        {"norm": "linf", "eps_mode": "outside", "eps": 1e-3, "maximize": True},
        {"nonfinite": "propagate"},
        {"nonfinite": "raise"},
    ],
    ids=str,
)
def test_deva_options(options):
    case = started(SQUARES, torch.float32, **options)
    assert_step_rule(case, "cuda")


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_bfloat16_products(dtype):
    case = started(LIST, dtype, compute_dtype=torch.bfloat16)
    u, coarse = unit_roundoff(dtype), unit_roundoff(torch.bfloat16)
    assert_step_rule(case, "cuda", roundings=8.0 * coarse / u)


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


@pytest.mark.parametrize("options", [{}, PUBLIC], ids=["corrected", "public"])
def test_first_call(options):
    case = new_step("deva_step_", SQUARES, **options)
    before = case.clone()
    expected = case.to(torch.float64).run_reference()
    case.run("cuda")
    for i in range(len(SQUARES)):
        assert error(case["lefts"][i], expected["lefts"][i]) < 8.0 * U
        q = case["right_bases"][i].double()
        eye = torch.eye(q.shape[-1], dtype=torch.float64).expand_as(q)
        assert error(q.mT @ q, eye) < 16.0 * U
        assert case["step_counts"][i] == (0.0 if options else 1.0)
        if options:
            assert same_bits(case["params"][i], before["params"][i])
        else:
            moved = case["params"][i].double() - before["params"][i].double()
            truth = expected["params"][i] - before["params"][i].double()
            assert error(moved, truth) <= FACTOR * displacement_noise(before, i)


@pytest.mark.parametrize("norm", ["schatten", "linf"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_power_of_two_gradients_give_the_same_bits(variance, norm):
    if (norm, variance) == ("linf", "low_memory"):
        return
    options = {"norm": norm, "variance": variance}
    case = started(((5, 7),), torch.float32, taken=0, refresh=[0], **options)
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


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("exponent", [-52, 52])
def test_gradients_out_of_range_are_skipped(exponent, nonfinite):
    case = later_step("deva_step_", ((4, 4), (2, 4, 4)), nonfinite=nonfinite)
    case["grads"][1][0] *= 2.0**exponent
    before = case.clone()
    case.run("cuda")
    assert int(case["skipped"]) == 1
    for name in ("params", *STATE):
        assert same_bits(case[name][1][0], before[name][1][0]), name
        assert not same_bits(case[name][1][1], before[name][1][1]), name
        assert not same_bits(case[name][0], before[name][0]), name
    free = before.with_(eps_mode="inside")
    free.run("cuda")
    assert int(free["skipped"]) == 0


@pytest.mark.parametrize("variance", ["momentum", "low_memory"])
@pytest.mark.parametrize("where", ["grads", "exp_avgs", "exp_avg_sqs", "rights"])
def test_what_is_not_finite_is_kept(where, variance):
    case = started(((3, 5, 6), (4, 4)), torch.float32, variance=variance, refresh=[1, 0])
    clean = case.clone()
    case[where][0][1].flatten()[13 % case[where][0][1].numel()] = math.nan
    before = case.clone()
    case.run("cuda")
    clean.run("cuda")
    assert int(case["skipped"]) == 1
    for name in ("params", *STATE):
        assert same_bits(case[name][0][1], before[name][0][1]), name
        for i in (0, 2):
            assert same_bits(case[name][0][i], clean[name][0][i]), name
        assert same_bits(case[name][1], clean[name][1]), name


@pytest.mark.parametrize("options", [{}, {"variance": "low_memory"}, PUBLIC], ids=str)
def test_zero_gradients_from_the_start(options):
    case = new_step("deva_step_", ((4, 4),), lr=0.5, weight_decay=0.5, **options)
    case = case.with_(grads=[torch.zeros(4, 4)])
    before = case.clone()
    case.run("cuda")
    decay = 1.0 if options is PUBLIC else 0.75
    assert torch.equal(case["params"][0], before["params"][0] * decay)
    for name in STATE:
        assert not case[name][0].any(), name


@pytest.mark.parametrize("options", [{}, {"variance": "low_memory"}, {"norm": "linf"}], ids=str)
def test_a_list_is_its_entries(options):
    shapes = [(0, 3), *((1 + 7 * i % 12, 1 + 5 * i % 9) for i in range(8)), (4, 0), (2, 5, 3)]
    refresh = [i == 8 for i in range(len(shapes))]
    case = later_step("deva_step_", shapes, taken=2, refresh=refresh, **options)
    together, sliced = case.clone(), case.clone()
    together.run("cuda")
    with slices(100), arranged(1):
        sliced.run("cuda")
    assert same_bits(sliced.written(), together.written())
    for i in (1, 8, 10):
        one = entry(case.clone(), i).with_(scales=[case.options["scales"][i]])
        one.run("cuda")
        for name in LISTS:
            assert same_bits(one[name][0], together[name][i]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variance", ["momentum", "low_memory"])
def test_deva_step_in_any_layout_writes_nothing_around(variance, layout):
    case = started(((2, 5, 6), (7, 4)), torch.float32, variance=variance)
    names = [
        name
        for name in LISTS
        if name != "step_counts" and not (name == "exp_avg_sqs" and variance == "low_memory")
    ]
    placed = {name: [Placed(x, layout) for x in case[name]] for name in names}
    moved = case.clone().with_(**{name: [x.tensor for x in xs] for name, xs in placed.items()})
    case.run("cuda")
    moved.run("cuda")
    for name, xs in placed.items():
        for x, truth in zip(xs, case[name], strict=True):
            x.assert_untouched_around()
            assert error(x.tensor, truth) < 256.0 * U, name


def test_packed_variances_in_a_strided_buffer():
    case = started(((4, 7),), torch.float32, variance="low_memory")
    expected = case.clone().run("cuda")
    wide = torch.full((22,), torch.nan)
    packed = wide[::2]
    packed.copy_(case["exp_avg_sqs"][0])
    moved = case.with_(exp_avg_sqs=[packed])
    assert same_bits([x.contiguous() for x in moved.run("cuda")], expected)
    assert wide[1::2].isnan().all()


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("options", [{}, {"variance": "low_memory"}, {"norm": "linf"}], ids=str)
def test_deva_step_touches_nothing_outside(options, at_end):
    case = started(((2, 5, 6), (7, 4)), torch.float32, **options)
    expected = case.clone()
    expected.run("cuda")
    names = [name for name in LISTS if name != "step_counts"]
    guards = {name: [Guarded(x, at_end=at_end) for x in case[name]] for name in names}
    case = case.with_(**{name: [x.tensor for x in xs] for name, xs in guards.items()})
    case.run("cuda")
    assert same_bits(case.written(), expected.written())


def test_launches_do_not_grow_with_the_list():
    def launched(count):
        shapes = ((4, 6), (6, 3)) * count
        case = later_step("deva_step_", shapes, refresh=[0] * 2 * count)
        for _ in range(2):  # the first looks whether there are bases
            launches()
            case.run("cuda")
        return launches()

    assert launched(1) == launched(8) < 60


def test_gradients_of_rank_one():
    case = new_step("deva_step_", ((6, 6),))
    outer = gaussian(6, 1) @ gaussian(1, 6, seed=1)
    for _ in range(4):
        case = case.with_(grads=[outer])
        case.run("cuda")
    assert case["params"][0].isfinite().all() and int(case["skipped"]) == 0


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

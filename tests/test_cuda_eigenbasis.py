"""eigenbasis, refresh_eigenbasis and soap_step_ of the CUDA C++ kernels, run by the emulation."""

from __future__ import annotations

import math

import pytest
import torch
from emulated_cuda import Guarded, arranged, launches, slices
from spectral_kernels import eigenbasis, inverse_root, refresh_eigenbasis, soap_step_
from support.cases import later_step, new_step, next_step
from support.inputs import gaussian, integers, orthogonal, semidefinite, with_eigenvalues
from support.layouts import LAYOUTS, Placed, same_bits
from support.rule import FACTOR, error, unit_roundoff
from support.step_rules import assert_step_rule, displacement_noise
from test_eigenbasis import (
    LIST,
    OPTIONS,
    SQUARES,
    assert_orthogonal,
    householder,
    orthogonality,
    reconstruction,
)

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

U = unit_roundoff(torch.float32)


def assert_as_good_as_torch(a):
    values, vectors = eigenbasis(a)
    plain = torch.linalg.eigh(a)
    exact_values = torch.linalg.eigvalsh(a.double()).flip(-1)
    assert reconstruction(a, values, vectors) <= 2.0 * reconstruction(a, *plain) + 4.0 * U
    assert orthogonality(vectors) <= 2.0 * orthogonality(plain[1]) + 4.0 * U
    assert (values - exact_values).abs().max() <= 2.0 * U * exact_values.abs().max()
    assert (values.diff(dim=-1) <= 0.0).all()
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert (largest > 0.0).all()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("n", [1, 2, 5, 17, 32, 33])
def test_error_rule(n, condition):
    assert_as_good_as_torch(semidefinite(n, condition).float())


@pytest.mark.parametrize("n", [70, 128, 129])
def test_error_rule_of_large_matrices(n):
    assert_as_good_as_torch(semidefinite(n, 1e6).float())


@pytest.mark.parametrize("values", ["indefinite", "clusters", "negative"])
def test_any_symmetric_matrix(values):
    n = 20
    spectrum = {
        "indefinite": torch.linspace(-1, 2, n, dtype=torch.float64),
        "clusters": torch.arange(n, dtype=torch.float64) // 7,
        "negative": -torch.logspace(0, -6, n, dtype=torch.float64),
    }[values]
    assert_as_good_as_torch(with_eigenvalues(spectrum, 3).float())


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_null_space_has_a_basis(rank):
    g = gaussian(12, rank)
    values, vectors = eigenbasis(g @ g.mT)
    assert (values[rank:].abs() <= 8.0 * U * values[0]).all()
    assert orthogonality(vectors) <= 8.0 * U


def test_known_bases():
    values, vectors = eigenbasis(torch.diag(torch.tensor([1.0, 4.0, -2.0, 0.0])))
    assert values.tolist() == [4.0, 1.0, 0.0, -2.0]
    assert torch.equal(vectors, torch.eye(4)[:, [1, 0, 3, 2]])
    values, vectors = eigenbasis(torch.zeros(3, 3))
    assert not values.any() and torch.equal(vectors, torch.eye(3))
    values, vectors = eigenbasis(3.0 * torch.eye(4))
    assert torch.equal(values, torch.full((4,), 3.0)) and torch.equal(vectors, torch.eye(4))
    tilted = integers(7, 7)
    assert same_bits(eigenbasis(tilted), eigenbasis(0.5 * (tilted + tilted.mT)))


@pytest.mark.parametrize("power", [-140, -100, 60, 120])
def test_any_scale(power):
    a = semidefinite(6, 100.0).float()
    values, vectors = eigenbasis(a)
    scaled_values, scaled_vectors = eigenbasis(a * 2.0**power)
    if power > -126:  # else the elements lose bits
        assert error(scaled_values[None] * 2.0**-power, values[None]) < 4.0 * U
        assert error(scaled_vectors, vectors) < 4.0 * U
    assert orthogonality(scaled_vectors) <= 8.0 * U


def test_batch_mates_do_not_matter():
    a = torch.stack([semidefinite(10, 100.0, seed).float() for seed in range(4)])
    clean = eigenbasis(a)
    a[1, 2, 3] = math.nan
    a[2, 9, 9] = math.inf
    with arranged(1):
        values, vectors = eigenbasis(a)
    assert values[1:3].isnan().all() and vectors[1:3].isnan().all()
    for i in (0, 3):
        assert same_bits((values[i], vectors[i]), (clean[0][i], clean[1][i]))
        assert same_bits(eigenbasis(a[i]), (values[i], vectors[i]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    a = torch.stack([semidefinite(9, 100.0, seed).float() for seed in (1, 2)])
    placed = Placed(a, layout)
    assert same_bits(eigenbasis(placed.tensor), eigenbasis(a))
    placed.assert_untouched_around()
    for at_end in (True, False):
        assert same_bits(eigenbasis(Guarded(a, at_end=at_end).tensor), eigenbasis(a))


def test_empty_and_refused():
    for shape in ((0, 0), (0, 3, 3), (2, 0, 0)):
        values, vectors = eigenbasis(torch.empty(shape))
        assert values.shape == shape[:-1] and vectors.shape == shape
    with pytest.raises(NotImplementedError, match="not in fp64"):
        eigenbasis(torch.eye(3).double())


@pytest.mark.parametrize("p", [1, 2, 4])
def test_roots_by_eigenvectors(p):
    a = torch.stack([semidefinite(24, 1e8, seed).float() for seed in range(2)])
    options = {"relative_ridge": 1e-9, "method": "eigen", "return_info": True}
    root, info = inverse_root(a, p, **options)
    expected, its_info = inverse_root(a, p, **options, backend="reference")
    assert error(root, expected) < 16.0 * U
    assert info.status.tolist() == its_info.status.tolist()
    assert torch.allclose(info.residual, its_info.residual, rtol=0.0, atol=1e-6)


# refresh_eigenbasis


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("n", [1, 7, 33])
def test_refresh_is_a_round_of_orthogonal_iteration(n, condition):
    a = semidefinite(n, condition, 1).float()
    for q in (orthogonal(n, 5).float(), torch.eye(n)):
        values, new = refresh_eigenbasis(q, a)
        assert_orthogonal(new)
        true_values, true_new, _ = householder(q.double(), a.double())
        plain_values, plain_new, _ = householder(q, a)
        assert (
            error(values[None], true_values[None])
            <= 2.0 * error(plain_values[None], true_values[None]) + 8.0 * U
        )
        if condition < 1e12:  # beyond that the last columns are rounding errors
            noise = 2.0 * U * condition + 8.0 * U
            assert error(new, true_new) <= 2.0 * error(plain_new, true_new) + noise


def test_refresh_of_known_factors():
    a, q = semidefinite(9, 50.0, 2).float(), orthogonal(9, 4).float()
    values, new = refresh_eigenbasis(q, a)
    order = values.argsort(descending=True, stable=True)
    assert same_bits(refresh_eigenbasis(q, a, sort=True), (values[order], new[:, order]))
    for power in (-100, 100):
        scaled_values, scaled = refresh_eigenbasis(q, a * 2.0**power)
        assert same_bits((scaled_values * 2.0**-power, scaled), (values, new))
    zero_values, kept = refresh_eigenbasis(q, torch.zeros_like(a))
    assert not zero_values.any() and same_bits(kept, q)
    spoilt = torch.stack([a, a])
    spoilt[0, 3, 4] = math.inf
    batch = refresh_eigenbasis(q.expand(2, 9, 9), spoilt)
    assert batch[0][0].isnan().all() and batch[1][0].isnan().all()
    assert same_bits((batch[0][1], batch[1][1]), (values, new))
    with pytest.raises(NotImplementedError, match="not in fp64"):
        refresh_eigenbasis(q.double(), a.double())


# soap_step_

NARROW = (torch.float32, torch.bfloat16, torch.float16)
STATE = ("exp_avgs", "exp_avg_sqs", "lefts", "rights", "left_bases", "right_bases")
LISTS = ("params", "grads", *STATE, "step_counts")


def entry(case, i):
    """Entry i as a list of its own."""
    return case.with_(
        **{name: [case[name][i]] for name in LISTS}, refresh=[case.options["refresh"][i]]
    )


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("refresh", [0, 1])
def test_soap_step(refresh, dtype):
    case = later_step("soap_step_", LIST, dtype, taken=6, refresh=[refresh] * len(LIST))
    assert_step_rule(case, "cuda")


@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS,
        {"nonfinite": "propagate"},
        {"nonfinite": "raise"},
    ],
    ids=str,
)
def test_soap_options(options):
    case = later_step("soap_step_", SQUARES, torch.float32, taken=4, **options)
    assert_step_rule(case, "cuda")


def test_soap_step_of_larger_matrices():
    case = later_step("soap_step_", ((70, 40), (20, 66)), torch.float32, taken=2)
    assert_step_rule(case, "cuda")


@pytest.mark.parametrize("skip_first", [True, False])
def test_first_call(skip_first):
    # In its own eigenbases a first gradient is diagonal; a large eps damps the noise beside it.
    case = new_step("soap_step_", SQUARES, skip_first=skip_first, eps=1.0)
    before = case.clone()
    expected = case.to(torch.float64).run_reference()
    case.run("cuda")
    for i in range(len(SQUARES)):
        for name in ("lefts", "rights"):
            assert error(case[name][i], expected[name][i]) < 8.0 * U
        assert orthogonality(case["left_bases"][i]) < 16.0 * U
        assert case["step_counts"][i] == (0.0 if skip_first else 1.0)
        if skip_first:
            assert same_bits(case["params"][i], before["params"][i])
            assert not case["exp_avgs"][i].any() and not case["exp_avg_sqs"][i].any()
        else:
            moved = case["params"][i].double() - before["params"][i].double()
            truth = expected["params"][i] - before["params"][i].double()
            assert error(moved, truth) <= FACTOR * displacement_noise(before, i)


def test_a_run_follows_the_specification():
    for options in ({}, {"permute_squares": True}, {"skip_first": False}):
        ours = new_step("soap_step_", ((6, 6), (8, 8)), eps=1e-2, **options)
        theirs = ours.to(torch.float64)
        for t in range(6):
            refresh = [int(t % 4 == 3)] * 2
            ours, theirs = (
                next_step(x, seed=10 * t).with_(refresh=refresh) for x in (ours, theirs)
            )
            theirs["grads"][:] = [g.double() for g in ours["grads"]]
            ours.run("cuda")
            theirs = theirs.run_reference()
        for x, y in zip(ours["params"], theirs["params"], strict=True):
            assert error(x, y) < 1e-3


@pytest.mark.parametrize(("skip_first", "per_matrix_counts"), [(True, False), (False, True)])
def test_matrices_of_a_batch_begin_when_their_gradients_do(skip_first, per_matrix_counts):
    options = {"skip_first": skip_first, "per_matrix_counts": per_matrix_counts, "eps": 1.0}
    case = new_step(
        "soap_step_", ((3, 5, 5), (2, 4, 4)), weight_decay=0.5, refresh=[0, 1], **options
    )
    theirs = case.clone()
    for t in range(3):
        case, theirs = (next_step(x, t) for x in (case, theirs))
        if t == 0:
            for x in (case, theirs):
                x["grads"][0][1] = 0.0
        if t == 1:
            for x in (case, theirs):
                x["grads"][1][0, 2, 2] = math.nan
        case.run("cuda")
        theirs = theirs.run_reference()
        assert case["left_bases"][0][1].any() == (t > 0)
    for x, y in zip(case["step_counts"], theirs["step_counts"], strict=True):
        assert torch.equal(x, y)
    assert int(case["skipped"]) == int(theirs["skipped"]) == 1
    for name in ("params", "lefts", "exp_avg_sqs"):
        for x, y in zip(case[name], theirs[name], strict=True):
            assert error(x, y) < 1e-2, name


def test_zero_gradients_decay_only():
    for skip_first in (True, False):
        options = {"lr": 0.5, "weight_decay": 0.5, "skip_first": skip_first}
        case = new_step("soap_step_", ((4, 4),), **options).with_(grads=[torch.zeros(4, 4)])
        before = case.clone()
        case.run("cuda")
        decay = 1.0 if skip_first else 0.75
        assert torch.equal(case["params"][0], before["params"][0] * decay)
        for name in STATE:
            assert not case[name][0].any(), name


@pytest.mark.parametrize("where", ["grads", "exp_avgs", "exp_avg_sqs", "lefts", "overflow"])
def test_what_is_not_finite_is_kept(where):
    case = later_step("soap_step_", ((3, 5, 6), (4, 4)), refresh=[1, 1])
    clean = case.clone()
    if where == "overflow":
        case["grads"][0][1] *= 2.0**80  # its squares leave fp32
    else:
        case[where][0][1, 3, 2] = math.nan
    before = case.clone()
    case.run("cuda")
    clean.run("cuda")
    assert int(case["skipped"]) == 1
    for name in ("params", *STATE):
        assert same_bits(case[name][0][1], before[name][0][1]), name
        for i in (0, 2):
            assert same_bits(case[name][0][i], clean[name][0][i]), name
        assert same_bits(case[name][1], clean[name][1]), name


def test_propagate_and_raise():
    case = later_step("soap_step_", ((3, 4), (2, 5, 6)), nonfinite="propagate")
    case["grads"][1][1, 2, 3] = math.nan
    stopped = case.with_(nonfinite="raise").clone()
    untouched = stopped.clone()
    case.run("cuda")
    for name in ("params", *STATE):
        assert case[name][1][1].isnan().any(), name
        assert case[name][1][0].isfinite().all() and case[name][0].isfinite().all(), name
    assert int(case["skipped"]) == 0
    with pytest.raises(ValueError, match=r"grads\[1\] has a non-finite element \(matrix 1\)"):
        stopped.run("cuda")
    assert same_bits(stopped.written(), untouched.written())


def test_a_list_is_its_entries():
    """More entries than one launch takes; in any order, and cut into slices."""
    shapes = [(0, 3), *((1 + 7 * i % 9, 1 + 5 * i % 7) for i in range(50)), (4, 0), (2, 5, 3)]
    refresh = [i % 25 == 1 for i in range(len(shapes))]
    case = later_step("soap_step_", shapes, taken=2, refresh=refresh, sides=("left",))
    together, backwards = case.clone(), case.clone()
    together.run("cuda")
    for name in LISTS:
        backwards[name].reverse()
    backwards.options["refresh"].reverse()
    with slices(500), arranged(1):
        backwards.run("cuda")
    for name in LISTS:
        assert same_bits(backwards[name][::-1], together[name]), name
    for i in (1, 50, 52):
        one = entry(case.clone(), i)
        one.run("cuda")
        for name in LISTS:
            assert same_bits(one[name][0], together[name][i]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_soap_step_in_any_layout_writes_nothing_around(layout):
    case = later_step("soap_step_", ((2, 5, 6), (7, 4)))
    names = [name for name in LISTS if name != "step_counts"]
    placed = {name: [Placed(x, layout) for x in case[name]] for name in names}
    moved = case.with_(**{name: [x.tensor for x in xs] for name, xs in placed.items()})
    expected = case.clone()
    expected.run("cuda")
    moved.run("cuda")
    for name, xs in placed.items():
        for x, truth in zip(xs, expected[name], strict=True):
            x.assert_untouched_around()
            assert error(x.tensor, truth) < 64.0 * U, name


@pytest.mark.parametrize("at_end", [True, False])
def test_soap_step_touches_nothing_outside(at_end):
    case = later_step("soap_step_", ((2, 5, 6), (7, 4)))
    expected = case.clone()
    expected.run("cuda")
    names = [name for name in LISTS if name != "step_counts"]
    guards = {name: [Guarded(x, at_end=at_end) for x in case[name]] for name in names}
    case = case.with_(**{name: [x.tensor for x in xs] for name, xs in guards.items()})
    case.run("cuda")
    assert same_bits(case.written(), expected.written())


def test_launches_do_not_grow_with_the_list():
    def launched(count):
        case = later_step("soap_step_", ((4, 6), (6, 3)) * count, refresh=[0] * 2 * count)
        for _ in range(2):  # the first looks whether there are bases
            launches()
            case.run("cuda")
        return launches()

    assert launched(1) == launched(8) < 30


@pytest.mark.parametrize("permuted", [False, True])
def test_bases_are_looked_at_once(permuted):
    case = later_step("soap_step_", ((2, 3, 4, 4),), refresh=[0])
    if permuted:  # has no common stride, and is worked on matrix by matrix
        names = [name for name in LISTS if name != "step_counts"]
        case = case.with_(**{name: [case[name][0].transpose(0, 1)] for name in names})
    counts = []
    for _ in range(3):
        launches()
        case.run("cuda")
        counts.append(launches())
    assert counts[0] - 1 == counts[1] == counts[2]


def test_learning_rate_on_the_device():
    case = later_step("soap_step_", ((5, 6),), refresh=[0])
    names = ("params", "grads", *STATE)
    options = {k: v for k, v in case.options.items() if k != "nonfinite"}
    for lr in (0.125, torch.tensor(0.125)):
        x = case.clone()
        soap_step_(*(x[name] for name in names), lr=lr, **options)
        y = case.clone().with_(lr=torch.tensor(0.125, dtype=torch.float64))
        y["step_counts"][0].zero_()
        y.run("cuda")
        assert same_bits(x["params"], y["params"])


@pytest.mark.parametrize(
    ("change", "error_type", "sentence"),
    [
        ({"exp_avg_sqs": [torch.zeros(5, 5)]}, ValueError, "exp_avg_sqs"),
        ({"refresh": [1, 1]}, ValueError, "refresh has 2 entries"),
        ({"left_bases": [torch.empty(0)]}, ValueError, r"lefts\[0\] has shape"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite is 'ignore'"),
        ({"lr": torch.tensor(1)}, TypeError, "lr must be float32 or float64"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_anything_is_written(change, error_type, sentence):
    case = later_step("soap_step_", ((5, 6),)).with_(**change)
    before = case.clone()
    with pytest.raises(error_type, match=sentence):
        case.run("cuda")
    assert same_bits(case.written(), before.written())


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match="not in fp64"):
        later_step("soap_step_", ((5, 6),), torch.float64).run("cuda")

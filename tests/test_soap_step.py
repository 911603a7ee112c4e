"""soap_step_ on every backend and instruction set."""

from __future__ import annotations

import math

import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from spectral_kernels._operators import TABLE
from support import step_rules
from support.cases import later_step, new_step, next_step
from support.formats import FLOATS, FULL, named
from support.fuzzing import fuzzed
from support.inputs import generator
from support.layouts import LAYOUTS, same_bits
from support.rule import FACTOR, LEAST_JITTER, error, jittered, orthogonality, unit_roundoff
from support.step_rules import assert_step_rule

pytestmark = pytest.mark.usefixtures("backend")

# Square, so that no factor has a null space, in which the first basis would be LAPACK's choice.
SQUARES = ((5, 5), (2, 4, 4), (9, 9), (1, 1))
LIST = ((5, 8), (9, 4), (2, 3, 6), (1, 6), (12, 12))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("refresh", [0, 1])
def test_soap_step(refresh, dtype, backend):
    case = later_step("soap_step_", LIST, dtype, taken=6, refresh=[refresh] * len(LIST))
    assert_step_rule(case, backend.name)


OPTIONS = (*step_rules.OPTIONS, {"permute_squares": True})


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_soap_options(dtype, options, backend):
    case = later_step("soap_step_", SQUARES, dtype, taken=4, **options)
    assert_step_rule(case, backend.name)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_first_call(dtype, skip_first, backend):
    def assert_basis(q):
        # LAPACK promises a modest multiple of n roundings; MKL leaves up to 25 at n = 9.
        roundings = 16.0 if backend.name == "cuda" else 4.0 * (q.shape[-1] + 1)
        assert orthogonality(q) < roundings * unit_roundoff(dtype)

    # In its own eigenbases a first gradient is diagonal; a large eps damps the noise beside it.
    case = new_step("soap_step_", SQUARES, dtype, skip_first=skip_first, eps=1.0)
    step_rules.assert_first_call(case, backend.name, idle=skip_first, assert_basis=assert_basis)


def test_a_run_follows_the_specification(backend):
    for options in ({}, {"permute_squares": True}, {"skip_first": False, "eps": 1e-2}):
        ours = new_step("soap_step_", ((6, 6), (8, 8)), torch.float64, **options)
        # In its own eigenbases a first gradient is diagonal; what lies beside it is noise over eps.
        noise_over_eps = 0.0 if ours.options["skip_first"] else 8.0 * 2.0**-53 / 1e-2
        theirs, moved = ours.clone(), [ours.clone() for _ in range(3)]
        for t in range(12):

            def step(x, t=t):
                return next_step(x, seed=10 * t).with_(refresh=[int(t % 4 == 3)] * 2)

            ours, theirs = step(ours), step(theirs).run_reference()
            ours.run(backend.name)
            for k, x in enumerate(moved):
                x = step(x)
                grads = [jittered(g, LEAST_JITTER, 100 * k + t) for g in x["grads"]]
                moved[k] = x.with_(grads=grads).run_reference()
        for i, (x, y) in enumerate(zip(ours["params"], theirs["params"], strict=True)):
            # Twelve steps of eight operations each, in units of what one rounding makes.
            furthest = max(error(z["params"][i], y) for z in moved)
            noise = furthest * unit_roundoff(torch.float64) / LEAST_JITTER
            assert error(x, y) <= FACTOR * (math.sqrt(12 * 8) * noise + 2.0**-50 + noise_over_eps)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("options", [{}, {"permute_squares": True}, {"skip_first": False}], ids=str)
def test_a_run_in_float32_follows_the_specification(options, backend):
    ours = new_step("soap_step_", ((6, 6), (8, 8)), eps=1e-2, **options)
    theirs = ours.to(torch.float64)
    for t in range(6):
        refresh = [int(t % 4 == 3)] * 2
        ours, theirs = (next_step(x, seed=10 * t).with_(refresh=refresh) for x in (ours, theirs))
        theirs["grads"][:] = [g.double() for g in ours["grads"]]
        ours.run(backend.name)
        theirs = theirs.run_reference()
    for x, y in zip(ours["params"], theirs["params"], strict=True):
        assert error(x, y) < 1e-3


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize(("skip_first", "per_matrix_counts"), [(True, False), (False, True)])
def test_matrices_of_a_batch_begin_when_their_gradients_do(skip_first, per_matrix_counts, backend):
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
        case.run(backend.name)
        theirs = theirs.run_reference()
        assert case["left_bases"][0][1].any() == (t > 0)
    for x, y in zip(case["step_counts"], theirs["step_counts"], strict=True):
        assert torch.equal(x, y)
    assert int(case["skipped"]) == int(theirs["skipped"]) == 1
    for name in ("params", "lefts", "exp_avg_sqs"):
        for x, y in zip(case[name], theirs[name], strict=True):
            assert error(x, y) < 1e-2, name


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("where", ["grads", "exp_avgs", "exp_avg_sqs", "lefts", "overflow"])
def test_what_is_not_finite_is_kept(where, backend):
    def spoil(case):
        if where == "overflow":
            case["grads"][0][1] *= 2.0**80  # its squares leave fp32
        else:
            case[where][0][1, 3, 2] = math.nan

    case = later_step("soap_step_", ((3, 5, 6), (4, 4)), refresh=[1, 1])
    step_rules.assert_spares_its_mates(case, spoil, backend.name)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125)], ids=["number", "tensor"])
def test_learning_rate_may_be_a_tensor(lr, backend):
    case = later_step("soap_step_", ((5, 6),), refresh=[0])
    names = ("params", "grads", *TABLE["soap_step_"].states)
    options = {k: v for k, v in case.options.items() if k != "nonfinite"}
    one = case.clone().with_(lr=torch.tensor(0.125, dtype=torch.float64))
    one["step_counts"][0].zero_()
    one.run(backend.name)
    sk.soap_step_(*(case[name] for name in names), lr=lr, **options)
    assert same_bits(case["params"], one["params"])


def test_permuted_bases_give_the_same_updates(backend):
    """F16: state bound to a basis follows it, whatever the order of the columns."""
    case = later_step("soap_step_", ((6, 6),), torch.float64, taken=5)
    order = torch.randperm(6, generator=generator(3))
    moved = case.clone()
    moved["left_bases"][0].copy_(case["left_bases"][0][:, order])
    moved["exp_avgs"][0].copy_(case["exp_avgs"][0][order])
    moved["exp_avg_sqs"][0].copy_(case["exp_avg_sqs"][0][order])
    for t in range(20):
        case, moved = (next_step(x, 100 + t) for x in (case, moved))
        case.run(backend.name)
        moved.run(backend.name)
        assert error(moved["params"][0], case["params"][0]) < 1e-10


def test_without_sides_it_is_adam(backend):
    case = new_step("soap_step_", ((4, 7),), torch.float64, sides=(), lr=0.01, weight_decay=0.0)
    param = torch.nn.Parameter(case["params"][0].clone())
    adam = torch.optim.Adam([param], lr=0.01, betas=(0.9, 0.95), eps=0.0)
    case.options["eps"] = 0.0
    for t in range(5):
        case = next_step(case, t)
        param.grad = case["grads"][0].clone()
        adam.step()
        case.run(backend.name)
    assert error(case["params"][0], param.data) < 1e-14


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("skip_first", [True, False])
def test_zero_gradients_from_the_start(skip_first, backend):
    step_rules.assert_zero_gradients_decay_only(
        "soap_step_", backend.name, decays=not skip_first, skip_first=skip_first
    )


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_soap_step_in_any_layout_writes_nothing_around(layout, dtype, backend):
    case = later_step("soap_step_", ((2, 5, 5), (4, 4)), dtype)
    step_rules.assert_writes_nothing_around(case, layout, backend.name)


@st.composite
def soap_steps(draw):
    sizes = st.integers(1, 8)
    square = sizes.map(lambda n: (n, n))
    shapes = draw(
        st.lists(st.one_of(square, square.map(lambda s: (2, *s))), min_size=1, max_size=3)
    )
    return later_step(
        "soap_step_",
        tuple(shapes),
        [draw(st.sampled_from(FLOATS)) for _ in shapes],
        taken=draw(st.integers(2, 4)),
        seed=draw(st.integers(0, 2**20)),
        sides=draw(st.sampled_from([("left", "right"), ("left",), ("right",), ()])),
        beta1=draw(st.sampled_from([0.0, 0.9])),
        correct_bias=draw(st.booleans()),
        normalize_grads=draw(st.booleans()),
        permute_squares=draw(st.booleans()),
        maximize=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-8, 1e-3])),
        refresh=[draw(st.integers(0, 1)) for _ in shapes],
    )


@fuzzed(soap_steps(), long=2000)
def test_any_soap_step(case):
    assert_step_rule(case, "cpu")

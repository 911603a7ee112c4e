"""shampoo_step_ on every backend and instruction set."""

from __future__ import annotations

import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from support.cases import later_step, new_step, next_step
from support.formats import FLOATS, FULL, named
from support.fuzzing import fuzzed
from support.inputs import with_eigenvalues
from support.layouts import LAYOUTS, same_bits
from support.oracles import exact_inverse_root, plain_newton_root
from support.rule import assert_rule, error
from support.step_rules import (
    assert_run_follows_reference,
    assert_skips_the_second,
    assert_step_rule,
    assert_writes_nothing_around,
)
from test_inverse_root import less_exact, plain_eigen_root, root_noise

pytestmark = pytest.mark.usefixtures("backend")


# shampoo_step_

LIST = ((5, 8), (9, 4), (2, 3, 6), (1, 6), (12, 12))


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("refresh", [0, 1])
@pytest.mark.parametrize("root", [2, 4])
def test_shampoo_step(root, refresh, dtype, backend):
    case = later_step("shampoo_step_", LIST, dtype, root=root, refresh=[refresh] * len(LIST))
    assert_step_rule(case, backend.name)


@pytest.mark.parametrize("sides", [("left", "right"), ("left",), ("right",), ()], ids=str)
@pytest.mark.parametrize("graft", ["none", "sgd", "adagrad", "rmsprop", "adam"])
def test_grafting_and_sides(graft, sides, backend):
    case = later_step("shampoo_step_", LIST, graft=graft, sides=sides)
    assert_step_rule(case, backend.name)


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.parametrize("refresh", [0, 1])
@pytest.mark.parametrize("sides", [("left", "right"), ("left",), ("right",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=named)
def test_kl_shampoo_step(dtype, sides, refresh, order, backend):
    options = {"kl": True, "root": 2, "kl_order": order, "refresh": [refresh] * len(LIST)}
    case = later_step("shampoo_step_", LIST, dtype, sides=sides, **options)
    assert_step_rule(case, backend.name)


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"beta1": 0.0, "beta2": 0.0},
        {"beta2": 1.0, "debias": False},
        {"debias": False},
        {"weight_decay": 0.0},
        {"root": 3, "relative_ridge": 0.0, "ridge": 0.5},
        {"root_method": "eigen", "relative_ridge": 0.1},
        {"graft_eps_mode": "absolute", "graft_eps": 1e-3},
        {"per_matrix_counts": True},
        {"refresh": [1, 0, 1, 0, 1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_shampoo_options(dtype, options, backend):
    case = later_step("shampoo_step_", LIST, dtype, **options)
    assert_step_rule(case, backend.name)


@pytest.mark.parametrize("options", [{}, {"kl": True, "root": 2}], ids=["shampoo", "kl"])
def test_first_step(options, backend):
    assert_step_rule(new_step("shampoo_step_", LIST, **options), backend.name)


@pytest.mark.parametrize("options", [{}, {"kl": True, "root": 2}], ids=["shampoo", "kl"])
def test_a_run_follows_the_specification(options, backend):
    first = new_step("shampoo_step_", ((6, 9), (8, 3)), torch.float64, **options)
    follows = {"steps": 8, "refreshed": lambda t: t % 3 == 0, "limit": 1e-9}
    assert_run_follows_reference(first, backend.name, **follows)


def test_shampoo_is_the_sum_of_its_families(backend):
    """Left adaptation x orthogonalization x right adaptation."""
    case = later_step("shampoo_step_", ((6, 6),), torch.float64, graft="none", weight_decay=0.0)
    before = case["params"][0].clone()
    case.run(backend.name)
    update = (before - case["params"][0]) / 0.1
    m = case["momentum_buffers"][0] / (1.0 - 0.9**4)
    adapted = decomposed(m, case["left_roots"][0], case["right_roots"][0])
    assert error(adapted, update) < 1e-9


def decomposed(m, left_root, right_root):
    """[L^-1/4 (M M^T)^1/4] polar(M) [(M^T M)^1/4 R^-1/4] from the library's own functions."""
    left, right = (sk.inverse_root(sk.inverse_root(sk.gram(x), 4), 1) for x in (m, m.mT))
    orthogonal = sk.newton_schulz(m, coefficients="convergent", steps=60)
    middle = sk.kron_precondition(orthogonal, left, right)
    return sk.kron_precondition(middle, left_root, right_root)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)], ids=str)
def test_shampoo_without_memory_is_the_polar_factor(shape, backend):
    """With beta1 = beta2 = 0 and the exponent 1/4, L^-1/4 G R^-1/4 = polar(G)."""
    options = {"beta1": 0.0, "beta2": 0.0, "relative_ridge": 0.0, "graft": "none", "lr": 1.0}
    case = new_step("shampoo_step_", (shape,), torch.float64, weight_decay=0.0, **options)
    before, grad = case["params"][0].clone(), case["grads"][0]
    case.run(backend.name)
    assert error(before - case["params"][0], sk.polar(grad)) < 1e-9
    orthogonal = sk.newton_schulz(grad, coefficients="convergent", steps=60)
    assert error(orthogonal, sk.polar(grad)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"kl": True, "root": 2}], ids=["shampoo", "kl"])
def test_power_of_two_gradients_give_the_same_update(options, backend):
    case = new_step("shampoo_step_", ((5, 7),), **options)
    first = next_step(case, 3).clone()
    unit = run_of_two(first, 1.0, backend)
    for k in (-48, -4, 4, 48):
        # Factors scale by 2^2k (KL by 2^k), so multiples of the root keep even the bits.
        assert same_bits(run_of_two(first, 2.0**k, backend), unit), k
    for k in (-7, 3):
        for x, y in zip(run_of_two(first, 2.0**k, backend), unit, strict=True):
            assert error(x, y) < 1e-4


@pytest.mark.parametrize(
    ("options", "power"),
    [
        ({"graft": "none", "root": 4}, 0),
        ({"graft": "none", "root": 2, "sides": ("left",)}, 0),
        ({"graft": "none", "root": 2, "sides": ("right",)}, 0),
        ({"graft": "none", "root": 2, "kl": True}, 0),
        ({"graft": "none", "root": 2}, -1),
        ({"graft": "none", "root": 8}, 0.5),
        ({"graft": "sgd", "root": 4}, 1),
        ({"graft": "rmsprop", "root": 2}, 0),
        ({"graft": "adagrad", "root": 8}, 0),
    ],
    ids=str,
)
def test_updates_scale_as_the_formula(options, power, backend):
    first = new_step("shampoo_step_", ((5, 7),), torch.float64, weight_decay=0.0, **options)
    before = first["params"][0]
    unit, scaled = (before - run_of_two(first.clone(), 2.0**k, backend)[0] for k in (0, 8))
    assert error(scaled, unit * 2.0 ** (8 * power)) < 1e-4


def run_of_two(case, scale, backend):
    case = case.clone()
    for seed in (3, 4):
        case = next_step(case, seed)
        case = case.with_(grads=[g * scale for g in case["grads"]])
        case.run(backend.name)
    return case["params"]


@pytest.mark.parametrize("exponent", [-52, 52])
def test_gradients_out_of_range_are_skipped(exponent, backend):
    assert_skips_the_second("shampoo_step_", 2.0**exponent, backend.name)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("relative_ridge", [0.0, 1e-6])
@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("old_end", [1.0, 1e-2, 1e-4, 0.0])
def test_an_old_root_of_another_spectrum_misleads_nobody(
    old_end, least, relative_ridge, dtype, backend
):
    """Where the old root's spectrum ended is a guess of where the new one does, and no more."""
    n = 48
    options = {"beta2": 1.0, "debias": False, "root": 4, "sides": ("left",)}
    case = new_step("shampoo_step_", ((n, 2),), dtype, relative_ridge=relative_ridge, **options)
    case["step_counts"][0].fill_(3)
    # All at one, but for a single eigenvalue: it has the smallest share of any probe.
    values = torch.ones(n, dtype=torch.float64)
    values[-1] = least
    case["lefts"][0].copy_(with_eigenvalues(values))
    old = torch.linspace(1.0, max(old_end, 1e-12), n, dtype=torch.float64) ** -0.25
    case["left_roots"][0].copy_(torch.diag(old) if old_end else torch.zeros(n, n))
    case["grads"][0].mul_(1e-6)
    case.run(backend.name)
    factor = case["lefts"][0]
    delta = relative_ridge * float(factor.double().abs().sum(-1).max())
    expected = exact_inverse_root(factor, 4, delta)
    # One draw is lucky with one of them: eigh has some four times Newton's error on most.
    routes = [plain_newton_root(factor, 4, delta), plain_eigen_root(factor, 4, delta)]
    noise = root_noise(factor, 4, delta)
    assert_rule(case["left_roots"][0], less_exact(routes, expected), expected, noise=noise)
    assert not case["root_failures"][0].any()


def test_failed_root_keeps_the_old_one_and_is_counted(backend):
    """F09: an indefinite factor has no root."""
    case = later_step("shampoo_step_", ((4, 6), (4, 6)), relative_ridge=0.0)
    case["lefts"][1].copy_(torch.diag(torch.tensor([100.0, 1.0, 1.0, -100.0])))
    old = case["left_roots"][1].clone()
    case.run(backend.name)
    assert case["root_failures"][1].tolist() == [1, 0]
    assert case["root_failures"][0].tolist() == [0, 0]
    assert same_bits(case["left_roots"][1], old)
    assert case["params"][1].isfinite().all() and int(case["skipped"]) == 0


@pytest.mark.parametrize("options", [{}, {"kl": True, "root": 2}], ids=["shampoo", "kl"])
def test_zero_gradients_from_the_start_only_decay(options, backend):
    case = new_step("shampoo_step_", ((4, 6),), lr=0.5, weight_decay=0.5, **options)
    case = case.with_(grads=[torch.zeros(4, 6)])
    before = case.clone()
    case.run(backend.name)
    assert torch.equal(case["params"][0], before["params"][0] * 0.75)
    assert same_bits(case["left_roots"], before["left_roots"])
    assert not case["root_failures"][0].any() and case["step_counts"][0] == 1.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"kl": True, "root": 2}], ids=["shampoo", "kl"])
def test_shampoo_step_in_any_layout_writes_nothing_around(options, layout, backend):
    case = later_step("shampoo_step_", ((2, 6, 9), (7, 5)), torch.float64, **options)
    assert_writes_nothing_around(case, layout, backend.name)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("empty", [(0, 5), (5, 0), (2, 0, 4)], ids=str)
def test_empty_entries_of_a_shampoo_step(empty, position, backend):
    shapes = [(3, 4), (5, 5)]
    alone = later_step("shampoo_step_", tuple(shapes)).run(backend.name)
    case = later_step("shampoo_step_", tuple(shapes))
    nothing = new_step("shampoo_step_", (empty,))
    for name in ("grads", *case.names(write=True)):
        if name != "skipped":
            case[name].insert(position, nothing[name][0])
    case.options["refresh"] = [1, 1, 1]
    case.run(backend.name)
    for name in case.names(write=True):
        if name != "skipped":
            del case[name][position]
    assert same_bits(case.written(), alone)


@st.composite
def shampoo_steps(draw):
    sizes = st.integers(1, 9)
    shape = st.one_of(st.tuples(sizes, sizes), st.tuples(st.just(2), sizes, sizes))
    kl = draw(st.booleans())
    shapes = tuple(draw(st.lists(shape, min_size=1, max_size=3)))
    return later_step(
        "shampoo_step_",
        shapes,
        [draw(st.sampled_from(FLOATS)) for _ in shapes],
        taken=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**20)),
        sides=draw(st.sampled_from([("left", "right"), ("left",), ("right",)])),
        kl=kl,
        root=2 if kl else draw(st.integers(1, 4)),
        kl_order=draw(st.sampled_from(["sequential", "simultaneous"])),
        relative_ridge=draw(st.sampled_from([1e-2, 1e-1])),
        graft=draw(st.sampled_from(["none", "sgd", "adagrad", "rmsprop", "adam"])),
        beta2=draw(st.sampled_from([0.0, 0.9, 1.0])),
        debias=draw(st.booleans()),
        maximize=draw(st.booleans()),
        refresh=[draw(st.integers(0, 1)) for _ in shapes],
    )


@fuzzed(shampoo_steps(), long=2000)
def test_any_shampoo_step(case):
    assert_step_rule(case, "cpu")


@pytest.mark.parametrize(
    "failures",
    [torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)],
    ids=["float", "narrow", "length"],
)
def test_bad_counts_of_failures_are_refused(failures, backend):
    case = new_step("shampoo_step_", [(4, 5)], torch.float32)
    given = case.with_(root_failures=[failures])
    before = given["params"][0].clone()
    with pytest.raises((TypeError, ValueError), match="root_failures"):
        given.run(backend.name)
    assert torch.equal(given["params"][0], before)

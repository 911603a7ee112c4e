"""inverse_root and shampoo_step_ on every backend and instruction set."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from support import (
    FLOATS,
    FULL,
    LAYOUTS,
    Placed,
    assert_rule,
    assert_step_rule,
    assert_written,
    decaying,
    draws,
    error,
    errors,
    exact,
    exact_inverse_root,
    fuzzed,
    gaussian,
    generator,
    input_noise,
    later_step,
    named,
    new_step,
    next_step,
    plain_newton_root,
    rms,
    same_bits,
    semidefinite,
    semidefinites,
    unit_roundoff,
    with_eigenvalues,
)

pytestmark = pytest.mark.usefixtures("backend")

CONVERGED, STAGNATED, FELL_BACK, RANK_DEFICIENT, NON_FINITE = range(5)


def plain_eigen_root(a, p, delta):
    values, vectors = torch.linalg.eigh(a)
    return (vectors * (values + delta) ** (-1.0 / p)) @ vectors.mT


def root_noise(a, p, delta):
    """What a rounding of A makes of its root."""
    return input_noise(lambda x: plain_eigen_root(x, p, delta), a, a.dtype)


def less_exact(routes, expected):
    """Of plain torch's ways to a root."""
    return max(routes, key=lambda roots: rms(errors(roots, expected)))


@functools.cache
def problem(n, condition, p, relative_ridge, dtype):
    """An ensemble, its roots, plain torch's by coupled Newton and by eigh, and `root_noise`."""
    # Its error lies in the directions of the smallest eigenvalues, four entries' worth at most.
    a = semidefinites(draws(2, 2), n, condition).to(dtype)
    delta = relative_ridge * a.abs().sum(-1).amax(-1).double()
    each = [(x, p, float(d)) for x, d in zip(a, delta, strict=True)]
    expected = np.stack([exact_inverse_root(*one) for one in each])
    plain = {
        "iteration": [torch.stack([plain_newton_root(*one) for one in each])],
        "eigen": [torch.stack([plain_eigen_root(*one) for one in each])],
    }
    return a, expected, plain, rms(np.array([root_noise(*one) for one in each]))


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("n", [2, 9, 24])
def test_error_of_the_iteration_is_at_most_twice_torchs(n, condition, p, dtype):
    a, expected, plain, noise = problem(n, condition, p, 1.0 / condition, dtype)
    root, info = sk.inverse_root(a, p, relative_ridge=1.0 / condition, return_info=True)
    # At 1e6 the residual in float32 is near its limit.
    assert ((info.status == CONVERGED) | (condition == 1e6) & (info.status == FELL_BACK)).all()
    # There, with p above 4, the error is up to 2.6 times that of the longer coupled Newton
    # iteration, and still below that of eigh.
    routes = [*plain["iteration"], *plain["eigen"]] if condition == 1e6 else plain["iteration"]
    assert_rule(root, less_exact(routes, expected), expected, noise=noise)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_a_ridge_far_below_the_spectrum_costs_no_accuracy(condition, p, dtype):
    # The ridge only bounds the spectrum from below; most matrices do not come near the bound.
    a, expected, plain, noise = problem(24, condition, p, 1e-6, dtype)
    root = sk.inverse_root(a, p, relative_ridge=1e-6)
    assert_rule(root, plain["iteration"], expected, noise=noise)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("p", [1, 2, 4, 7])
@pytest.mark.parametrize("condition", [10.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 9, 24])
def test_error_of_the_decomposition_is_at_most_twice_torchs(n, condition, p, dtype):
    a, expected, plain, noise = problem(n, condition, p, 0.0, dtype)
    root, info = sk.inverse_root(a, p, return_info=True)
    assert (info.status == CONVERGED).all() and (info.steps == 0).all() and not info.delta.any()
    assert_rule(root, plain["eigen"], expected, noise=noise)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("condition", [1e9, 1e12])
@pytest.mark.parametrize("p", [2, 4])
def test_hopeless_condition_gives_a_bounded_root(p, condition, dtype):
    a = semidefinite(20, condition).to(dtype)
    for relative_ridge in (0.0, 1e-6):
        root, info = sk.inverse_root(a, p, relative_ridge=relative_ridge, return_info=True)
        assert root.isfinite().all()
        assert info.status in (CONVERGED, FELL_BACK, RANK_DEFICIENT)
        assert info.residual <= 0.25
        assert torch.linalg.eigvalsh(root.double())[0] > -1e-3 * root.abs().max()


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("method", ["auto", "iteration", "eigen"])
def test_roots_of_known_matrices(method, dtype):
    tolerance = 100.0 * unit_roundoff(dtype)
    eye = torch.eye(5, dtype=dtype)
    options = {"method": method, "relative_ridge": 0.0625}
    # I + I / 16, and 16 I: the ridge of a multiple of I is that multiple of the ridge.
    assert error(sk.inverse_root(eye, 4, **options), eye.double() * 1.0625**-0.25) < tolerance
    sixteen = sk.inverse_root(16.0 * eye, 4, **options)
    assert error(sixteen, eye.double() * 17.0**-0.25) < tolerance
    diagonal = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    root = sk.inverse_root(diagonal.to(dtype), 2, method=method, ridge=0.25)
    assert error(root, torch.diag((diagonal.diagonal() + 0.25) ** -0.5)) < tolerance
    # The tridiagonal Toeplitz matrix: eigenvalues 3 + 2 cos(j pi / 9), vectors of sines.
    j = torch.arange(1, 9, dtype=torch.float64)
    values = 3.0 + 2.0 * (j * torch.pi / 9).cos()
    vectors = (2.0 / 9) ** 0.5 * (torch.outer(j, j) * torch.pi / 9).sin()
    toeplitz = 3.0 * torch.eye(8) + torch.diag(torch.ones(7), 1) + torch.diag(torch.ones(7), -1)
    for p in (1, 2, 3, 4, 8):
        root = sk.inverse_root(toeplitz.to(dtype), p, method=method, ridge=0.01)
        expected = (vectors * (values + 0.01) ** (-1.0 / p)) @ vectors.mT
        assert error(root, expected) < tolerance


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_delta_is_the_larger_ridge(dtype):
    a = torch.stack([semidefinite(6, 10.0, seed) for seed in (1, 2)]).to(dtype)
    row_sum = a.abs().sum(-1).amax(-1)
    for ridge, relative in ((0.0, 0.0), (0.125, 0.0), (0.0, 1e-3), (1e-3, 1.0), (1e3, 1e-6)):
        _, info = sk.inverse_root(a, 2, ridge=ridge, relative_ridge=relative, return_info=True)
        expected = torch.maximum(torch.full_like(row_sum, ridge), relative * row_sum)
        torch.testing.assert_close(info.delta, expected, rtol=4 * unit_roundoff(dtype), atol=0.0)


@pytest.mark.parametrize("method", ["iteration", "eigen"])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
def test_root_inverts(p, method):
    a = semidefinite(15, 100.0)
    root, info = sk.inverse_root(a, p, relative_ridge=1e-3, method=method, return_info=True)
    power = torch.linalg.matrix_power(root, p)
    eye = torch.eye(15, dtype=torch.float64)
    assert error(power @ (a + info.delta * eye), eye) < 1e-10
    assert error(root @ a, a @ root) < 1e-11


@pytest.mark.parametrize("method", ["auto", "iteration", "eigen"])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_root_is_exactly_symmetric(dtype, method):
    a = torch.stack([semidefinite(33, 1e3, seed) for seed in (1, 2)]).to(dtype)
    root = sk.inverse_root(a, 4, relative_ridge=1e-4, method=method)
    assert same_bits(root, root.mT)


@pytest.mark.parametrize("method", ["auto", "iteration", "eigen"])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_power_of_two_scales_give_the_same_bits(dtype, p, method):
    a = semidefinite(11, 1e3).to(dtype)
    root = sk.inverse_root(a, p, relative_ridge=1e-4, method=method)
    for k in (-96 // p, -3, 5, 96 // p):
        scaled = sk.inverse_root(a * 2.0 ** (p * k), p, relative_ridge=1e-4, method=method)
        assert same_bits(scaled * 2.0**k, root), k


@pytest.mark.parametrize("p", [2, 4])
def test_extreme_scales(p):
    # A may be as large or small as its dtype holds, as long as the root fits.
    a = semidefinite(6, 10.0)
    for scale in (2.0**-1000, 2.0**1000):
        root = sk.inverse_root(a * scale, p, relative_ridge=1e-3)
        assert same_bits(root * scale ** (1.0 / p), sk.inverse_root(a, p, relative_ridge=1e-3))
    for scale in (2.0**-120, 2.0**120):
        root = sk.inverse_root((a * scale).float(), p, relative_ridge=1e-3)
        assert same_bits(
            root * scale ** (1.0 / p), sk.inverse_root(a.float(), p, relative_ridge=1e-3)
        )


@pytest.mark.parametrize("method", ["auto", "iteration", "eigen"])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_zero_matrix(dtype, method):
    zero = torch.zeros(2, 4, 4, dtype=dtype)
    root, info = sk.inverse_root(zero, 4, method=method, return_info=True)
    assert not root.any() and (info.status == RANK_DEFICIENT).all()
    root, info = sk.inverse_root(zero, 4, method=method, ridge=2.0**-8, return_info=True)
    expected = torch.eye(4).double().repeat(2, 1, 1) * 4.0
    assert error(root, expected) < 8 * unit_roundoff(dtype)
    assert (info.status == CONVERGED).all()
    # A ridge relative to 0 is no ridge.
    assert not sk.inverse_root(zero, 4, method=method, relative_ridge=1e-3).any()


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("rank", [1, 7, 11])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_singular_matrix_has_a_pseudo_inverse_root(p, rank, dtype):
    values = torch.zeros(12, dtype=torch.float64)
    values[:rank] = decaying(rank, 10.0)
    a = with_eigenvalues(values, seed=4)
    root, info = sk.inverse_root(a.to(dtype), p, return_info=True)
    assert info.status == RANK_DEFICIENT
    values[:rank] **= -1.0 / p
    assert error(root, with_eigenvalues(values, seed=4)) < 500.0 * unit_roundoff(dtype)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("kind", ["gradient", "duplicated rows", "noise", "rank 0 but one"])
def test_rank_deficient_factor_with_a_ridge(kind, dtype):
    """F06: what few gradients leave, including slightly negative eigenvalues."""
    g = gaussian(16, 3, dtype=torch.float64)
    if kind == "duplicated rows":
        g = gaussian(16, 40, dtype=torch.float64)
        g[8:] = g[:8]
    elif kind == "rank 0 but one":
        g[1:] = 0.0
    a = (g @ g.mT).to(dtype)
    if kind == "noise":
        a = a + 1e-7 * float(a.abs().max()) * gaussian(16, 16, seed=1).to(dtype)
    root, info = sk.inverse_root(a, 4, relative_ridge=1e-4, return_info=True)
    symmetric = 0.5 * (a + a.mT)
    expected = exact_inverse_root(symmetric.double().float(), 4, float(info.delta))
    assert info.status in (CONVERGED, FELL_BACK)
    assert error(root.float(), expected.astype(float)) < 2e-2
    assert torch.linalg.eigvalsh(root.double())[0] > 0.0


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_asymmetric_input_is_symmetrised(dtype):
    a = semidefinite(9, 10.0).to(dtype)
    skew = gaussian(9, 9).to(dtype)
    tilted = a + 0.125 * (skew - skew.mT)
    options = {"ridge": 0.01, "return_info": True}
    root, _ = sk.inverse_root(tilted, 2, **options)
    expected, _ = sk.inverse_root(0.5 * (tilted + tilted.mT), 2, **options)
    assert same_bits(root, expected)


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_indefinite_matrix_says_so(dtype):
    values = torch.linspace(1.0, -0.01, 10)
    root, info = sk.inverse_root(with_eigenvalues(values).to(dtype), 4, return_info=True)
    assert info.status == STAGNATED and root.isfinite().all()
    # With a ridge above the negative part it is definite.
    root, info = sk.inverse_root(with_eigenvalues(values).to(dtype), 4, ridge=0.1, return_info=True)
    assert root.isfinite().all()


@pytest.mark.parametrize("method", ["auto", "iteration", "eigen"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_nonfinite_matrix_is_nan_and_spares_its_mates(dtype, value, method):
    a = torch.stack([semidefinite(8, 10.0, seed) for seed in range(6)]).to(dtype)
    options = {"relative_ridge": 1e-3, "method": method, "return_info": True}
    clean, clean_info = sk.inverse_root(a, 4, **options)
    for i, corner in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        a[i + 1][corner] = value
    root, info = sk.inverse_root(a, 4, **options)
    assert root[1:5].isnan().all() and info.residual[1:5].isnan().all()
    assert (info.status[1:5] == NON_FINITE).all()
    kept = [0, 5]
    assert same_bits(root[kept], clean[kept])
    assert same_bits([x[kept] for x in info], [x[kept] for x in clean_info])


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype):
    a = torch.stack([semidefinite(10, 100.0, seed) for seed in (1, 2)]).to(dtype)
    root = sk.inverse_root(Placed(a, layout).tensor, 4, relative_ridge=1e-3)
    expected = np.stack([exact_inverse_root(x, 4, 1e-3 * float(x.abs().sum(-1).max())) for x in a])
    assert error(root, expected) < 2e3 * unit_roundoff(dtype)


@pytest.mark.parametrize("method", ["auto", "eigen"])
@pytest.mark.parametrize("batch", [(1,), (4,), (2, 3)], ids=str)
def test_batch_is_as_one_by_one(batch, method):
    count = int(np.prod(batch))
    a = torch.stack([semidefinite(9, 10.0**i, i) for i in range(count)]).float()
    options = {"relative_ridge": 1e-5, "method": method, "return_info": True}
    each = [sk.inverse_root(x, 4, **options) for x in a]
    root, info = sk.inverse_root(a.reshape(*batch, 9, 9), 4, **options)
    assert same_bits(root.flatten(0, -3), torch.stack([x for x, _ in each]))
    for name in info._fields:
        expected = torch.stack([getattr(x, name) for _, x in each]).reshape(batch)
        assert same_bits(getattr(info, name), expected), name


@pytest.mark.parametrize("shape", [(0, 0), (0, 3, 3), (2, 0, 0), (2, 0, 3, 3)], ids=str)
def test_empty(shape):
    root, info = sk.inverse_root(torch.empty(shape), 4, return_info=True)
    assert root.shape == shape
    assert all(x.shape == shape[:-2] for x in info)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("p", [1, 2, 4, 7])
def test_steps_and_residual_are_the_specifications(p, dtype, backend):
    a = torch.stack([semidefinite(14, c) for c in (1.0, 1e2, 1e5)]).to(dtype)
    _, info = sk.inverse_root(a, p, relative_ridge=1e-5, return_info=True)
    _, expected = sk.inverse_root(a, p, relative_ridge=1e-5, return_info=True, backend="reference")
    sk.call_counts(reset=True)
    assert torch.equal(info.steps, expected.steps)
    assert torch.equal(info.status, expected.status)
    # Both measure rounding noise, so only its order is the same.
    assert (info.residual <= 20.0 * expected.residual + 100.0 * unit_roundoff(dtype)).all()


@st.composite
def definite(draw):
    dtype = draw(st.sampled_from(FULL))
    n, p = draw(st.integers(1, 20)), draw(st.integers(1, 8))
    condition = 10.0 ** draw(st.floats(0.0, 5.0))
    a = semidefinite(n, condition, draw(st.integers(0, 2**31))).to(dtype)
    relative_ridge = draw(st.sampled_from([0.0, 1.0, 30.0])) / condition
    return Placed(a, draw(st.sampled_from(LAYOUTS))).tensor, p, relative_ridge


def assert_root_of_multiples(a, p, relative_ridge):
    """The accuracy rule for A^(-1/p); multiples round otherwise, an ensemble from one matrix.

    Every step rounds X and M, and the scale comes and goes: of a multiple of I all entries round
    alike, and only coupled Newton, whose first step is exact there, makes no error.
    """
    root, info = sk.inverse_root(a, p, relative_ridge=relative_ridge, return_info=True)
    assert info.status in (CONVERGED, FELL_BACK)
    delta = float(info.delta)
    expected = exact_inverse_root(a, p, delta)
    plain = plain_newton_root if relative_ridge else plain_eigen_root
    # The direction of the smallest eigenvalue has nearly all of the error: a matrix is one sample.
    count = draws(1, 1)
    factors = [1.0 + 0.9 * i / count for i in range(count)]
    multiples = [(c, (c * a.double()).to(a.dtype)) for c in factors]
    ours = [
        c ** (1.0 / p) * sk.inverse_root(x, p, relative_ridge=relative_ridge) for c, x in multiples
    ]
    theirs = [c ** (1.0 / p) * plain(x, p, c * delta) for c, x in multiples]
    roundings = math.sqrt(2.0 * int(info.steps) + 2.0)
    noise = root_noise(a, p, delta)
    assert_rule(ours, theirs, expected, roundings=roundings, noise=noise)


@fuzzed(definite(), long=2000)
def test_any_definite_matrix(drawn):
    assert_root_of_multiples(*drawn)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("n", [3, 19])
def test_multiples_of_the_identity(n, p, dtype):
    # Random eigenvectors: the identity up to 1e-16.
    assert_root_of_multiples(semidefinite(n, 1.0).to(dtype), p, 1.0)
    assert_root_of_multiples(torch.eye(n, dtype=dtype), p, 1e-4)


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
    ours = new_step("shampoo_step_", ((6, 9), (8, 3)), torch.float64, **options)
    theirs = ours.clone()
    for t in range(8):
        refresh = [int(t % 3 == 0)] * 2
        ours, theirs = (next_step(x, seed=10 * t).with_(refresh=refresh) for x in (ours, theirs))
        ours.run(backend.name)
        theirs = theirs.run_reference()
    for x, y in zip(ours["params"], theirs["params"], strict=True):
        assert error(x, y) < 1e-9


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
    case = later_step("shampoo_step_", ((4, 6), (4, 6)))
    case["grads"][1].mul_(2.0**exponent)
    before = case.clone()
    case.run(backend.name)
    assert int(case["skipped"]) == 1
    for name in case.names(write=True)[:-1]:
        assert same_bits(case[name][1], before[name][1]), name
        assert name in ("root_failures",) or not same_bits(case[name][0], before[name][0]), name


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
    placed = {}
    for name in ("grads", *case.names(write=True)):
        if name not in ("root_failures", "step_counts", "skipped"):
            placed[name] = [Placed(x, layout) for x in case[name]]
    moved = case.clone().with_(**{name: [x.tensor for x in xs] for name, xs in placed.items()})
    moved.run(backend.name)
    for xs in placed.values():
        for x in xs:
            x.assert_untouched_around()
    assert_written(moved, case, [name for name in placed if name != "grads"])


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


def test_largest_random_gradient_has_no_special_place():
    """Roots of (cA) are c^(-1/p) roots of A for any c (F07)."""
    a = semidefinite(8, 1e3, seed=2).float()
    root = sk.inverse_root(a, 4, relative_ridge=1e-4)
    for c in torch.rand(4, generator=generator(0)).double():
        scaled = sk.inverse_root((float(c) * a.double()).float(), 4, relative_ridge=1e-4)
        assert error(scaled * float(c) ** 0.25, exact(root).astype(float)) < 1e-3

"""inverse_root on every backend and instruction set."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from support.formats import FULL, also_on_cuda, named
from support.fuzzing import fuzzed
from support.inputs import (
    decaying,
    gaussian,
    generator,
    semidefinite,
    semidefinites,
    with_eigenvalues,
)
from support.layouts import LAYOUTS, Placed, same_bits
from support.oracles import exact_inverse_root, plain_newton_root
from support.rule import assert_rule, draws, error, errors, exact, input_noise, rms, unit_roundoff

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


@pytest.mark.in_full("cuda")
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


@pytest.mark.in_full("cuda")
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
@pytest.mark.parametrize("p", also_on_cuda([1, 2, 3, 4, 8], 2, 3, 4))
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


@pytest.mark.in_full("cuda")
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
@pytest.mark.parametrize("p", also_on_cuda([1, 2, 4], 4))
def test_singular_matrix_has_a_pseudo_inverse_root(p, rank, dtype):
    values = torch.zeros(12, dtype=torch.float64)
    values[:rank] = decaying(rank, 10.0)
    a = with_eigenvalues(values, seed=4)
    root, info = sk.inverse_root(a.to(dtype), p, return_info=True)
    assert info.status == RANK_DEFICIENT
    values[:rank] **= -1.0 / p
    assert error(root, with_eigenvalues(values, seed=4)) < 500.0 * unit_roundoff(dtype)


@pytest.mark.in_full("cuda")
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


@pytest.mark.parametrize("method", also_on_cuda(["auto", "iteration", "eigen"], "auto"))
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


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype, backend):
    a = torch.stack([semidefinite(10, 100.0, seed) for seed in (1, 2)]).to(dtype)
    placed = Placed(a, layout)
    root = sk.inverse_root(placed.tensor, 4, relative_ridge=1e-3)
    placed.assert_untouched_around()
    if backend.name != "reference":  # torch's products look at strides
        assert same_bits(root, sk.inverse_root(a, 4, relative_ridge=1e-3))
    expected = np.stack([exact_inverse_root(x, 4, 1e-3 * float(x.abs().sum(-1).max())) for x in a])
    assert error(root, expected) < 2e3 * unit_roundoff(dtype)


@pytest.mark.in_full("cuda")
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


def test_largest_random_gradient_has_no_special_place():
    """Roots of (cA) are c^(-1/p) roots of A for any c (F07)."""
    a = semidefinite(8, 1e3, seed=2).float()
    root = sk.inverse_root(a, 4, relative_ridge=1e-4)
    for c in torch.rand(4, generator=generator(0)).double():
        scaled = sk.inverse_root((float(c) * a.double()).float(), 4, relative_ridge=1e-4)
        assert error(scaled * float(c) ** 0.25, exact(root).astype(float)) < 1e-3

"""inverse_root of the CUDA C++ kernels, run by the emulation."""

from __future__ import annotations

import math

import pytest
import spectral_kernels as sk
import torch
from emulated_cuda import Guarded, arranged
from support.inputs import gaussian, semidefinite
from support.layouts import LAYOUTS, Placed, same_bits
from support.oracles import exact_inverse_root, plain_newton_root
from support.rule import error

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

CONVERGED, STAGNATED, FELL_BACK, RANK_DEFICIENT, NON_FINITE = range(5)
SIZES = (1, 2, 15, 16, 17, 33, 64, 65, 100)
POWERS = range(1, 9)


def root(a, p=4, **options):
    return sk.inverse_root(a, p, **{"relative_ridge": 1e-4, "return_info": True, **options})


def assert_accurate(a, p, ridge):
    """At most twice the error of the same method in fp32 (the reference), or of plain torch's.

    Multiples of A have other roundings: the largest error counts, as any one may be lucky.
    """
    ours, info = root(a, p, relative_ridge=ridge)
    delta = float(info.delta)
    expected = exact_inverse_root(0.5 * (a + a.mT), p, delta)
    theirs = error(plain_newton_root(a, p, delta), expected)
    for c in (1.0, 1.07, 1.23, 1.41, 1.73, 1.91):
        same = sk.inverse_root(a * c, p, relative_ridge=ridge, backend="reference")
        theirs = max(theirs, error(same, expected * c ** (-1.0 / p)))
    assert error(ours, expected) <= 2.0 * theirs + 1e-6
    assert same_bits(ours, ours.mT.contiguous())
    assert int(info.status) in (CONVERGED, FELL_BACK)
    assert float(info.residual) <= 0.25


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e6])
@pytest.mark.parametrize("n", SIZES)
def test_error_rule_of_sizes(n, condition):
    assert_accurate((semidefinite(n, condition) * 7.0).float(), 4, 1e-4)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("p", POWERS)
def test_error_rule_of_powers(p, ridge):
    assert_accurate(semidefinite(20, 1e3).float(), p, ridge)


@pytest.mark.parametrize("rank", [1, 5])
def test_rank_deficient_with_a_ridge(rank):
    g = gaussian(24, rank)
    assert_accurate(g @ g.mT, 4, 1e-4)


def test_ridge_is_that_of_the_specification():
    a = semidefinite(12, 1e2).float()
    for options in ({"ridge": 0.3}, {"ridge": 1e-9}, {"ridge": 0.0}):
        ours = root(a, **options)[1].delta
        expected = root(a, **options, backend="reference")[1].delta
        assert torch.allclose(ours, expected, rtol=1e-6)


def test_without_a_bound_an_eigendecomposition_serves():
    a = semidefinite(10, 1e2).float()
    found, info = root(a, relative_ridge=0.0)
    assert int(info.status) == CONVERGED
    assert int(info.steps) == 0
    assert error(found, exact_inverse_root(a, 4, 0.0)) < 1e-6
    g = gaussian(10, 4)
    singular = g @ g.mT
    found, info = root(singular, relative_ridge=0.0)
    assert int(info.status) == RANK_DEFICIENT
    expected = sk.inverse_root(singular, 4, backend="reference")
    assert error(found, expected) < 1e-5


def test_zero_and_non_finite_matrices():
    a = torch.stack([semidefinite(9, 10.0).float()] * 4)
    a[1] = 0.0
    a[2, 3, 4] = math.nan
    a[3, 0, 0] = math.inf
    found, info = root(a)
    assert info.status.tolist() == [CONVERGED, RANK_DEFICIENT, NON_FINITE, NON_FINITE]
    assert not found[1].any()
    assert found[2:].isnan().all()
    assert same_bits(found[0], root(a[0])[0])
    ridged, info = root(torch.zeros(5, 5), ridge=16.0)
    assert torch.allclose(ridged, 0.5 * torch.eye(5), rtol=1e-6)
    assert int(info.status) == CONVERGED


@pytest.mark.parametrize("p", [1, 4])
def test_a_batch_of_all_outcomes_is_its_matrices(p):
    """What an eigendecomposition serves is found and done on the device, matrix by matrix."""
    a = torch.stack([semidefinite(18, 1e2, seed).float() for seed in range(5)])
    a[1] = 0.0
    a[2] -= 0.5 * torch.eye(18)  # indefinite
    a[3] = gaussian(18, 4) @ gaussian(18, 4).mT
    a[4, 2, 3] = math.nan
    for options in ({"relative_ridge": 0.0}, {"relative_ridge": 1e-4}, {"method": "eigen"}):
        found, info = root(a, p, **options)
        expected, theirs = root(a, p, **options, backend="reference")
        assert info.status.tolist() == theirs.status.tolist()
        assert error(found[0], expected[0]) < 1e-5
        for i in range(4):
            alone, its_info = root(a[i], p, **options)
            assert same_bits(alone, found[i])
            assert same_bits(its_info.residual, info.residual[i])


def test_decompositions_in_parts():
    """Their vectors have a bounded place: here the last matrix comes in a second part."""
    a = torch.zeros(515, 128, 128)
    a[514] = torch.diag(torch.linspace(1.0, 2.0, 128))
    found, info = root(a, 2, method="eigen")
    assert info.status.tolist() == [RANK_DEFICIENT] * 514 + [CONVERGED]
    assert not found[:514].any()
    assert error(found[514], exact_inverse_root(a[514], 2, float(info.delta[514]))) < 1e-6


@pytest.mark.parametrize("p", [2, 3, 4])
def test_powers_of_two_scale_exactly(p):
    a = semidefinite(18, 1e2).float()
    expected = root(a, p)[0]
    for k in (-20, -1, 1, 20):
        assert same_bits(root(a * 2.0 ** (p * k), p)[0], expected * 2.0**-k), k


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    a = torch.stack([semidefinite(19, 1e2, seed).float() for seed in range(3)])
    placed = Placed(a, layout)
    assert same_bits(root(placed.tensor)[0], root(a)[0])
    placed.assert_untouched_around()
    assert same_bits(root(Guarded(a).tensor)[0], root(a)[0])


def test_no_order_changes_a_bit():
    a = semidefinite(40, 1e3).float()
    expected = root(a)
    for order in (1, 2, 3):
        with arranged(order):
            found = root(a)
        assert same_bits(found[0], expected[0])
        assert same_bits(found[1].residual, expected[1].residual)


def test_truncating_products_stay_accurate():
    with arranged(truncation=True):
        assert_accurate(semidefinite(50, 1e3).float(), 4, 1e-4)


@pytest.mark.parametrize(
    ("a", "options", "sentence"),
    [
        (torch.eye(3, dtype=torch.float64), {}, "not in fp64"),
        (torch.eye(130), {}, "a side of at most 128"),
    ],
    ids=("fp64", "large"),
)
def test_what_is_not_served_is_refused(a, options, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        root(a, **options)

"""inverse_root of the CUDA C++ kernels: what their emulation alone shows."""

from __future__ import annotations

import math

import pytest
import spectral_kernels as sk
import torch
from emulated_cuda import arranged
from support.inputs import gaussian, semidefinite
from support.layouts import same_bits
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

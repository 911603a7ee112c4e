"""inverse_root by a sum of shifted inverses: float32 on the CPU, from order 96 on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _extension
from support.inputs import semidefinite
from support.layouts import same_bits

pytestmark = pytest.mark.usefixtures("native")

N, LEAST = 130, 96
CONVERGED = 0
TABLE = Path(__file__).parent.parent / "csrc" / "cpu" / "inverse_root" / "pole_table.inl"
ROOTS = (2, 4)


def exact(a, p, delta):
    values, vectors = torch.linalg.eigh(a.double())
    return (vectors * (values + delta) ** (-1.0 / p)) @ vectors.mT


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def eigen_root(a, p, delta):
    values, vectors = torch.linalg.eigh(a)
    return (vectors * (values.clamp(min=0.0) + delta) ** (-1.0 / p)) @ vectors.mT


@pytest.mark.parametrize("p", ROOTS)
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("n", [LEAST, N, 257])
def test_error_is_below_that_of_a_decomposition_and_of_the_iteration(n, condition, p):
    a = semidefinite(n, condition).float()
    for ridge in (1e-6, max(1e-6, 1.0 / condition)):
        options = {"relative_ridge": ridge, "return_info": True}
        root, info = sk.inverse_root(a, p, **options)
        iterated, _ = sk.inverse_root(a, p, method="iteration", **options)
        assert (info.status, info.steps <= 4) == (CONVERGED, True)
        delta = float(info.delta)
        wanted = exact(a, p, delta)
        allowed = max(relative(eigen_root(a, p, delta), wanted), relative(iterated, wanted))
        assert relative(root, wanted) <= 2.0 * allowed
        assert same_bits(root, root.mT.contiguous())


@pytest.mark.parametrize("p", ROOTS)
@pytest.mark.parametrize("exponent", range(1, 20))
def test_every_eigenvalue_of_a_diagonal_matrix_has_its_root(p, exponent):
    """No rounding errors of large numbers hide those of the table."""
    values = torch.logspace(0.0, -exponent, 200, base=2.0, dtype=torch.float64).float()
    ridge = 2.0 ** -(exponent + 1)
    root, info = sk.inverse_root(torch.diag(values), p, ridge=ridge, return_info=True)
    assert 0 < info.steps <= 4
    wanted = (values.double() + float(info.delta)) ** (-1.0 / p)
    assert float((root.diagonal().double() / wanted - 1.0).abs().max()) <= 2e-6
    assert torch.equal(root, torch.diag(root.diagonal()))


def test_the_table_has_no_gap_and_fewer_poles_for_shorter_spectra():
    for p in ROOTS:
        counts = [_extension.MODULE.root_poles(2.0**-k, p, LEAST) for k in range(23)]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (1, 4)
        assert _extension.MODULE.root_poles(2.0**-23, p, LEAST) == 0
        assert _extension.MODULE.root_poles(2.0**-22, p, LEAST - 1) == 0


def test_the_table_has_the_errors_that_it_states():
    text = TABLE.read_text().partition("=")[2].rstrip().rstrip(";")
    rows = ast.literal_eval(text.translate(str.maketrans("{}", "[]")))
    assert [row[:2] for row in rows] == [[p, k] for p in (2, 4) for k in range(2, 24, 2)]
    for p, exponent, stated, poles, weights, (c0, c1, c2) in rows:
        x = torch.logspace(-exponent, 0.0, 20_001, base=2.0, dtype=torch.float64)
        found = c0 + c1 * x + c2 * x * x
        found += sum(w / (x + s) for s, w in zip(poles, weights, strict=True))
        error = float((found * x ** (1.0 / p) - 1.0).abs().max())
        # What the cubic that follows takes below rounding.
        assert error <= stated and p * error <= 0.05


@pytest.mark.parametrize("p", ROOTS)
def test_threads_and_batch_mates_change_no_bits(p):
    a = torch.stack([semidefinite(N, 10.0**i, i) for i in range(1, 7)]).float()
    torch.set_num_threads(1)
    each = torch.stack([sk.inverse_root(x, p, relative_ridge=1e-6) for x in a])
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert same_bits(sk.inverse_root(a, p, relative_ridge=1e-6), each)
        assert same_bits(sk.inverse_root(a[2], p, relative_ridge=1e-6), each[2])


@pytest.mark.parametrize("p", ROOTS)
def test_a_matrix_that_no_factorization_takes_falls_back(p):
    """A negative eigenvalue beyond the ridge, and a batch-mate that has none."""
    good = semidefinite(N, 1e3).float()
    values, vectors = torch.linalg.eigh(good.double())
    values[0] = -1e-3 * values[-1]
    bad = ((vectors * values) @ vectors.mT).float()
    root, info = sk.inverse_root(torch.stack([bad, good]), p, ridge=1e-4, return_info=True)
    assert info.status.tolist()[1] == CONVERGED and info.status.tolist()[0] != CONVERGED
    assert same_bits(root[1], sk.inverse_root(good, p, ridge=1e-4))


@pytest.mark.parametrize("p", ROOTS)
def test_powers_of_two_of_the_matrix_change_no_bits(p):
    a = semidefinite(N, 1e4).float()
    root = sk.inverse_root(a, p, relative_ridge=1e-6)
    scaled = sk.inverse_root(a * 2.0 ** (5 * p), p, relative_ridge=1e-6)
    assert same_bits(scaled * 2.0**5, root)

"""What the specification of eigenbases alone promises."""

import math

import pytest
import torch
from spectral_kernels.reference import eigenbasis, refresh_eigenbasis
from support.specified import F64, eye, relative, turned, with_spectrum

pytestmark = pytest.mark.usefixtures("seeded", "one_thread")


# eigenbasis


def test_eigenbasis():
    a = torch.randn(3, 9, 9, dtype=F64)
    a = a @ a.mT
    values, vectors = eigenbasis(a)
    assert (values.diff() <= 0).all()
    assert relative((vectors * values[:, None]) @ vectors.mT, a) < 1e-13
    assert relative(vectors.mT @ vectors, eye(9).expand(3, 9, 9)) < 1e-13
    assert torch.equal(eigenbasis(a[1])[1], vectors[1])


def test_eigenbasis_signs():
    _, vectors = eigenbasis(torch.randn(7, 7) @ torch.randn(7, 7))
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    # Of elements of equal magnitude the first counts.
    _, vectors = eigenbasis(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]))
    assert (vectors[0] > 0).all()


def test_eigenbasis_of_zero_nan_and_asymmetric():
    a = torch.randn(3, 4, 4)
    a[0], a[1, 0, 0] = 0.0, math.nan
    values, vectors = eigenbasis(a)
    assert torch.equal(values[0], torch.zeros(4))
    assert torch.equal(vectors[0], torch.eye(4))
    assert values[1].isnan().all()
    assert vectors[1].isnan().all()
    assert (
        relative(values[2], torch.linalg.eigvalsh(a[2].double() + a[2].double().mT).flip(0) / 2)
        < 1e-6
    )


def test_eigenbasis_of_diagonal_and_extreme_matrices():
    values, vectors = eigenbasis(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    assert values.tolist() == [3.0, 2.0, 1.0]
    assert torch.equal(vectors, torch.eye(3)[:, [1, 2, 0]])
    a = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=F64), turned(3))
    for scale in (1e-300, 1e300):
        assert relative(eigenbasis(scale * a)[1], eigenbasis(a)[1]) < 1e-12


# refresh


SPECTRA = {
    "1e2": lambda n: torch.logspace(0, -2, n, dtype=F64),
    "1e6": lambda n: torch.logspace(0, -6, n, dtype=F64),
    "1e12": lambda n: torch.logspace(0, -12, n, dtype=F64),
    "rank n/4": lambda n: torch.linspace(1, 0.1, n, dtype=F64) * (torch.arange(n) < max(1, n // 4)),
    "rank 1": lambda n: 1.0 * (torch.arange(n) == 0).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_refresh_is_a_round_of_orthogonal_iteration(spectrum, dtype, n):
    basis = turned(n)
    a = with_spectrum(SPECTRA[spectrum](n), basis)
    turn = 0.05 * torch.randn(n, n, dtype=F64)
    q = (torch.linalg.matrix_exp(turn - turn.mT) @ basis)[:, torch.randperm(n)].to(dtype)
    a = a.to(dtype)
    values, new = refresh_eigenbasis(q, a, sort=False)
    error = (new.mT @ new - torch.eye(n, dtype=dtype)).abs().max()
    assert error <= (1e-13 * math.sqrt(n) if dtype == F64 else 5e-6)
    assert relative(values, (q.double() * (a.double() @ q.double())).sum(0)) < 64 * n * float(
        torch.finfo(dtype).eps
    )
    # The span of the leading columns is that of Householder QR on the columns in descending order.
    order = values.argsort(descending=True, stable=True)
    p = (a.double() @ q.double())[:, order]
    theirs, r = torch.linalg.qr(p)
    theirs = theirs * r.diagonal().sign()
    if spectrum == "1e2" or (spectrum == "1e6" and dtype == F64):
        assert (new[:, order].double() - theirs).abs().max() < (1e-9 if dtype == F64 else 1e-5)
    leading = max(1, n // 4)
    projector = theirs[:, :leading] @ theirs[:, :leading].mT
    ours = new[:, order][:, :leading].double()
    tolerance = 1e-9 if dtype == F64 else 1e-4
    if spectrum != "rank 1":
        assert (ours @ ours.mT - projector).abs().max() < tolerance
    sorted_values, in_order = refresh_eigenbasis(q, a, sort=True)
    assert torch.equal(in_order, new[:, order])
    assert torch.equal(sorted_values, values[order])


def test_repeated_refresh_converges_to_the_eigenbasis():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=F64)
    basis = turned(4)
    a = with_spectrum(values, basis)
    q = basis[:, [2, 0, 3, 1]] @ torch.linalg.matrix_exp(
        0.1 * torch.ones(4, 4, dtype=F64).triu(1) - 0.1 * torch.ones(4, 4, dtype=F64).tril(-1)
    )
    for _ in range(60):
        estimates, q = refresh_eigenbasis(q, a, sort=False)
    # Column j has followed column j.
    assert relative(estimates, values[[2, 0, 3, 1]]) < 1e-12
    assert relative((q.mT @ basis[:, [2, 0, 3, 1]]).abs(), eye(4)) < 1e-12


def test_F08_refresh_falls_back_to_householder_and_then_to_the_old_basis(monkeypatch):
    q = turned(6)
    a = with_spectrum(SPECTRA["1e2"](6), turned(6))
    _, expected = refresh_eigenbasis(q, a, sort=False)
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda a, **_: (a, torch.ones((), dtype=torch.int32))
    )
    assert relative(refresh_eigenbasis(q, a, sort=False)[1], expected) < 1e-12
    monkeypatch.setattr(torch.linalg, "qr", lambda a: (a * math.nan, a))
    values, kept = refresh_eigenbasis(q, a, sort=False)
    assert torch.equal(kept, q)
    assert values.isfinite().all()


def test_refresh_of_zero_keeps_the_basis():
    q = turned(5)
    values, new = refresh_eigenbasis(q, torch.zeros(5, 5, dtype=F64), sort=True)
    assert torch.equal(new, q)
    assert torch.equal(values, torch.zeros(5, dtype=F64))
    assert new.data_ptr() != q.data_ptr()


def test_refresh_keeps_directions_that_dead_rows_leave_alone():
    padded, q = torch.zeros(5, 5, dtype=F64), torch.zeros(5, 5, dtype=F64)
    padded[:3, :3] = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=F64), turned(3))
    q[:3, :3], q[3:, 3:] = turned(3), turned(2)
    _, new = refresh_eigenbasis(q, padded, sort=False)
    assert relative(new[:, 3:], q[:, 3:]) < 1e-15


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_refresh_at_any_scale(dtype):
    q = turned(6).to(dtype)
    a = with_spectrum(torch.logspace(0, -3, 6, dtype=F64), turned(6)).to(dtype)
    values, new = refresh_eigenbasis(q, a, sort=False)
    for exponent in (-100, 100):
        scaled_values, scaled = refresh_eigenbasis(q, a * 2.0**exponent, sort=False)
        assert torch.equal(scaled, new)
        assert torch.equal(scaled_values, values * 2.0**exponent)


def test_F04_refresh_of_a_nan_matrix_leaves_the_others():
    q = turned(4).expand(3, 4, 4).clone()
    a = torch.randn(3, 4, 4, dtype=F64)
    a = a @ a.mT
    clean = refresh_eigenbasis(q, a, sort=False)
    a[1, 0, 0] = math.inf
    values, new = refresh_eigenbasis(q, a, sort=False)
    assert new[1].isnan().all()
    assert values[1].isnan().all()
    assert torch.equal(new[::2], clean[1][::2])


def test_empty_bases():
    assert eigenbasis(torch.zeros(2, 0, 0))[1].shape == (2, 0, 0)
    assert (
        refresh_eigenbasis(torch.zeros(0, 3, 3), torch.zeros(0, 3, 3), sort=False)[1].numel() == 0
    )


@pytest.mark.parametrize(
    ("q", "a", "error", "words"),
    [
        (torch.eye(3), torch.eye(4), ValueError, "q has shape \\(3, 3\\), a \\(4, 4\\)"),
        (torch.eye(3), eye(3), TypeError, "float64"),
        (torch.eye(3).bfloat16(), torch.eye(3).bfloat16(), TypeError, "bfloat16"),
        (torch.ones(3, 2), torch.ones(3, 2), ValueError, "square"),
    ],
)
def test_refresh_errors(q, a, error, words):
    with pytest.raises(error, match=words):
        refresh_eigenbasis(q, a, sort=False)

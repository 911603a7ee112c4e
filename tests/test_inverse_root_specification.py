"""What the specification of inverse roots alone promises."""

import math

import pytest
import torch
from spectral_kernels.reference import inverse_root
from spectral_kernels.reference.inverse_root import sign_matrix
from support.specified import F64, exact_root, eye, graded, relative, with_spectrum

ROOT = {"ridge": 0.0, "relative_ridge": 0.0, "method": "auto"}
CONVERGED, STAGNATED, FELL_BACK, RANK_DEFICIENT, NON_FINITE = range(5)


pytestmark = pytest.mark.usefixtures("seeded", "one_thread")


# Inverse roots


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("method", ["iteration", "newton", "newton_db", "eigen"])
def test_root(p, method):
    if method == "newton_db" and p not in (2, 4, 8):
        with pytest.raises(ValueError, match=f"p must be 2, 4 or 8, not {p}"):
            inverse_root(eye(3), p, **{**ROOT, "method": method})
        return
    for condition, bound in ((10.0, 1e-13), (1e4, 1e-11)):
        a = graded(24, 1e12)
        x, status, steps, residual, delta = inverse_root(
            a, p, **{**ROOT, "relative_ridge": 1.0 / condition, "method": method}
        )
        assert delta == pytest.approx(float(a.abs().sum(-1).max()) / condition)
        assert relative(x, exact_root(a + delta * eye(24), p)) < bound
        assert status == CONVERGED
        assert (steps > 0) == (method != "eigen")
        assert 0.0 < residual < 1e-6
        assert torch.equal(x, x.mT)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("method", ["iteration", "newton", "eigen"])
def test_fp32_root_is_as_accurate_as_eigh_in_fp32(p, method):
    a = graded(48, 1e12).float()
    x, status, _, _, delta = inverse_root(
        a, p, **{**ROOT, "relative_ridge": 1e-5, "method": method}
    )
    a = a.double() + delta.double() * eye(48)
    values, vectors = torch.linalg.eigh(a.float())
    theirs = (vectors * values.clamp(min=float(delta)) ** (-1.0 / p)) @ vectors.mT
    assert status in (CONVERGED, FELL_BACK)
    assert relative(x, exact_root(a, p)) < relative(theirs, exact_root(a, p))


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("condition", [1e6, 1e9, 1e12])
def test_F09_fp64_against_a_known_root(condition, p):
    q, _ = torch.linalg.qr(torch.randn(30, 30, dtype=F64))
    values = torch.logspace(0, -math.log10(condition), 30, dtype=F64)
    known = (q * values ** (-1.0 / p)) @ q.mT
    for method in ("auto", "newton"):
        x, status, *_ = inverse_root((q * values) @ q.mT, p, **{**ROOT, "method": method})
        assert status in (CONVERGED, FELL_BACK)
        assert relative(x, known) < 1e-15 * condition


def test_auto_takes_the_iteration_only_where_the_ridge_bounds_the_spectrum():
    a = graded(16, 1e3).float()
    assert inverse_root(a, 4, **ROOT)[2] == 0
    assert inverse_root(a, 4, **{**ROOT, "relative_ridge": 1e-8})[2] == 0
    assert inverse_root(a, 4, **{**ROOT, "relative_ridge": 1e-5})[2] > 0


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("method", ["auto", "iteration", "newton", "newton_db", "eigen"])
def test_F06_rank_deficient_gives_the_pseudo_inverse(dtype, method):
    g = torch.randn(12, 3, dtype=F64).to(dtype)
    a = g @ g.mT
    x, status, steps, residual, delta = inverse_root(a, 4, **{**ROOT, "method": method})
    u, s, _ = torch.linalg.svd(g.double(), full_matrices=False)
    assert relative(x, (u * s**-0.5) @ u.mT) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert (status, steps, delta) == (RANK_DEFICIENT, 0, 0)
    assert residual < 1e-6


def test_F06_a_ridge_on_a_rank_deficient_factor():
    g = torch.randn(64, 3)
    a = g @ g.mT
    for ridge in (1e-12, 1e-6, 1e-3):
        for p in (1, 2, 4):
            x, status, _, _, delta = inverse_root(a, p, **{**ROOT, "relative_ridge": ridge})
            assert status in (CONVERGED, FELL_BACK)
            assert float(torch.linalg.eigvalsh(x.double())[-1]) == pytest.approx(
                float(delta) ** (-1.0 / p), rel=0.05
            )


def test_zero_matrix():
    a = torch.zeros(3, 3)
    x, status, *_ = inverse_root(a, 2, **ROOT)
    assert torch.equal(x, a)
    assert status == RANK_DEFICIENT
    x, status, _, _, delta = inverse_root(a, 2, **{**ROOT, "ridge": 4.0})
    assert torch.allclose(x, 0.5 * torch.eye(3))
    assert (status, delta) == (CONVERGED, 4.0)


@pytest.mark.parametrize("ridge", [0.0, 1e-12, 1e-6])
def test_indefinite_is_said(ridge):
    a = with_spectrum(torch.tensor([1.0, 0.5, 0.25, -1e-2], dtype=F64)).float()
    x, status, *_ = inverse_root(a, 4, **{**ROOT, "relative_ridge": ridge})
    assert status == STAGNATED
    assert x.isfinite().all()
    assert (torch.linalg.eigvalsh(x) > -1e-6).all()


def test_asymmetry_is_averaged():
    a = graded(8, 100.0)
    noise = 1e-3 * torch.randn(8, 8, dtype=F64)
    noise = noise - noise.mT
    assert relative(inverse_root(a + noise, 2, **ROOT)[0], inverse_root(a, 2, **ROOT)[0]) < 1e-13


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_F04_a_bad_matrix_in_a_batch(bad):
    a = torch.stack([graded(6, 10.0) for _ in range(3)]).float()
    options = {**ROOT, "relative_ridge": 1e-4}
    clean = inverse_root(a, 4, **options)
    a[1, 2, 3] = bad
    out = inverse_root(a, 4, **options)
    assert out[1].tolist() == [0, NON_FINITE, 0]
    assert out[0][1].isnan().all()
    for new, old in zip(out, clean, strict=True):
        assert torch.equal(new[::2], old[::2])


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 13), (F64, 60)])
def test_F07_powers_of_two_scale_exactly(p, dtype, k):
    a = graded(10, 1e3).to(dtype)
    for ridge in (0.0, 1e-4):
        options = {**ROOT, "relative_ridge": ridge}
        x, status, steps, residual, delta = inverse_root(a, p, **options)
        for exponent in (-k, k):
            scaled = inverse_root(a * 2.0 ** (p * exponent), p, **options)
            assert torch.equal(scaled[0], x * 2.0**-exponent)
            assert torch.equal(scaled[4], delta * 2.0 ** (p * exponent))
            assert [s.item() for s in scaled[1:4]] == [status.item(), steps.item(), residual.item()]


def test_any_scale():
    a = graded(10, 1e3)
    for scale in (1e-300, 1e-37, 1e37, 1e300):
        x = inverse_root(a * scale, 4, **{**ROOT, "relative_ridge": 1e-4})[0]
        ours = inverse_root(a, 4, **{**ROOT, "relative_ridge": 1e-4})[0]
        assert relative(x * scale**0.25, ours) < 1e-12


def test_shapes_without_matrices_or_elements():
    for shape in ((2, 0, 0), (0, 3, 3)):
        x, status, *_ = inverse_root(torch.zeros(shape), 2, **ROOT)
        assert x.shape == shape
        assert status.shape == shape[:-2]


def test_sign_matrix_comes_from_the_documented_generator():
    omega = sign_matrix(eye(5))
    assert omega.shape == (5, 8)
    assert set(omega.flatten().tolist()) == {-1.0, 1.0}
    state, first = 1, []
    for _ in range(8):
        state = (1664525 * state + 1013904223) & 0xFFFFFFFF
        first.append(-1.0 if state & 0x80000000 else 1.0)
    assert omega[0].tolist() == first
    assert torch.equal(sign_matrix(eye(9))[:5], omega)


def test_F08_a_failing_eigensolver_is_a_status(monkeypatch):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    x, status, _, residual, _ = inverse_root(graded(5, 10.0), 4, **ROOT)
    assert status == STAGNATED
    assert residual == math.inf
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("a", "p", "options", "error", "words"),
    [
        (torch.zeros(3, 4), 2, {}, ValueError, "square"),
        (torch.zeros(3, 3).bfloat16(), 2, {}, TypeError, "bfloat16"),
        (torch.zeros(3, 3), 0, {}, ValueError, "p must be in 1..8, not 0"),
        (torch.zeros(3, 3), 2.0, {}, TypeError, "2.0"),
        (torch.zeros(3, 3), True, {}, TypeError, "True"),
        (torch.zeros(3, 3), 2, {"ridge": -1.0}, ValueError, "ridge"),
        (torch.zeros(3, 3), 2, {"relative_ridge": math.nan}, ValueError, "nan"),
        (torch.zeros(3, 3), 2, {"method": "schur"}, ValueError, "'schur'"),
    ],
)
def test_root_errors(a, p, options, error, words):
    with pytest.raises(error, match=words):
        inverse_root(a, p, **{**ROOT, **options})

"""eigenbasis of the CUDA C++ kernels, run by the emulation."""

from __future__ import annotations

import math

import pytest
import torch
from emulated_cuda import Guarded, arranged, emulated
from spectral_kernels import eigenbasis, inverse_root
from support import (
    LAYOUTS,
    Placed,
    error,
    gaussian,
    integers,
    same_bits,
    semidefinite,
    unit_roundoff,
    with_eigenvalues,
)

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

U = unit_roundoff(torch.float32)


@pytest.fixture
def backend_emulated():
    torch.set_num_threads(1)
    with emulated():
        yield


def orthogonality(q):
    q = q.double()
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max())


def reconstruction(a, values, vectors):
    v = vectors.double()
    return error((v * values.double()[..., None, :]) @ v.mT, a)


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


@pytest.mark.parametrize("n", [70, 128])
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
    with pytest.raises(NotImplementedError, match="a side of at most 128"):
        eigenbasis(torch.eye(129))
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

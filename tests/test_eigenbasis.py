"""eigenbasis and refresh_eigenbasis on every backend and instruction set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from support.formats import FULL, named
from support.fuzzing import fuzzed
from support.inputs import (
    decaying,
    gaussian,
    generator,
    integers,
    orthogonal,
    semidefinite,
    with_eigenvalues,
)
from support.layouts import LAYOUTS, Placed, same_bits
from support.oracles import jacobi
from support.rule import error, exact, orthogonality, unit_roundoff

pytestmark = pytest.mark.usefixtures("backend")

ORTHOGONALITY = {torch.float32: 5e-6, torch.float64: 1e-13}


def stack(*matrices, dtype=torch.float32):
    return torch.stack(matrices).to(dtype)


def assert_orthogonal(q):
    limit = ORTHOGONALITY[q.dtype]
    assert orthogonality(q) <= (limit if q.dtype == torch.float32 else limit * q.shape[-1] ** 0.5)


def reconstruction(a, values, vectors):
    """|V diag(values) V^T - A| / |A|."""
    v = vectors.double()
    return error((v * values.double()[..., None, :]) @ v.mT, a)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("n", [1, 2, 5, 17, 40])
def test_error_is_at_most_twice_torchs(n, condition, dtype):
    a = stack(*(semidefinite(n, condition, seed) for seed in (0, 3)), dtype=dtype)
    values, vectors = sk.eigenbasis(a)
    plain = torch.linalg.eigh(a)
    tiny = 4.0 * unit_roundoff(dtype)
    assert reconstruction(a, values, vectors) <= 2.0 * reconstruction(a, *plain) + tiny
    assert orthogonality(vectors) <= 2.0 * orthogonality(plain[1]) + tiny
    if n > 20:
        return
    for i in range(2):
        expected = np.sort(jacobi(exact(a[i]))[0])[::-1].astype(float)
        found, theirs = (
            np.abs(x.double().numpy() - expected).max() for x in (values[i], plain[0][i].flip(0))
        )
        assert found <= 2.0 * theirs + tiny * expected[0]


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_values_descend_and_signs_are_fixed(dtype):
    a = stack(*(semidefinite(9, 100.0, seed) for seed in (1, 2, 3)), dtype=dtype)
    values, vectors = sk.eigenbasis(a)
    assert (values.diff(dim=-1) <= 0.0).all()
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert (largest > 0.0).all()


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_known_bases(dtype):
    values, vectors = sk.eigenbasis(torch.diag(torch.tensor([1.0, 4.0, -2.0, 0.0])).to(dtype))
    assert values.tolist() == [4.0, 1.0, 0.0, -2.0]
    assert torch.equal(vectors, torch.eye(4, dtype=dtype)[:, [1, 0, 3, 2]])
    values, vectors = sk.eigenbasis(torch.zeros(3, 3, dtype=dtype))
    assert not values.any() and torch.equal(vectors, torch.eye(3, dtype=dtype))
    values, vectors = sk.eigenbasis(3.0 * torch.eye(4, dtype=dtype))
    assert torch.equal(values, torch.full((4,), 3.0, dtype=dtype))
    assert torch.equal(vectors, torch.eye(4, dtype=dtype))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_asymmetric_input_is_symmetrised(dtype):
    tilted = integers(7, 7, dtype=dtype)  # of which the mean with the transpose is exact
    assert same_bits(sk.eigenbasis(tilted), sk.eigenbasis(0.5 * (tilted + tilted.mT)))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize(("n", "rank"), [(8, 0), (8, 1), (8, 5), (12, 1), (12, 3), (12, 8)])
def test_rank_deficient_matrices(n, rank, dtype):
    g = gaussian(n, rank, dtype=torch.float64)
    a = (g @ g.mT).to(dtype)
    values, vectors = sk.eigenbasis(a)
    # LAPACK in the precision of its input errs by a modest multiple of n.
    limit = (24.0 if n == 12 and dtype == torch.float64 else 8.0) * unit_roundoff(dtype)
    assert (values[rank:].abs() <= limit * values[:1]).all()
    assert orthogonality(vectors) <= limit


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_any_scale(dtype):
    a = semidefinite(6, 100.0).to(dtype)
    values, vectors = sk.eigenbasis(a)
    for k in (-100, -60, 60, 100):
        scaled_values, scaled_vectors = sk.eigenbasis(a * 2.0**k)
        assert error(scaled_values[None] * 2.0**-k, values[None]) < 16.0 * unit_roundoff(dtype)
        assert error(scaled_vectors, vectors) < 1e4 * unit_roundoff(dtype)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("operator", ["eigenbasis", "refresh"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_nonfinite_matrix_is_nan_and_spares_its_mates(dtype, value, operator):
    a = stack(*(semidefinite(8, 10.0, seed) for seed in range(6)), dtype=dtype)
    q = stack(*(orthogonal(8, seed) for seed in range(6)), dtype=dtype)

    def run():
        return sk.eigenbasis(a) if operator == "eigenbasis" else sk.refresh_eigenbasis(q, a)

    clean = run()
    for i, corner in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        a[i + 1][corner] = value
    values, vectors = run()
    assert values[1:5].isnan().all() and vectors[1:5].isnan().all()
    kept = [0, 5]
    assert same_bits((values[kept], vectors[kept]), (clean[0][kept], clean[1][kept]))


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype, backend):
    a = stack(*(semidefinite(9, 100.0, seed) for seed in (1, 2)), dtype=dtype)
    q = stack(*(orthogonal(9, seed) for seed in (3, 4)), dtype=dtype)
    placed_a, placed_q = Placed(a, layout).tensor, Placed(q, layout).tensor
    tolerance = 2e3 * unit_roundoff(dtype)
    for ours, expected in (
        (sk.eigenbasis(placed_a), sk.eigenbasis(a)),
        (sk.refresh_eigenbasis(placed_q, placed_a), sk.refresh_eigenbasis(q, a)),
    ):
        assert error(ours[0], expected[0]) < tolerance
        assert error(ours[1], expected[1]) < tolerance


@pytest.mark.parametrize("batch", [(1,), (4,), (2, 3)], ids=str)
def test_batch_is_as_one_by_one(batch):
    count = int(np.prod(batch))
    a = stack(*(semidefinite(7, 10.0**i, i) for i in range(count)))
    q = stack(*(orthogonal(7, i) for i in range(count)))
    shaped_a, shaped_q = (x.reshape(*batch, 7, 7) for x in (a, q))
    for together, each in (
        (sk.eigenbasis(shaped_a), [sk.eigenbasis(x) for x in a]),
        (
            sk.refresh_eigenbasis(shaped_q, shaped_a),
            [sk.refresh_eigenbasis(x, y) for x, y in zip(q, a, strict=True)],
        ),
    ):
        assert same_bits(together[0].reshape(count, 7), torch.stack([x for x, _ in each]))
        assert same_bits(together[1].reshape(count, 7, 7), torch.stack([x for _, x in each]))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("shape", [(0, 0), (0, 3, 3), (2, 0, 0), (2, 0, 3, 3)], ids=str)
def test_empty(shape):
    x = torch.empty(shape)
    for values, vectors in (sk.eigenbasis(x), sk.refresh_eigenbasis(x, x)):
        assert values.shape == shape[:-1] and vectors.shape == shape


@st.composite
def symmetric(draw):
    n = draw(st.integers(1, 16))
    values = torch.rand(n, generator=generator(draw(st.integers(0, 2**31))), dtype=torch.float64)
    kind = draw(st.sampled_from(["uniform", "decaying", "clusters", "deficient", "indefinite"]))
    if kind == "decaying":
        values = decaying(n, 10.0 ** draw(st.floats(0.0, 12.0)))
    elif kind == "clusters":
        values = (4.0 * values).ceil()
    elif kind == "deficient":
        values[n // 2 :] = 0.0
    elif kind == "indefinite":
        values -= 0.5
    a = with_eigenvalues(values, draw(st.integers(0, 2**31))).to(draw(st.sampled_from(FULL)))
    return Placed(a, draw(st.sampled_from(LAYOUTS))).tensor


@fuzzed(symmetric())
def test_any_symmetric_matrix(a):
    values, vectors = sk.eigenbasis(a)
    plain = torch.linalg.eigh(a)
    tiny = 16.0 * unit_roundoff(a.dtype)
    assert reconstruction(a, values, vectors) <= 2.0 * reconstruction(a, *plain) + tiny
    assert orthogonality(vectors) <= 2.0 * orthogonality(plain[1]) + tiny
    assert (values.diff() <= 0.0).all()


# refresh_eigenbasis


def factor_sequence(n, count, seed=0, dtype=torch.float64):
    """Factors of an EMA over gradients with a decaying spectrum."""
    scale = decaying(n, 1e2)
    factor = torch.zeros(n, n, dtype=torch.float64)
    for t in range(count):
        g = scale[:, None] * gaussian(n, n + 3, dtype=torch.float64, seed=seed + t)
        factor = 0.9 * factor + 0.1 * g @ g.mT
        yield factor.to(dtype)


def householder(q, a):
    """One round by Householder QR, scattered back: Rayleigh quotients, new basis, their order."""
    p = 0.5 * (a + a.mT) @ q
    values = (q * p).sum(0)
    order = values.argsort(descending=True, stable=True)
    basis, r = torch.linalg.qr(p[:, order])
    new = torch.empty_like(q)
    new[:, order] = basis * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return values, new, order


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("start", ["turned", "standard"])
@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33])
def test_refresh_is_a_round_of_orthogonal_iteration(n, condition, dtype, start):
    a = semidefinite(n, condition, 1).to(dtype)
    q = orthogonal(n, 5).to(dtype) if start == "turned" else torch.eye(n, dtype=dtype)
    values, new = sk.refresh_eigenbasis(q, a)
    assert_orthogonal(new)
    true_values, true_new, _ = householder(q.double(), a.double())
    plain_values, plain_new, _ = householder(q, a)
    tiny = 8.0 * unit_roundoff(dtype)
    assert (
        error(values[None], true_values[None])
        <= 2.0 * error(plain_values[None], true_values[None]) + tiny
    )
    if condition == 1e12:
        return  # the last columns are rounding errors
    # Columns of a basis are determined up to some u times the condition of A Q.
    noise = 2.0 * unit_roundoff(dtype) * condition
    assert error(new, true_new) <= 2.0 * error(plain_new, true_new) + tiny + noise


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("n", [4, 10, 33, 130])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_basis_is_refreshed_where_few_elements_are_not_zero(n, rank, dtype):
    """What is left of the other columns is rounding noise, and noise of noise, down to zero."""
    a = torch.zeros(n, n, dtype=dtype)
    places = torch.arange(rank) * (n // (rank + 1))
    a[places, places] = 1.7 ** -torch.arange(rank).to(dtype)
    q = orthogonal(n, 5).to(dtype)
    _, new = sk.refresh_eigenbasis(q, a)
    assert_orthogonal(new)
    image = a.double() @ q.double()
    order = (q.double() * image).sum(0).argsort(descending=True)
    triangle = (new.double().mT @ image)[order][:, order]
    assert triangle.tril(-1).norm() <= 16.0 * unit_roundoff(dtype) * math.sqrt(n) * a.norm()


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("n", [8, 48])
def test_refreshed_basis_is_orthogonal_at_any_condition(n, condition, dtype):
    a = semidefinite(n, condition, 1).to(dtype)
    for q in (orthogonal(n, 5).to(dtype), sk.eigenbasis(a)[1], torch.eye(n, dtype=dtype)):
        for _ in range(3):
            _, q = sk.refresh_eigenbasis(q, a)
            assert_orthogonal(q)


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("rank", [1, 3, 11])
def test_refreshed_basis_of_a_rank_deficient_factor(rank, dtype):
    g = gaussian(12, rank, dtype=torch.float64)
    a = (g @ g.mT).to(dtype)
    q = orthogonal(12, 3).to(dtype)
    for _ in range(4):
        _, q = sk.refresh_eigenbasis(q, a)
        assert_orthogonal(q)
    # The range has converged to a span of `rank` columns.
    inside = (torch.linalg.qr(g)[0].mT @ q.double()).square().sum(0)
    assert abs(float(inside.sort().values[-rank:].sum()) - rank) < 1e-5


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_zero_factor_keeps_the_basis(dtype, sort):
    q = orthogonal(6, 1).to(dtype)
    values, new = sk.refresh_eigenbasis(q, torch.zeros(6, 6, dtype=dtype), sort=sort)
    assert not values.any() and same_bits(new, q)


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_an_eigenbasis_stays(dtype):
    a = with_eigenvalues(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5]), seed=3).to(dtype)
    values, q = sk.eigenbasis(a)
    estimates, new = sk.refresh_eigenbasis(q, a)
    assert error(new, q) < 100.0 * unit_roundoff(dtype)
    assert error(estimates[None], values[None]) < 20.0 * unit_roundoff(dtype)


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_repeated_refreshes_converge(dtype):
    a = with_eigenvalues(2.0 ** -torch.arange(8.0), seed=3).to(dtype)
    q = orthogonal(8, 7).to(dtype)
    for _ in range(60):
        values, q = sk.refresh_eigenbasis(q, a)
    off = q.double().mT @ a.double() @ q.double()
    assert float((off - off.diagonal().diag()).norm() / off.norm()) < 50.0 * unit_roundoff(dtype)
    expected, _ = sk.eigenbasis(a)
    assert error(values.sort(descending=True).values[None], expected[None]) < 50.0 * unit_roundoff(
        dtype
    )


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_column_j_follows_column_j(dtype):
    """F16: permuting the old columns permutes the new ones, so no state has to move."""
    a = semidefinite(9, 50.0, 2).to(dtype)
    q = sk.eigenbasis(semidefinite(9, 50.0, 2) + 0.01 * semidefinite(9, 2.0, 4))[1].to(dtype)
    order = torch.randperm(9, generator=generator(0))
    values, new = sk.refresh_eigenbasis(q, a)
    permuted_values, permuted = sk.refresh_eigenbasis(q[:, order], a)
    assert error(permuted, new[:, order]) < 100.0 * unit_roundoff(dtype)
    assert error(permuted_values[None], values[None, order]) < 20.0 * unit_roundoff(dtype)
    assert ((new * q).sum(0) > 0.9).all()


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_sorted_refresh_is_the_same_basis_in_descending_order(dtype):
    a, q = semidefinite(9, 50.0, 2).to(dtype), orthogonal(9, 4).to(dtype)
    values, new = sk.refresh_eigenbasis(q, a)
    sorted_values, sorted_new = sk.refresh_eigenbasis(q, a, sort=True)
    order = values.argsort(descending=True, stable=True)
    assert same_bits((sorted_values, sorted_new), (values[order], new[:, order]))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_refresh_at_any_scale(dtype):
    a, q = semidefinite(9, 50.0, 2).to(dtype), orthogonal(9, 4).to(dtype)
    values, new = sk.refresh_eigenbasis(q, a)
    for k in (-100, -7, 100):
        scaled_values, scaled = sk.refresh_eigenbasis(q, a * 2.0**k)
        assert same_bits((scaled_values * 2.0**-k, scaled), (values, new)), k


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_basis_of_a_run_stays_close_to_the_eigenbasis(dtype):
    q = None
    for a in factor_sequence(12, 20, dtype=dtype):
        q = sk.eigenbasis(a)[1] if q is None else sk.refresh_eigenbasis(q, a)[1]
        assert_orthogonal(q)
    rotated = q.double().mT @ a.double() @ q.double()
    off = float((rotated - rotated.diagonal().diag()).norm() / rotated.norm())
    truth = None
    for b in factor_sequence(12, 20):
        truth = torch.linalg.eigh(b)[1].flip(-1) if truth is None else householder(truth, b)[1]
    rotated = truth.mT @ b @ truth
    assert off <= 1.01 * float((rotated - rotated.diagonal().diag()).norm() / rotated.norm()) + 1e-6


@st.composite
def refreshes(draw):
    dtype = draw(st.sampled_from(FULL))
    n = draw(st.integers(1, 16))
    seed = draw(st.integers(0, 2**31))
    condition = 10.0 ** draw(st.floats(0.0, 12.0))
    a = semidefinite(n, condition, seed).to(dtype)
    close = draw(st.booleans())
    q = torch.linalg.eigh(a)[1].flip(-1) if close else orthogonal(n, seed + 7).to(dtype)
    layout = draw(st.sampled_from(LAYOUTS))
    return Placed(q.contiguous(), layout).tensor, Placed(a, layout).tensor, condition


@fuzzed(refreshes())
def test_any_refresh(drawn):
    q, a, condition = drawn
    values, new = sk.refresh_eigenbasis(q, a)
    assert_orthogonal(new)
    u = unit_roundoff(a.dtype)
    true_values, true_new, _ = householder(q.double(), a.double())
    assert error(values[None], true_values[None]) <= 4.0 * len(q) ** 0.5 * u + 4.0 * u
    gap = np.diff(np.sort(true_values.numpy())).min(initial=1.0)
    if u * condition < 1e-3 and gap > 1e-4:  # else the order of the columns is up to rounding
        plain_new = householder(q, a)[1]
        noise = 8.0 * u * condition
        assert error(new, true_new) <= 2.0 * error(plain_new, true_new) + 16.0 * u + noise

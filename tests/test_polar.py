"""polar on every backend and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from support.formats import FLOATS, FULL, named
from support.fuzzing import fuzzed
from support.inputs import decaying, gaussian, generator, semidefinite, with_singular_values
from support.layouts import LAYOUTS, Placed, same_bits
from support.oracles import jacobi
from support.rule import assert_rule, draws, error, exact, unit_roundoff

pytestmark = pytest.mark.usefixtures("backend")


# polar


def exact_polar(x):
    if x.ndim > 2:
        return np.stack([exact_polar(matrix) for matrix in x])
    if x.dtype == torch.float64:
        y = exact(x)
        values, v = jacobi(y.T @ y)
        return y @ (v / np.sqrt(values)) @ v.T
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u @ vh).numpy()


def plain_polar(x):
    u, _, vh = torch.linalg.svd(x if x.dtype in FULL else x.float(), full_matrices=False)
    return (u @ vh).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (9, 4), (17, 16), (30, 12)], ids=str)
def test_polar_factor(shape, dtype):
    x = gaussian(draws(*shape), *shape, dtype=dtype)
    expected = exact_polar(x) if shape[0] >= shape[1] else exact_polar(x.mT).swapaxes(-1, -2)
    assert_rule(sk.polar(x), plain_polar(x), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_polar_factor_is_a_partial_isometry(rank, dtype):
    x = (gaussian(12, rank) @ gaussian(rank, 9, seed=1)).to(dtype)
    kept = torch.linalg.matrix_rank(
        x.double(), rtol=12 * 2.0**-23 if dtype != torch.float64 else None
    )
    o = sk.polar(x).double()
    assert error(o @ o.mT @ o, o) <= 30.0 * unit_roundoff(dtype)
    assert round(float((o * o).sum())) == kept


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_polar_of_a_polar_factor_is_itself(dtype):
    once = sk.polar(gaussian(3, 8, 11, dtype=dtype))
    assert error(sk.polar(once), once.double()) <= 32.0 * unit_roundoff(dtype)


@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_polar_at_any_scale(dtype):
    x = torch.randint(-15, 16, (5, 8), generator=generator(0)).to(dtype)
    for k in (-140, -60, 100) if dtype == torch.float32 else (-1060, 1000):
        assert same_bits(sk.polar(x * 2.0 ** (k // 2) * 2.0 ** (k - k // 2)), sk.polar(x)), k


@pytest.mark.parametrize("layout", LAYOUTS)
def test_polar_of_any_layout(layout):
    x = gaussian(2, 6, 10)
    assert same_bits(sk.polar(Placed(x, layout).tensor), sk.polar(x))
    assert same_bits(sk.polar(Placed(x.mT, layout).tensor.mT), sk.polar(x))


@st.composite
def full_rank(draw):
    m, n = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    values = decaying(min(m, n), 10.0 ** draw(st.floats(0.0, 3.0)))
    x = with_singular_values(m, n, values, draw(st.integers(0, 2**31)))
    return x.to(draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))))


def assert_polar(x):
    # Rounding to 16 bits leaves singular values that plain torch's fp32 cannot tell from 0.
    assert_rule(sk.polar(x), plain_polar(x), exact_polar(x), roundings=2.0)


@fuzzed(full_rank())
def test_polar_of_any_matrix(x):
    assert_polar(x)


def test_semidefinite_input_has_the_identity_for_polar_factor():
    a = semidefinite(10, 30.0)
    assert error(sk.polar(a), torch.eye(10, dtype=torch.float64)) < 1e-13

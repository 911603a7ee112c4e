"""Kronecker factors and products of the CUDA C++ kernels: what their emulation alone shows."""

from __future__ import annotations

import ctypes

import emulated_cuda
import pytest
import torch
from emulated_cuda import Guarded, arranged
from spectral_kernels import kron_factors_update_, kron_precondition
from support.inputs import gaussian, integers, semidefinite
from support.layouts import bits, same_bits
from test_kron_factor import assert_product, assert_updated, updated

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around tiles of 64 and steps of 32, wide and tall.
SHAPES = ((8, 9), (33, 7), (64, 65), (130, 33), (70, 257))


def operands(m, n, batch=(), dtype=torch.float32):
    """A gradient and both of its sides."""
    shapes = (m, n), (m, m), (n, n)
    return tuple(gaussian(*batch, *shape, dtype=dtype, seed=sum(shape)) for shape in shapes)


def factors_of(m, n, *batch):
    left, right = (semidefinite(size, 100.0, size).float() for size in (m, n))
    return left.expand(*batch, m, m).clone(), right.expand(*batch, n, n).clone()


# kron_factors_update_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule_of_factors(shape, dtype):
    grad, (left, right) = gaussian(*shape, dtype=dtype), factors_of(*shape)
    new_left, new_right, _ = updated(left, right, grad, 0.9)
    for new, old, x in ((new_left, left, grad), (new_right, right, grad.mT)):
        assert_updated(new, old, x, 0.9, 1.0 - 0.9)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_long_sums_keep_the_accuracy_of_fp32(dtype):
    grad, left = gaussian(16, 8000, dtype=dtype), torch.zeros(16, 16)
    with arranged(truncation=True):
        new, _, _ = updated(left, None, grad, 0.0, weight=1.0)
    assert_updated(new, left, grad, 0.0, 1.0)


# kron_precondition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule_of_products(shape, dtype):
    grad, left, right = operands(*shape, dtype=dtype)
    for sides in ((left, right), (left, None), (None, right)):
        given = grad, *sides
        assert_product(kron_precondition(*given), *given)


def test_scales_that_other_backends_lose():
    """Operands are scaled apart, so that only the result may be out of range."""
    given = operands(20, 33)
    expected = kron_precondition(*given)
    for exponents in ((-100, -60, 100), (80, 80, -100)):
        scaled = [x * 2.0**e for x, e in zip(given, exponents, strict=True)]
        assert same_bits(kron_precondition(*scaled), expected * 2.0 ** sum(exponents))


def test_an_overflow_stays_where_it_is():
    """In fp32 beside elements that are large too: these kernels lose what is 2^38 times smaller."""
    grad, left = (integers(4, 5).abs() + 1.0) * 2.0**100, torch.eye(4)
    left[2, 2] = 2.0**26
    grad[2, 0] = 2.0**103
    grad[2, 1:] = 1.0
    found = kron_precondition(grad, left, None)
    assert found[2, 0].isinf()
    assert torch.equal(found[[0, 1, 3]], grad[[0, 1, 3]])


# Both.


def results(*batch):
    grad, left, right = operands(9, 70, batch)
    roots = {"left_root": left, "right_root": right}
    return (
        kron_precondition(grad, left, right),
        *updated(*factors_of(9, 70, *batch), grad, 0.5),
        *updated(*factors_of(9, 70, *batch), grad, 0.5, **roots),
    )


def test_leading_dimensions_without_a_common_stride():
    given = operands(9, 70, (2, 3))
    turned = [x.transpose(0, 1) for x in given]
    assert same_bits(kron_precondition(*turned).transpose(0, 1), kron_precondition(*given))
    new = updated(*(x.transpose(0, 1) for x in factors_of(9, 70, 2, 3)), turned[0], 0.5)
    alone = updated(*factors_of(9, 70), given[0][1, 2], 0.5)
    assert same_bits([x[2, 1] for x in new[:2]], alone[:2])


def test_slices_and_orders_do_not_change_a_bit():
    expected = results(3)
    for order in (1, 3):
        with arranged(order):
            assert same_bits(results(3), expected)
    limit = emulated_cuda.library().limit_workspace
    try:
        for most in (1, 120_000):  # one matrix at a time, or two
            limit(ctypes.c_int64(most))
            assert same_bits(results(3), expected)
    finally:
        limit(ctypes.c_int64(1 << 28))


@pytest.mark.parametrize("at_end", [True, False])
def test_no_access_outside_the_tensors(at_end):
    given = operands(35, 13, (2,))
    guarded = [Guarded(x, at_end=at_end).tensor for x in given]
    assert same_bits(kron_precondition(*guarded), kron_precondition(*given))
    grad, left, right = given[0], *factors_of(35, 13, 2)
    expected = updated(left, right, grad, 0.5)
    kept = [Guarded(x, at_end=at_end) for x in (left, right, grad)]
    kron_factors_update_(*(x.tensor for x in kept), 0.5)
    assert same_bits([x.tensor for x in kept[:2]], expected[:2])


def test_what_is_not_served_is_refused_before_anything_is_written():
    grad, (left, right) = gaussian(8, 9), factors_of(8, 9)
    before = bits(left)
    with pytest.raises(NotImplementedError, match="not in fp64"):
        updated(left.double(), right.double(), grad, 0.5)
    with pytest.raises(NotImplementedError, match="not in fp64"):
        kron_precondition(grad, left.double(), None)
    with pytest.raises(ValueError, match="overlap in memory"):
        kron_factors_update_(left, left, gaussian(8, 8), 0.5)
    assert torch.equal(bits(left), before)

"""Kronecker factors and two-sided products of the CUDA C++ kernels, run by the emulation."""

from __future__ import annotations

import ctypes
import math

import emulated_cuda
import pytest
import torch
from emulated_cuda import Guarded, arranged
from spectral_kernels import kron_factors_update_, kron_precondition
from support.inputs import gaussian, integers, orthogonal, semidefinite
from support.layouts import LAYOUTS, Placed, bits, same_bits
from support.rule import assert_rule, exact
from test_kron_factor import assert_product, assert_updated, from_both_sides, plain, updated

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


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (7, 3), (66, 100)], ids=str)
def test_integers_give_the_exact_factors(shape, dtype):
    m, n = shape
    grad = integers(2, m, n, dtype=dtype)
    left, right = torch.eye(m).repeat(2, 1, 1), torch.eye(n).repeat(2, 1, 1)
    wide = grad.double()
    for beta, weight in ((1.0, 1.0), (0.5, 0.25), (0.0, 2.0), (0.75, 0.0)):
        new_left, new_right, skipped = updated(left, right, grad, beta, weight=weight)
        assert torch.equal(new_left.double(), beta * left + weight * wide @ wide.mT)
        assert torch.equal(new_right.double(), beta * right + weight * wide.mT @ wide)
        assert skipped == 0


def test_kl_increments():
    m, n = 40, 70
    grad, left_root, right_root = operands(m, n)
    left, right = factors_of(m, n)
    options = {"weight": 0.1, "left_root": left_root, "right_root": right_root}
    new_left, new_right, _ = updated(left, right, grad, 0.9, **options)
    for new, old, x, wide, count in (
        (new_left, left, grad @ right_root, exact(grad) @ exact(right_root), n),
        (new_right, right, (left_root @ grad).mT, (exact(left_root) @ exact(grad)).T, m),
    ):
        expected = 0.9 * exact(old) + 0.1 / count * wide @ wide.T
        sums = {"terms": 5 * count, "roundings": 2.0}
        assert_rule(new, plain(old, x, 0.9, 0.1 / count), expected, **sums)
        assert same_bits(new, new.mT)
    alone, _, _ = updated(left, None, grad, 0.9, weight=0.1, right_root=right_root)
    assert same_bits(alone, new_left)


def test_the_lower_triangle_counts():
    a = gaussian(70, 70)
    new, _, _ = updated(a, None, torch.zeros(70, 3), 0.5)
    assert torch.equal(new, 0.5 * (a.tril() + a.tril(-1).mT))


def test_old_factors_do_not_matter_at_beta_0():
    left, _, skipped = updated(torch.full((5, 5), math.nan), None, torch.eye(5), 0.0, weight=2.0)
    assert torch.equal(left, 2.0 * torch.eye(5)) and skipped == 0


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_and_spares_its_mates(value, kl):
    grad = gaussian(3, 9, 20)
    left, right = factors_of(9, 20, 3)
    options = {"right_root": torch.eye(20).repeat(3, 1, 1)} if kl else {}
    clean = updated(left, right, grad, 0.5, **options)
    (options["right_root"] if kl else grad)[1, 8, 3] = value
    new_left, new_right, skipped = updated(left, right, grad, 0.5, **options)
    assert skipped == 1
    for new, old, without in ((new_left, left, clean[0]), (new_right, right, clean[1])):
        assert same_bits(new[1], old[1])
        assert same_bits(new[::2], without[::2])


def test_what_would_overflow_is_skipped():
    top = torch.finfo(torch.float32).max
    grad = gaussian(5, 3, 40)
    grad[1, 2, 4] = top**0.5 * 2.0  # its square overflows
    grad[2] = (top / 20.0) ** 0.5  # the left factor's sums of 40 overflow, the right one's do not
    grad[3] = (top / 100.0) ** 0.5  # close, but none does
    left, right = (torch.eye(n).repeat(5, 1, 1) for n in (3, 40))
    left[4, 1, 1] = right[4, 1, 1] = math.inf
    new_left, new_right, skipped = updated(left, right, grad, 1.0, weight=1.0)
    assert skipped == 3
    for new, old in ((new_left, left), (new_right, right)):
        assert same_bits(new[[1, 2, 4]], old[[1, 2, 4]])
        assert new[[0, 3]].isfinite().all() and not same_bits(new[3], old[3])


def test_scale_of_the_gradient():
    grad, zeros = gaussian(2, 20, 33), (torch.zeros(2, 20, 20), torch.zeros(2, 33, 33))
    left, right, _ = updated(*zeros, grad, 1.0, weight=1.0)
    for exponent in (-50, 50):
        scaled = updated(*zeros, grad * 2.0**exponent, 1.0, weight=2.0 ** (-2 * exponent))
        assert same_bits(scaled[:2], (left, right))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_nothing_written_around(layout):
    grad, left_root, right_root = operands(6, 11, (2,))
    left, right = factors_of(6, 11, 2)
    options = {"left_root": left_root, "right_root": right_root}
    expected = updated(left, right, grad, 0.5, **options)
    placed = [Placed(x, layout) for x in (left, right, grad, left_root, right_root)]
    given = [x.tensor for x in placed]
    found = updated(*given[:3], 0.5, left_root=given[3], right_root=given[4])
    assert same_bits(found, expected)
    for x in placed:
        x.assert_untouched_around()


# kron_precondition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule_of_products(shape, dtype):
    grad, left, right = operands(*shape, dtype=dtype)
    for sides in ((left, right), (left, None), (None, right)):
        given = grad, *sides
        assert_product(kron_precondition(*given), *given)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (7, 3), (65, 130)], ids=str)
def test_integers_give_the_exact_product(shape):
    m, n = shape
    grad, left, right = (integers(2, p, q, seed=p) for p, q in ((m, n), (m, m), (n, n)))
    for sides in ((left, right), (left, None), (None, right)):
        wide = from_both_sides(grad, *sides)
        assert torch.equal(kron_precondition(grad, *sides).double(), torch.from_numpy(wide))
    assert same_bits(kron_precondition(grad, None, None), grad)


def test_sides_that_are_not_square():
    for m, n, p, q in ((24, 60, 24, 61), (60, 24, 9, 90), (9, 66, 40, 10)):
        given = [gaussian(2, *shape, seed=p) for shape in ((m, n), (p, m), (n, q))]
        assert_product(kron_precondition(*given), *given)


def test_rotations_there_and_back():
    x, left, right = gaussian(40, 70), orthogonal(40).float(), orthogonal(70, 1).float()
    there = kron_precondition(x, left.mT, right)
    given = there, left, right.mT
    assert_product(kron_precondition(*given), *given)
    assert float((kron_precondition(*given) - x).abs().max()) < 1e-5


def test_scales_of_the_operands():
    grad, left, right = operands(20, 33)
    expected = kron_precondition(grad, left, right)
    for a, b, c in ((-100, 0, 0), (100, 0, 0), (100, -100, 30), (-100, -60, 100), (80, 80, -100)):
        found = kron_precondition(grad * 2.0**a, left * 2.0**b, right * 2.0**c)
        assert same_bits(found, expected * 2.0 ** (a + b + c))


def test_zero_in_zero_out():
    grad, left, right = operands(20, 33)
    for zero in range(3):
        given = [x * (i != zero) for i, x in enumerate((grad, left, right))]
        assert not kron_precondition(*given).any()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_operand_that_is_not_finite_gives_nan_and_spares_its_mates(value, which):
    given = operands(9, 20, (3,))
    clean = kron_precondition(*given)
    alone = kron_precondition(given[0], given[1], None)
    given[1][1, 0] = 0.0  # hides a column of the gradient
    given[which][1, -1, 0] = value
    found = kron_precondition(*given)
    assert found[1].isnan().all()
    assert same_bits(found[::2], clean[::2])
    assert same_bits(kron_precondition(given[0], given[1], None)[::2], alone[::2])


def test_a_gradient_without_sides_that_is_not_finite():
    grad = gaussian(2, 3, 4)
    grad[1, 0, 0] = math.inf
    found = kron_precondition(grad, None, None)
    assert same_bits(found[0], grad[0]) and found[1].isnan().all()


def test_an_overflow_stays_where_it_is():
    grad, left = (integers(4, 5).abs() + 1.0) * 2.0**100, torch.eye(4)
    left[2, 2] = 2.0**26
    grad[2, 0] = 2.0**103
    grad[2, 1:] = 1.0
    found = kron_precondition(grad, left, None)
    assert found[2, 0].isinf()
    assert torch.equal(found[[0, 1, 3]], grad[[0, 1, 3]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_of_any_layout(layout):
    given = operands(9, 20, (2,))
    placed = [Placed(x, layout).tensor for x in given]
    assert same_bits(kron_precondition(*placed), kron_precondition(*given))


# Both.


def results(*batch):
    grad, left, right = operands(9, 70, batch)
    roots = {"left_root": left, "right_root": right}
    return (
        kron_precondition(grad, left, right),
        *updated(*factors_of(9, 70, *batch), grad, 0.5),
        *updated(*factors_of(9, 70, *batch), grad, 0.5, **roots),
    )


def test_batch_mates_do_not_change_a_bit():
    grad, left, right = operands(9, 70, (2, 3))
    together = kron_precondition(grad, left, right)
    one = [x[1, 2] for x in (grad, left, right)]
    assert same_bits(kron_precondition(*one), together[1, 2])
    # No common stride of the leading dimensions.
    turned = [x.transpose(0, 1) for x in (grad, left, right)]
    assert same_bits(kron_precondition(*turned).transpose(0, 1), together)
    new = updated(*(x.transpose(0, 1) for x in factors_of(9, 70, 2, 3)), turned[0], 0.5)
    alone = updated(*factors_of(9, 70), one[0], 0.5)
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


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty(shape):
    *batch, m, n = shape
    left, right = torch.ones(*batch, m, m), torch.ones(*batch, n, n)
    new_left, new_right, skipped = updated(left, right, torch.empty(shape), 0.5)
    assert same_bits((new_left, new_right), (left, right)) and skipped == 0
    assert kron_precondition(torch.empty(shape), left, right).shape == shape


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

"""kron_factors_update_ and kron_precondition on every backend and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from support.formats import (
    AWKWARD_SHAPES,
    FLOATS,
    FULL,
    SHAPES,
    also_on_cuda,
    named,
    state_dtype,
)
from support.fuzzing import fuzzed
from support.inputs import gaussian, generator, integers, orthogonal, semidefinite, semidefinites
from support.layouts import LAYOUTS, Placed, same_bits
from support.rule import assert_rule, draws, error, exact, rms, unit_roundoff

pytestmark = pytest.mark.usefixtures("backend")

SMALL_SHAPES = ((1, 1), (1, 7), (9, 1), (16, 33), (40, 24), (5, 130))
CORNERS = ((0, 0), (0, -1), (-1, 0), (-1, -1))


def symmetric_integers(*shape, dtype=torch.float32, seed=0):
    """Symmetric matrices of small integers."""
    a = integers(*shape, shape[-1], most=9, dtype=dtype, seed=seed)
    return a.tril() + a.tril(-1).mT


def updated(left, right, grad, beta, **options):
    """Both factors after an update of copies, and the number of skipped matrices."""
    skipped = torch.zeros((), dtype=torch.int64)
    left, right = (None if x is None else x.clone() for x in (left, right))
    sk.kron_factors_update_(left, right, grad, beta, skipped=skipped, **options)
    return left, right, int(skipped)


def oracle(factor, x, beta, weight):
    """beta F + weight X X^T in the precision that errors are measured in."""
    wide = exact(x.to(factor.dtype))
    return beta * exact(factor) + weight * wide @ wide.swapaxes(-1, -2)


def plain(factor, x, beta, weight):
    """The same in plain torch."""
    x = x.to(factor.dtype)
    return beta * factor + weight * (x @ x.mT)


def assert_updated(new, old, x, beta, weight):
    """The accuracy rule; two roundings more than the sum's for beta F + weight X X^T."""
    expected = oracle(old, x, beta, weight)
    terms = {"terms": x.shape[-1], "roundings": 2.0}
    assert_rule(new, plain(old, x, beta, weight), expected, **terms)
    assert same_bits(new, new.mT)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", also_on_cuda(SHAPES, (1, 1), (4, 257), (97, 13)), ids=str)
def test_integers_give_the_exact_factors(shape, dtype):
    m, n = shape
    grad = integers(m, n, dtype=dtype)
    left = symmetric_integers(m, dtype=state_dtype(dtype))
    right = symmetric_integers(n, dtype=state_dtype(dtype), seed=1)
    wide = grad.to(torch.float64)
    for beta, weight in ((1.0, 1.0), (0.5, None), (0.0, 2.0), (0.75, 0.0)):
        w = 1.0 - beta if weight is None else weight
        new_left, new_right, skipped = updated(left, right, grad, beta, weight=weight)
        assert torch.equal(new_left.double(), beta * left.double() + w * wide @ wide.mT)
        assert torch.equal(new_right.double(), beta * right.double() + w * wide.mT @ wide)
        assert skipped == 0


@pytest.mark.parametrize("shape", AWKWARD_SHAPES, ids=str)
def test_awkward_shapes(shape):
    grad = integers(*shape, most=1, dtype=torch.bfloat16)
    left, right = (torch.zeros(n, n) for n in shape)
    new_left, new_right, _ = updated(left, right, grad, 0.5, weight=1.0)
    assert torch.equal(new_left, grad.float() @ grad.float().mT)
    assert torch.equal(new_right, grad.float().mT @ grad.float())


@pytest.mark.parametrize("factor_dtype", FULL, ids=named)
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_error_is_at_most_twice_torchs(shape, dtype, factor_dtype):
    m, n = shape
    count = draws(min(shape), min(shape))
    grad = gaussian(count, m, n, dtype=dtype)
    left = semidefinites(count, m, 100.0, 1).to(factor_dtype)
    right = semidefinites(count, n, 100.0, 2).to(factor_dtype)
    new_left, new_right, _ = updated(left, right, grad, 0.9)
    for new, old, x in ((new_left, left, grad), (new_right, right, grad.mT)):
        assert_updated(new, old, x, 0.9, 1.0 - 0.9)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", also_on_cuda((*SMALL_SHAPES, (40, 70)), (40, 70)), ids=str)
def test_kl_increments(shape, dtype):
    m, n = shape
    full = state_dtype(dtype)
    count = draws(min(shape), min(shape))
    grad = gaussian(count, m, n, dtype=dtype)
    left, right, left_root, right_root = (
        semidefinites(count, size, condition, seed).to(full)
        for seed, (size, condition) in enumerate(((m, 10.0), (n, 10.0), (m, 30.0), (n, 30.0)))
    )
    roots = {"left_root": left_root, "right_root": right_root}
    new_left, new_right, _ = updated(left, right, grad, 0.9, weight=0.1, **roots)
    g = grad.to(full)
    for new, old, x, wide, terms in (
        (new_left, left, g @ right_root, exact(g) @ exact(right_root), n),
        (new_right, right, (left_root @ g).mT, (exact(left_root) @ exact(g)).swapaxes(-1, -2), m),
    ):
        expected = 0.9 * exact(old) + 0.1 / terms * wide @ wide.swapaxes(-1, -2)
        # Two products of `terms` terms and one of the root's, which enters twice.
        sums = terms + 4 * terms
        assert_rule(new, plain(old, x, 0.9, 0.1 / terms), expected, terms=sums, roundings=2.0)
        assert same_bits(new, new.mT)


def test_one_root_weights_the_opposite_factor_only():
    grad, root = integers(4, 6), 2.0 * torch.eye(6)
    left, right = torch.zeros(4, 4), torch.zeros(6, 6)
    new_left, new_right, _ = updated(left, right, grad, 0.0, weight=6.0, right_root=root)
    assert torch.equal(new_left, 4.0 * grad @ grad.mT)
    assert torch.equal(new_right, 6.0 * grad.mT @ grad)


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32), ids=named)
def test_one_sided_updates_have_the_same_bits(dtype, side, kl):
    full = state_dtype(dtype)
    grad = gaussian(2, 9, 14, dtype=dtype)
    factors = [torch.zeros(2, n, n, dtype=full) for n in (9, 14)]
    roots = [gaussian(2, n, n).to(full) if kl else None for n in (9, 14)]
    both = updated(*factors, grad, 0.5, left_root=roots[0], right_root=roots[1])
    index = ("left", "right").index(side)
    factors[1 - index] = roots[index] = None
    alone = updated(*factors, grad, 0.5, left_root=roots[0], right_root=roots[1])
    assert same_bits(alone[index], both[index])


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("n", [7, 70])
def test_upper_triangle_is_written_from_the_lower(n):
    a = gaussian(n, n)
    left, _, _ = updated(a, None, torch.zeros(n, 3), 0.5)
    assert torch.equal(left, 0.5 * (a.tril() + a.tril(-1).mT))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_beta_0_forgets_only_what_is_finite(dtype):
    old = torch.eye(5, dtype=dtype).repeat(2, 1, 1)
    old[0, 3, 1] = torch.nan
    new, _, skipped = updated(old, None, torch.eye(5, dtype=dtype).repeat(2, 1, 1), 0.0, weight=2.0)
    assert skipped == 1 and same_bits(new[0], old[0])
    assert torch.equal(new[1], 2.0 * torch.eye(5, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_zero_gradient_scales_by_beta_exactly(dtype):
    left = symmetric_integers(2, 5, dtype=state_dtype(dtype))
    right = symmetric_integers(2, 8, dtype=state_dtype(dtype))
    new_left, new_right, skipped = updated(left, right, torch.zeros(2, 5, 8, dtype=dtype), 0.875)
    assert torch.equal(new_left, 0.875 * left) and torch.equal(new_right, 0.875 * right)
    assert skipped == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("corner", also_on_cuda(CORNERS, (-1, 0)), ids=str)
def test_nonfinite_gradient_is_skipped_and_spares_its_mates(corner, value, dtype):
    grad = gaussian(3, 6, 17, dtype=dtype)
    left, right = (torch.eye(n, dtype=state_dtype(dtype)).repeat(3, 1, 1) for n in (6, 17))
    clean = updated(left, right, grad, 0.5)
    grad[1][corner] = value
    new_left, new_right, skipped = updated(left, right, grad, 0.5)
    assert skipped == 1
    for new, old, without in ((new_left, left, clean[0]), (new_right, right, clean[1])):
        assert same_bits(new[1], old[1])
        assert same_bits(new[::2], without[::2])


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_overflowing_product_is_skipped(dtype):
    top = torch.finfo(dtype).max
    grad = gaussian(4, 3, 5, dtype=dtype)
    grad[1, 2, 4] = top**0.5 * 2.0  # its square overflows
    grad[2] = top**0.5 * 0.6  # the right factor's sums of three fit, the left one's of five do not
    grad[3] = top**0.5 * 0.3  # close, but none does
    left, right = (torch.eye(n, dtype=dtype).repeat(4, 1, 1) for n in (3, 5))
    clean = updated(left[::3], right[::3], grad[::3], 1.0, weight=1.0)
    new_left, new_right, skipped = updated(left, right, grad, 1.0, weight=1.0)
    assert skipped == 2
    assert same_bits((new_left[1:3], new_right[1:3]), (left[1:3], right[1:3]))
    assert same_bits((new_left[::3], new_right[::3]), clean[:2])
    assert new_left[3].isfinite().all() and not same_bits(new_left[3], left[3])


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_scale_of_the_gradient(dtype):
    grad = gaussian(2, 20, 33, dtype=dtype)
    zeros = [torch.zeros(2, n, n, dtype=dtype) for n in (20, 33)]
    unit = updated(*zeros, grad, 1.0, weight=1.0)
    for exponent in (-50, 50):
        scaled = updated(*zeros, grad * 2.0**exponent, 1.0, weight=2.0 ** (-2 * exponent))
        assert same_bits(scaled, unit)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_a_sum_that_overflows_with_the_old_factor_is_skipped(dtype):
    top = torch.finfo(dtype).max
    left = torch.eye(3, dtype=dtype) * (0.75 * top)
    grad = torch.full((3, 1), (0.5 * top) ** 0.5, dtype=dtype)
    new_left, _, skipped = updated(left, None, grad, 1.0, weight=1.0)
    assert skipped == 1 and same_bits(new_left, left)
    new_left, _, skipped = updated(left, None, grad, 0.5, weight=0.5)
    assert skipped == 0 and new_left.isfinite().all()


@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32), ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_nothing_written_around(layout, dtype):
    grad = integers(2, 6, 11, dtype=dtype)
    factors = [symmetric_integers(2, n, dtype=state_dtype(dtype)) for n in (6, 11)]
    roots = [torch.eye(n, dtype=state_dtype(dtype)).repeat(2, 1, 1) for n in (6, 11)]
    expected = updated(*factors, grad, 0.5)
    expected_kl = updated(*factors, grad, 0.5, weight=66.0, left_root=roots[0], right_root=roots[1])
    placed = [Placed(x, layout) for x in (*factors, grad, *roots)]
    sk.kron_factors_update_(*(x.tensor for x in placed[:3]), 0.5)
    assert all(torch.equal(x.tensor, y) for x, y in zip(placed, expected[:2], strict=False))
    for x, old in zip(placed, factors, strict=False):
        x.tensor.copy_(old)
    options = {"left_root": placed[3].tensor, "right_root": placed[4].tensor}
    sk.kron_factors_update_(*(x.tensor for x in placed[:3]), 0.5, weight=66.0, **options)
    assert all(torch.equal(x.tensor, y) for x, y in zip(placed, expected_kl[:2], strict=False))
    for x in placed:
        x.assert_untouched_around()


def test_expanded_gradients():
    grad = integers(1, 9).expand(4, 9)
    left, right = torch.zeros(4, 4), torch.zeros(9, 9)
    assert same_bits(updated(left, right, grad, 0.5), updated(left, right, grad.contiguous(), 0.5))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("batch", [(1,), (4,), (2, 3)], ids=str)
def test_batch_is_as_one_by_one(batch):
    grad = gaussian(*batch, 7, 12)
    left, right = (torch.eye(n).repeat(*batch, 1, 1) for n in (7, 12))
    together = updated(left, right, grad, 0.9)
    each = [updated(torch.eye(7), torch.eye(12), g, 0.9) for g in grad.flatten(0, -3)]
    for i, new in enumerate(together[:2]):
        assert same_bits(new.flatten(0, -3), torch.stack([x[i] for x in each]))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty(shape):
    *batch, m, n = shape
    left, right = torch.ones(*batch, m, m), torch.ones(*batch, n, n)
    new_left, new_right, skipped = updated(left, right, torch.empty(shape), 0.5)
    assert same_bits((new_left, new_right), (left, right)) and skipped == 0
    assert sk.kron_precondition(torch.empty(shape), left, right).shape == shape


@st.composite
def updates(draw):
    dtype, factor_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FULL))
    m, n = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**31))
    scale = 2.0 ** draw(st.integers(-6, 6))
    grad = (gaussian(m, n, dtype=torch.float64, seed=seed) * scale).to(dtype)
    factors = [
        semidefinite(size, 10.0 ** draw(st.floats(0.0, 6.0)), seed + i).to(factor_dtype)
        for i, size in enumerate((m, n))
    ]
    layout = draw(st.sampled_from(LAYOUTS))
    beta = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    return Placed(grad, layout).tensor, *factors, beta, 1.0 - beta if beta < 1.0 else 1.0


@fuzzed(updates())
def test_any_update(drawn):
    grad, left, right, beta, weight = drawn
    new_left, new_right, skipped = updated(left, right, grad, beta, weight=weight)
    assert skipped == 0
    for new, old, x in ((new_left, left, grad), (new_right, right, grad.mT)):
        assert_updated(new, old, x, beta, weight)


# kron_precondition


def from_both_sides(grad, left, right):
    """left @ grad @ right in the precision that errors are measured in."""
    dtypes = {x.dtype for x in (grad, left, right) if x is not None}
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    x = exact(grad.to(widest))
    x = x if left is None else exact(left.to(widest)) @ x
    return x if right is None else x @ exact(right.to(widest))


def plain_from_both_sides(grad, left, right):
    """Plain torch in the widest dtype of the arguments, rounded to the gradient's."""
    dtype = grad.dtype
    for x in (left, right):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    x = grad.to(dtype)
    x = x if left is None else left.to(dtype) @ x
    x = x if right is None else x @ right.to(dtype)
    return x.to(grad.dtype)


def assert_product(result, grad, left, right):
    """The accuracy rule, and one rounding of every term where terms of a product cancel."""
    expected = from_both_sides(grad, left, right)
    magnitude = from_both_sides(*(None if x is None else x.abs() for x in (grad, left, right)))
    lost = rms(np.linalg.norm(magnitude, axis=(-2, -1)) / np.linalg.norm(expected, axis=(-2, -1)))
    wide = torch.promote_types(result.dtype, torch.float32)
    noise = unit_roundoff(wide) * lost
    assert_rule(result, plain_from_both_sides(grad, left, right), expected, noise=noise)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", also_on_cuda(SHAPES[::2], (1, 1), (31, 2), (97, 13)), ids=str)
def test_integers_give_the_exact_product(shape, dtype):
    # Products up to 256, which even bfloat16 holds.
    m, n = shape
    grad = integers(m, n, most=3, dtype=dtype)
    left = torch.zeros(m + 2, m, dtype=dtype)
    left[torch.arange(m), torch.randperm(m, generator=generator(m))] = -2.0
    right = torch.zeros(n, n + 3, dtype=dtype)
    right[torch.randperm(n, generator=generator(n)), torch.arange(n)] = 3.0
    wide = left.double() @ grad.double() @ right.double()
    assert torch.equal(sk.kron_precondition(grad, left, right).double(), wide)
    assert torch.equal(
        sk.kron_precondition(grad, left, None).double(), left.double() @ grad.double()
    )
    assert torch.equal(
        sk.kron_precondition(grad, None, right).double(), grad.double() @ right.double()
    )
    assert same_bits(sk.kron_precondition(grad, None, None), grad)


@pytest.mark.parametrize("factor_dtype", FLOATS, ids=named)
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("sides", ["left", "both", "right"])  # `make test` samples the middle
def test_error_of_the_product_is_at_most_twice_torchs(sides, dtype, factor_dtype):
    for m, n, p, q in (
        (1, 1, 1, 1),
        (7, 5, 7, 5),
        (24, 60, 24, 60),
        (60, 24, 3, 90),
        (5, 90, 40, 2),
    ):
        count = draws(min(m, p), min(n, q))
        grad = gaussian(count, m, n, dtype=dtype)
        left = gaussian(count, p, m, dtype=factor_dtype, seed=1) if sides != "right" else None
        right = gaussian(count, n, q, dtype=factor_dtype, seed=2) if sides != "left" else None
        result = sk.kron_precondition(grad, left, right)
        assert result.dtype == dtype
        assert_product(result, grad, left, right)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("shape", [(12, 20), (40, 70)], ids=str)
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_rotation_out_undoes_rotation_in(dtype, shape):
    x = gaussian(*shape, dtype=dtype)
    left, right = (orthogonal(n, seed).to(dtype) for seed, n in enumerate(shape, 1))
    there = sk.kron_precondition(x, left.mT, right)
    back = sk.kron_precondition(there, left, right.mT)
    assert_product(back, there, left, right.mT)
    assert error(back, x) < 20.0 * torch.finfo(dtype).eps


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_scales_of_the_operands(dtype):
    operands = [gaussian(m, n, dtype=dtype, seed=m) for m, n in ((20, 33), (20, 20), (33, 33))]
    expected = sk.kron_precondition(*operands)
    for exponents in ((-100, 0, 0), (100, 0, 0), (100, -100, 30), (-40, -40, 50)):
        scaled = [x * 2.0**e for x, e in zip(operands, exponents, strict=True)]
        assert same_bits(sk.kron_precondition(*scaled), expected * 2.0 ** sum(exponents))


@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32), ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_of_any_layout(layout, dtype):
    grad, left, right = (
        integers(2, m, n, most=1, dtype=dtype, seed=m) for m, n in ((6, 11), (9, 6), (11, 4))
    )
    expected = sk.kron_precondition(grad, left, right)
    placed = [Placed(x, layout).tensor for x in (grad, left, right)]
    assert torch.equal(sk.kron_precondition(*placed), expected)
    assert torch.equal(expected.double(), left.double() @ grad.double() @ right.double())


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("sides", ["left", "both", "right"])
@pytest.mark.parametrize("size", [(3, 5, 2, 7), (50, 33, 70, 41), (150, 130, 131, 160)], ids=str)
def test_bits_of_the_product_do_not_depend_on_the_layout(backend, size, sides):
    if backend.name == "reference":
        pytest.skip("torch's own products depend on the layout")
    # Small matrices are multiplied where they lie, if they lie so that it can be done.
    m, n, p, q = size
    grad, left, right = gaussian(m, n), gaussian(p, m, seed=1), gaussian(n, q, seed=2)
    given = [grad, None if sides == "right" else left, None if sides == "left" else right]
    turned = [None if x is None else x.mT.contiguous().mT for x in given]
    apart = [None if x is None else torch.cat([x, x], -1)[:, : x.shape[1]] for x in given]
    expected = sk.kron_precondition(*given)
    assert_product(expected, *given)
    for which in range(3):
        for other in (turned, apart):
            mixed = [other[i] if i == which else x for i, x in enumerate(given)]
            assert same_bits(sk.kron_precondition(*mixed), expected)
    assert same_bits(sk.kron_precondition(*turned), expected)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("batch", [(1,), (4,), (2, 3)], ids=str)
def test_batch_of_products_is_as_one_by_one(batch):
    operands = [gaussian(*batch, m, n, seed=m) for m, n in ((7, 9), (5, 7), (9, 30))]
    each = [
        sk.kron_precondition(*x) for x in zip(*(o.flatten(0, -3) for o in operands), strict=True)
    ]
    assert same_bits(sk.kron_precondition(*operands).flatten(0, -3), torch.stack(each))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32), ids=named)
def test_nonfinite_operand_gives_nan_and_spares_its_mates(dtype, value, which):
    operands = [gaussian(3, m, n, dtype=dtype, seed=m) for m, n in ((6, 18), (5, 6), (18, 7))]
    clean = sk.kron_precondition(*operands)
    alone = sk.kron_precondition(*operands[:2], None)
    operands[which][1, -1, 0] = value
    # A zero row hides a non-finite column from the product itself.
    operands[1][1, 0] = 0.0
    result = sk.kron_precondition(*operands)
    assert result[1].isnan().all()
    assert same_bits(result[::2], clean[::2])
    one_sided = sk.kron_precondition(*operands[:2], None)
    assert one_sided[1].isnan().all() == (which < 2)
    assert same_bits(one_sided[::2], alone[::2])


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_a_nonfinite_gradient_without_sides(dtype):
    grad = gaussian(2, 3, 4, dtype=dtype)
    grad[1, 0, 0] = torch.inf
    result = sk.kron_precondition(grad, None, None)
    assert same_bits(result[0], grad[0]) and result[1].isnan().all()


@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float16), ids=named)
def test_an_overflow_stays_where_it_is(dtype):
    grad = integers(4, 5, dtype=dtype).abs() + 1.0
    left = torch.eye(4, dtype=dtype)
    left[2, 2] = torch.finfo(dtype).max
    grad[2, 0] = 4.0
    result = sk.kron_precondition(grad, left, None)
    assert torch.isinf(result[2, 0])
    assert torch.equal(result[[0, 1, 3]], grad[[0, 1, 3]])


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("zero", range(3))
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_zero_in_zero_out(dtype, zero):
    operands = [gaussian(m, n, dtype=dtype, seed=m) for m, n in ((6, 9), (6, 6), (9, 9))]
    operands[zero].zero_()
    assert not sk.kron_precondition(*operands).any()


@st.composite
def products(draw):
    dtypes = [draw(st.sampled_from(FLOATS)) for _ in range(3)]
    p, m, n, q = (draw(st.integers(1, 24)) for _ in range(4))
    seed = draw(st.integers(0, 2**31))
    layout = draw(st.sampled_from(LAYOUTS))
    shapes = ((m, n), (p, m), (n, q))
    given = [True, draw(st.booleans()), draw(st.booleans())]
    return [
        Placed(gaussian(*shape, dtype=dtype, seed=seed + i), layout).tensor if present else None
        for i, (shape, dtype, present) in enumerate(zip(shapes, dtypes, given, strict=True))
    ]


@fuzzed(products())
def test_any_product(drawn):
    grad, left, right = drawn
    result = sk.kron_precondition(grad, left, right)
    assert_product(result, grad, left, right)

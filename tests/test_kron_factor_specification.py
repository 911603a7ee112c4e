"""What the specification of Kronecker factors alone promises."""

import math

import pytest
import torch
from spectral_kernels.reference import kron_factors_update_, kron_precondition
from support.specified import F64, NONE, counter, graded, relative

pytestmark = pytest.mark.usefixtures("seeded", "one_thread")


def update_factors(left, right, grad, *, beta=0.9, weight=0.1, left_root=NONE, right_root=NONE):
    skipped = counter()
    kron_factors_update_(
        left,
        right,
        grad,
        skipped,
        beta=beta,
        weight=weight,
        left_root=left_root,
        right_root=right_root,
    )
    return skipped.item()


@pytest.mark.parametrize("beta", [0.9, 0.0, 1.0])
def test_factors(beta):
    g = torch.randn(3, 4, 6, dtype=F64)
    left, right = torch.randn(3, 4, 4, dtype=F64), torch.randn(3, 6, 6, dtype=F64)
    left, right = left @ left.mT, right @ right.mT
    expected = beta * left + 0.1 * g @ g.mT, beta * right + 0.1 * g.mT @ g
    assert update_factors(left, right, g, beta=beta) == 0
    assert relative(left, expected[0]) < 1e-14
    assert relative(right, expected[1]) < 1e-14
    assert torch.equal(left, left.mT)
    assert torch.equal(right, right.mT)


def test_kl_increments_use_the_other_sides_root():
    g = torch.randn(4, 6, dtype=F64)
    x_left, x_right = graded(4, 10.0), graded(6, 10.0)
    left, right = torch.zeros(4, 4, dtype=F64), torch.zeros(6, 6, dtype=F64)
    update_factors(left, right, g, left_root=x_left, right_root=x_right)
    assert relative(left, 0.1 / 6 * g @ x_right @ x_right @ g.mT) < 1e-14
    assert relative(right, 0.1 / 4 * g.mT @ x_left @ x_left @ g) < 1e-14


def test_one_side_of_the_factors():
    g = torch.randn(4, 6, dtype=F64)
    left, right = torch.zeros(4, 4, dtype=F64), torch.zeros(6, 6, dtype=F64)
    update_factors(left, NONE, g)
    update_factors(NONE, right, g)
    assert relative(left, 0.1 * g @ g.mT) < 1e-14
    assert relative(right, 0.1 * g.mT @ g) < 1e-14
    assert update_factors(NONE, NONE, g) == 0


def test_factors_of_16_bit_integers_are_exact():
    g = torch.randint(-8, 9, (5, 7))
    left, right = torch.zeros(5, 5), torch.zeros(7, 7)
    update_factors(left, right, g.bfloat16(), beta=1.0, weight=1.0)
    assert torch.equal(left, (g @ g.mT).float())
    assert torch.equal(right, (g.mT @ g).float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_F04_bad_or_overflowing_gradients_leave_both_factors(bad):
    g = torch.randn(3, 4, 6)
    left, right = torch.eye(4).repeat(3, 1, 1), torch.eye(6).repeat(3, 1, 1)
    clean = left.clone(), right.clone()
    update_factors(*clean, g)
    g[1, 2, 3] = bad
    assert update_factors(left, right, g) == 1
    assert torch.equal(left[1], torch.eye(4))
    assert torch.equal(right[1], torch.eye(6))
    assert torch.equal(left[::2], clean[0][::2])
    assert torch.equal(right[::2], clean[1][::2])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"left": torch.zeros(5, 5)}, ValueError, "left must have shape \\(4, 4\\)"),
        ({"left": torch.zeros(4, 4).bfloat16()}, TypeError, "bfloat16"),
        ({"left": torch.zeros(4, 4, dtype=F64)}, TypeError, "float64"),
        ({"right": torch.zeros(1, 6).expand(6, 6)}, ValueError, "strides"),
        ({"right_root": torch.zeros(4, 4)}, ValueError, "right_root"),
        ({"beta": -1.0}, ValueError, "beta"),
        ({"weight": math.inf}, ValueError, "inf"),
    ],
)
def test_factor_errors(change, error, words):
    arguments = {"left": torch.zeros(4, 4), "right": torch.zeros(6, 6), **change}
    with pytest.raises(error, match=words):
        update_factors(grad=torch.ones(4, 6), **arguments)


def test_precondition():
    g = torch.randn(2, 4, 6, dtype=F64)
    left, right = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 6, 5, dtype=F64)
    # Torch has several routes to a batched product, which differ in their last bits.
    assert relative(kron_precondition(g, left, right), left @ g @ right) < 1e-14
    assert relative(kron_precondition(g, left, NONE), left @ g) < 1e-14
    assert relative(kron_precondition(g, NONE, right), g @ right) < 1e-14
    assert torch.equal(kron_precondition(g, NONE, NONE), g)
    half = kron_precondition(g.bfloat16(), left.float(), right.float())
    assert half.dtype == torch.bfloat16
    assert relative(half, left @ g.bfloat16().double() @ right) < 2.0**-8
    with pytest.raises(ValueError, match="right of shape \\(2, 5, 5\\)"):
        kron_precondition(g, left, right[:, 1:])


def test_precondition_with_a_nan_matrix():
    g, left = torch.randn(3, 4, 6), torch.randn(3, 4, 4)
    clean = kron_precondition(g, left, NONE)
    left[1, 0, 0] = math.nan
    out = kron_precondition(g, left, NONE)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], clean[::2])

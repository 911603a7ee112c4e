"""gram on every backend and instruction set."""

from __future__ import annotations

import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from support.formats import AWKWARD_SHAPES, FLOATS, FULL, SHAPES, also_on_cuda, named
from support.fuzzing import fuzzed
from support.inputs import gaussian, integers
from support.layouts import LAYOUTS, Placed, same_bits
from support.rule import assert_rule, draws, exact

pytestmark = pytest.mark.usefixtures("backend")

CORNERS = ((0, 0), (0, -1), (-1, 0), (-1, -1))


def assert_gram_rule(x: torch.Tensor) -> None:
    wide = exact(x)
    assert_rule(sk.gram(x), x @ x.mT, wide @ wide.swapaxes(-1, -2), terms=x.shape[-1])


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", also_on_cuda(SHAPES, (1, 1), (97, 13)), ids=str)
def test_integers_give_the_exact_product(shape, dtype):
    x = integers(*shape, dtype=dtype)
    assert torch.equal(sk.gram(x), (x.double() @ x.double().mT).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_error_is_at_most_twice_torchs(shape, dtype):
    count = draws(shape[0], shape[0])
    assert_gram_rule(gaussian(count, *shape, dtype=dtype))


@pytest.mark.parametrize("top", [0, -40, 55], ids="top 2^{}".format)
@pytest.mark.parametrize("shape", [(200, 131), (330, 700)], ids=str)
def test_rows_far_below_the_largest(shape, top):
    """An element is as exact beside the lengths of its own two rows as torch's, whatever the other
    rows are: these go down to 2^-60 of the largest."""
    m, n = shape
    exponents = top - 60 * torch.arange(m) / (m - 1)
    x = gaussian(m, n, dtype=torch.float32) * torch.exp2(exponents.round()).unsqueeze(1)
    lengths = x.double().norm(dim=1)
    wanted, scale = x.double() @ x.double().T, lengths[:, None] * lengths
    seen = scale > 2.0**-100  # above what rounds in subnormal numbers
    ours, plain = (((y.double() - wanted) / scale)[seen] for y in (sk.gram(x), x @ x.T))
    unit = torch.finfo(torch.float32).eps / 2
    assert ours.square().mean().sqrt() <= 2 * plain.square().mean().sqrt() + unit
    assert ours.abs().max() <= 2 * plain.abs().max() + 2 * unit


@pytest.mark.parametrize("shape", AWKWARD_SHAPES, ids=str)
def test_awkward_shapes(shape):
    x = integers(*shape, most=1, dtype=torch.bfloat16)
    assert torch.equal(sk.gram(x), (x.double() @ x.double().mT).bfloat16())


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_result_is_exactly_symmetric(dtype):
    product = sk.gram(gaussian(3, 67, 41, dtype=dtype))
    assert same_bits(product, product.mT)


@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32, torch.bfloat16), ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype):
    x = integers(3, 35, 50, dtype=dtype)
    wide, tall = Placed(x, layout), Placed(x.mT, layout)
    assert torch.equal(sk.gram(wide.tensor), sk.gram(x))
    assert torch.equal(sk.gram(tall.tensor.mT), sk.gram(x))
    wide.assert_untouched_around()
    tall.assert_untouched_around()


def test_expanded_matrices():
    row, one = integers(1, 20), integers(4, 20)
    assert torch.equal(sk.gram(row.expand(5, 20)), sk.gram(row.repeat(5, 1)))
    assert torch.equal(sk.gram(one.expand(3, 4, 20)), sk.gram(one.repeat(3, 1, 1)))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3), (1, 2, 1)], ids=str)
def test_batch_is_as_one_by_one(batch):
    x = gaussian(*batch, 17, 29)
    each = torch.stack([sk.gram(matrix) for matrix in x.flatten(0, -3)])
    assert same_bits(sk.gram(x), each.reshape(*batch, 17, 17))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (0, 3, 4), (2, 0, 3, 4), (3, 0, 4)], ids=str)
def test_empty_results(shape):
    product = sk.gram(torch.empty(shape))
    assert product.shape == (*shape[:-1], shape[-2]) and product.numel() == 0


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_sum_over_nothing_is_zero(dtype):
    x = torch.empty(2, 3, 0, dtype=dtype)
    assert same_bits(sk.gram(x), torch.zeros(2, 3, 3, dtype=dtype))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_zeros_and_zero_rows(dtype):
    assert same_bits(sk.gram(torch.zeros(2, 5, 7, dtype=dtype)), torch.zeros(2, 5, 5, dtype=dtype))
    x = gaussian(9, 6, dtype=dtype)
    x[4] = 0.0
    product = sk.gram(x)
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    assert not product[4].any() and not product[:, 4].any() and product[kept][:, kept].all()


@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float16), ids=named)
def test_an_overflow_stays_where_torch_has_it(dtype):
    x = integers(6, 5, dtype=dtype, seed=1)
    x[2] = torch.finfo(dtype).max / 4.0
    product = sk.gram(x)
    assert torch.isinf(product[2, 2])
    kept = [0, 1, 3, 4, 5]
    assert same_bits(product[kept][:, kept], (x @ x.mT)[kept][:, kept])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("corner", also_on_cuda(CORNERS, (0, -1)), ids=str)
def test_nonfinite_matrix_is_nan_and_spares_its_mates(corner, dtype, value):
    x = gaussian(3, 18, 21, dtype=dtype)
    clean = sk.gram(x)
    x[1][corner] = value
    product = sk.gram(x)
    assert product[1].isnan().all()
    assert same_bits(product[::2], clean[::2])


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", (*FULL, torch.bfloat16), ids=named)
def test_power_of_two_scales(dtype):
    x = gaussian(9, 40, dtype=dtype)
    for exponent in (-55, 55):
        assert same_bits(sk.gram(x * 2.0**exponent), sk.gram(x) * 2.0 ** (2 * exponent))
    tiny = x * 2.0**-130
    assert same_bits(sk.gram(tiny * 2.0**110), sk.gram(tiny * 2.0**100) * 2.0**20)


@pytest.mark.in_full("cuda")
def test_subnormals_are_kept():
    x = integers(7, 9)
    assert same_bits(sk.gram(x * 2.0**-70), sk.gram(x) * 2.0**-140)
    assert same_bits(sk.gram(x * 2.0**-140 * 2.0**100), sk.gram(x) * 2.0**-80)


@st.composite
def matrices(draw):
    dtype = draw(st.sampled_from(FLOATS))
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    scale = 2.0 ** draw(st.integers(-5, 5))
    x = gaussian(*batch, m, n, dtype=dtype, seed=draw(st.integers(0, 2**31))) * scale
    return Placed(x, draw(st.sampled_from(LAYOUTS))).tensor


@fuzzed(matrices())
def test_any_matrix(x):
    assert_gram_rule(x)

"""scaled_sign on every backend and instruction set."""

from __future__ import annotations

import math

import pytest
import spectral_kernels as sk
import torch
from support.formats import FLOATS, SHAPES, named
from support.inputs import gaussian
from support.layouts import LAYOUTS, Placed, same_bits

pytestmark = pytest.mark.usefixtures("backend")
SAMPLED_CASES = {"triton": 2, "cuda": 2}


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element(shape, dtype):
    x = gaussian(3, *shape, dtype=dtype)
    x[:, 0, 0] = 0.0
    assert torch.equal(sk.scaled_sign(x, scale=0.3), 0.3 * x.sign())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    x = gaussian(3, 35, 50)
    assert torch.equal(sk.scaled_sign(Placed(x, layout).tensor), x.sign())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_matrix_gives_nan_and_leaves_its_mates_alone(value):
    x = gaussian(3, 40, 60)
    expected = sk.scaled_sign(x)
    x[1, 39, 59] = value
    found = sk.scaled_sign(x)
    assert found[1].isnan().all()
    assert same_bits(found[::2], expected[::2])


def test_bad_scales():
    for scale, error in ((-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="scale"):
            sk.scaled_sign(gaussian(2, 3), scale=scale)

"""The accuracy rule itself: what it lets pass, and what it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.cases import later_step
from support.formats import FLOATS, FULL, named
from support.inputs import MUON, gaussian
from support.oracles import exact_newton_schulz, plain_newton_schulz
from support.rule import (
    FACTOR,
    allowed_error,
    assert_rule,
    draws,
    errors,
    exact,
    rms,
    textbook_error,
)
from support.step_rules import assert_step_rule

SHAPES = ((1, 1), (5, 130), (4, 257), (40, 40), (130, 140))


def noisy(truth, size, dtype, seed=0):
    """The truth with a relative error of that size in every matrix, not rounded to less."""
    noise = gaussian(*truth.shape, dtype=torch.float64, seed=seed)
    unit = truth.norm(dim=(-2, -1), keepdim=True) / noise.norm(dim=(-2, -1), keepdim=True)
    return (truth + size * unit * noise).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_times_the_error_is_refused(shape, dtype):
    x = gaussian(draws(*shape), *shape, dtype=dtype)
    truth = torch.from_numpy(exact_newton_schulz(x, MUON))
    plain = plain_newton_schulz(x, MUON)
    theirs = math.hypot(rms(errors(plain, truth)), textbook_error(dtype))
    assert_rule(noisy(truth, theirs, dtype), plain, truth)
    with pytest.raises(AssertionError, match="of plain torch"):
        assert_rule(noisy(truth, 3.0 * theirs, dtype), plain, truth)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sum_one_after_another_passes_beside_an_exact_one(shape, dtype):
    """The plainest algorithm is right, however lucky plain torch is."""
    m, n = shape
    x = gaussian(draws(m, m), m, n, dtype=dtype)
    full = torch.promote_types(dtype, torch.float32)
    product = torch.zeros(len(x), m, m, dtype=full)
    for k in range(n):
        column = x[..., k].to(full)
        product += column.unsqueeze(-1) * column.unsqueeze(-2)
    wide = exact(x)
    truth = wide @ wide.swapaxes(-1, -2)
    rounded = torch.from_numpy(truth.astype(np.float64)).to(dtype)
    assert_rule(product.to(dtype), rounded, truth, terms=n)
    if n > 8:
        with pytest.raises(AssertionError):
            worse = noisy(truth_of(truth), 3.0 * textbook_error(dtype, n), dtype)
            assert_rule(worse, rounded, truth, terms=n)


def truth_of(truth):
    return torch.from_numpy(truth.astype(np.float64))


def test_one_bad_draw_of_many_is_refused():
    truth = gaussian(64, 4, 4, dtype=torch.float64)
    plain = noisy(truth, 1e-6, torch.float32)
    ours = plain.clone()
    ours[17] = noisy(truth[17:18], 7e-6, torch.float32)[0]
    with pytest.raises(AssertionError, match="one draw"):
        assert_rule(ours, plain, truth)


def test_nothing_passes_that_is_not_a_number():
    truth = gaussian(2, 4, 4, dtype=torch.float64)
    plain = torch.full((2, 4, 4), torch.nan)
    for ours in (plain, truth.float().where(truth > truth.min(), torch.inf)):
        with pytest.raises(AssertionError):
            assert_rule(ours, plain, truth)


def test_the_chance_of_a_false_alarm():
    """The spread that `draws` promises, for errors that are independent and Gaussian."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for shape in ((1, 1), (2, 2), (8, 8)):
        count = max(draws(*shape), -(-64 // math.prod(shape)))
        assert count * math.prod(shape) >= 64
        noise = torch.randn(4000, 2, 64, generator=generator, dtype=torch.float64)
        size = noise.square().mean(-1).sqrt()
        ratios.append((size[:, 0] / size[:, 1]).log())
    spread = float(torch.cat(ratios).std())
    assert 0.11 < spread < 0.14
    assert math.log(FACTOR) > 5.0 * spread
    assert draws(100, 100) == 1 and draws(40, 40) == 4 and draws(1, 1) == 64


def test_the_bound_adds_in_squares():
    assert allowed_error(3.0, 4.0) == 10.0
    assert textbook_error(torch.float32, 0, 1.0) == 2.0**-24


@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("op", ["muon_step_", "shampoo_step_", "soap_step_", "deva_step_"])
def test_a_step_with_one_wrong_entry_is_refused(op, dtype, monkeypatch):
    """The second of two matrices errs by 1e-3; as a list taken as one, it would be lost."""
    case = later_step(op, ((16, 16), (4, 5)), dtype)
    case["params"][0].mul_(1e3)
    case.recipe = None
    assert_step_rule(case.clone(), "reference")
    run = type(case).run

    def wrong(self, backend=None):
        run(self, backend)
        self["params"][1].mul_(1.0 + 1e-3 * gaussian(4, 5, dtype=dtype))

    monkeypatch.setattr(type(case), "run", wrong)
    with pytest.raises(AssertionError, match=r"params\[1\]"):
        assert_step_rule(case, "reference")

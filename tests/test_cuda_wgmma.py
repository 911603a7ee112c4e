"""Products by wgmma and TMA, which only sm_90a has, in the emulation."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import DELIVERIES, arranged, barriers
from spectral_kernels.newton_schulz import newton_schulz
from support.cases import new_step
from support.inputs import MUON, gaussian
from support.layouts import same_bits
from support.oracles import plain_newton_schulz
from support.rule import error

pytestmark = pytest.mark.usefixtures("native", "backend_emulated", "poisoned_tensors")

ROWS = MUON[:2]


@pytest.fixture
def poisoned_tensors():
    """What torch allocates is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def by_wgmma(function, **arrangement):
    with arranged(wgmma=True, **arrangement):
        return function()


# Short and long sides beside tiles of 128 and steps of 64; sums in parts; batches.
SHAPES = ((129, 130), (193, 200), (2, 140, 333), (257, 1000), (300, 129), (256, 384))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_those_of_16_bits(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    found = by_wgmma(lambda: newton_schulz(x, coefficients=ROWS, method="standard"))
    expected = newton_schulz(x.double(), coefficients=ROWS, backend="reference")
    allowed = 2.0 * error(plain_newton_schulz(x, ROWS), expected)
    assert error(found, expected) <= allowed


def test_it_is_these_kernels_that_run():
    """Without a barrier of theirs the result is another one."""
    x = gaussian(129, 130, dtype=torch.bfloat16)

    def found(**arrangement):
        return by_wgmma(lambda: newton_schulz(x, coefficients=ROWS[:1]), **arrangement)

    (site,) = (
        name
        for name, following in barriers().items()
        if name.startswith("symmetric_matmul/product_wgmma.cu") and "finish_tile" in following
    )
    assert not same_bits(found(left_out=site), found())


def test_no_order_and_no_delivery_changes_a_bit():
    x = gaussian(2, 200, 300, dtype=torch.bfloat16)
    # Of 3 multiprocessors each has several stretches, and sums are in parts.
    runs = {
        (delivery, order, residents): by_wgmma(
            lambda: newton_schulz(x, coefficients=ROWS, method="standard"),
            delivery=delivery,
            order=order,
            residents=residents,
            multiprocessors=3,
        )
        for delivery in DELIVERIES
        for order, residents in ((0, 1), (1, 3), (2, 2))
    }
    expected = runs["late", 0, 1]
    assert not expected.isnan().any()
    assert [key for key, found in runs.items() if not same_bits(found, expected)] == []


def test_a_step_skips_and_updates():
    """What is not finite keeps its bits; the others are what they are alone."""
    shapes = [(130, 150), (150, 129), (2, 140, 140)]
    start = new_step(
        "muon_step_", shapes, rows=ROWS, method="standard", compute_dtype=torch.bfloat16
    )
    start["grads"][0][3, 4] = torch.nan
    case, plain = start.clone(), start.clone()
    by_wgmma(lambda: case.run("cuda"))
    plain.run("cuda")
    assert same_bits(case["params"][0], start["params"][0])
    assert int(case["skipped"]) == 1
    for ours, theirs in zip(case["params"][1:], plain["params"][1:], strict=True):
        assert error(ours, theirs) < 1e-3

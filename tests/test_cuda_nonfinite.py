"""The rule of test_nonfinite.py for the CUDA C++ kernels, run by the emulation."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import case, later_step, new_step
from support.layouts import same_bits
from test_nonfinite import PLACES, VARIANTS, case_of, check_raise, check_skip

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

# There is no Shampoo step of its own here.
SERVED = [place for place in PLACES if VARIANTS[place[0]][0] != "shampoo_step_"]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("place", SERVED, ids="-".join)
def test_a_nonfinite_element_is_skipped_and_counted(place, value):
    check_skip(place, value)


@pytest.mark.parametrize("place", SERVED, ids="-".join)
def test_a_nonfinite_element_raises_before_anything_is_written(place):
    check_raise(place)


@pytest.mark.parametrize("variant", ["muon", "soap", "soap-between", "deva", "deva-linf"])
def test_propagated_elements_reach_the_parameter_at_once(variant):
    one = case_of(variant, nonfinite="propagate")
    one["grads"][1][1].view(-1)[0] = math.nan
    expected = one.run_reference()
    one.run()
    assert one["skipped"] == 0
    assert torch.equal(one["params"][1][1].isnan(), expected["params"][1][1].isnan())
    assert one["params"][1][1].isnan().any()


@pytest.mark.parametrize("name", ["lefts", "rights", "exp_avgs", "exp_avg_sqs"])
@pytest.mark.parametrize("skip_first", [True, False])
def test_first_call_with_nonfinite_state(skip_first, name):
    """Of a call that only makes bases too, where no kernel reads the second moments."""
    one = new_step("soap_step_", ((3, 4), (4, 3)), skip_first=skip_first, per_matrix_counts=True)
    one[name][0].view(-1)[0] = math.nan
    before, expected = one.clone(), one.run_reference()
    one.run()
    assert one["skipped"] == expected["skipped"] == 1
    for written in one.names(write=True):
        if written != "skipped":
            assert same_bits(one[written][0], before[written][0]), written
    assert one["left_bases"][1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["soap-between", "deva-between", "deva-linf"])
def test_a_parameter_that_would_overflow_is_skipped(variant, dtype):
    op, options = VARIANTS[variant]
    one = later_step(op, ((6, 9), (4, 5)), dtype, taken=2, **{**options, "refresh": [0, 0]})
    one["params"][0].fill_(torch.finfo(dtype).max)
    one["lr"].fill_(30.0)
    one = one.with_(weight_decay=1.0)  # the old parameter times -29
    before = one.clone()
    one.run()
    assert one["skipped"] == 1
    for name in one.names(write=True):
        if name != "skipped":
            assert same_bits(one[name][0], before[name][0]), name
    assert not same_bits(one["params"][1], before["params"][1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["left", "right"])
def test_factors_with_a_nonfinite_element_keep_every_bit(name, value):
    one = case("kron_factors_update_-batch-kl")
    one[name][1, 3, 2] = value
    before = one.clone()
    one.run()
    assert one["skipped"] == 1
    for side in ("left", "right"):
        assert same_bits(one[side][1], before[side][1])
        assert one[side][0].isfinite().all() and not same_bits(one[side][0], before[side][0])

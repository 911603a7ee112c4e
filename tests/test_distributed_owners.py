"""Who owns which matrix: even work, and even refreshes. No ranks are needed."""

from __future__ import annotations

from collections import Counter

import pytest
import spectral_kernels as sk
import torch
from hypothesis import given, settings, strategies as st
from spectral_kernels.optim._distributed.owners import (
    CARD,
    Cost,
    Load,
    Rates,
    assign,
    buckets,
    cost,
    rates_of,
    work,
)
from support.fuzzing import CAMPAIGN

ENTRIES = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.builds(
        Cost,
        st.integers(1, 10**9),
        st.integers(1, 10**6),
        st.dictionaries(
            st.sampled_from([(3, 0), (3, 1), (3, 2), (7, 0)]), st.integers(1, 10**9), max_size=3
        ),
    ),
    max_size=40,
)


@settings(max_examples=100, **CAMPAIGN)
@given(ENTRIES, st.integers(1, 9), st.randoms(use_true_random=False))
def test_no_owner_has_more_than_the_mean_and_one_entry(costs, ranks, random):
    loads = [Load() for _ in range(ranks)]
    owners = assign(costs, loads)
    most = max((cost.flops for cost in costs.values()), default=0)
    of_all = [load.flops for load in loads]
    assert sum(of_all) == sum(cost.flops for cost in costs.values())
    assert max(of_all) <= sum(of_all) / ranks + most
    refreshes = sum((Counter(cost.refreshes) for cost in costs.values()), Counter())
    assert sum((load.refreshes for load in loads), Counter()) == refreshes
    names = list(costs)
    random.shuffle(names)
    shuffled = {name: costs[name] for name in names}
    assert owners == assign(shuffled, [Load() for _ in range(ranks)])


USUAL = Rates()


def _cost(optimizer, place=0, rates=USUAL):
    (param,) = optimizer.param_groups[0]["params"]
    values = optimizer.param_groups[0]
    offset = place if optimizer._staggered(values) else None
    form = optimizer._form(param, values)
    return cost(optimizer._operator, form, values, param.dtype, offset, rates)


@pytest.mark.parametrize("frequency, ranks", [(4, 4), (10, 4), (10, 8), (3, 2)])
@pytest.mark.parametrize("make", [sk.optim.Shampoo, sk.optim.SOAP, sk.optim.DeVA])
def test_no_step_has_the_refreshes_on_one_rank(make, frequency, ranks):
    """Of equal matrices that took turns, one rank would have every one of a step."""
    param = torch.nn.Parameter(torch.empty(64, 64))
    optimizer = make([param], precondition_frequency=frequency, stagger=True)
    costs = {f"{place:03}": _cost(optimizer, place) for place in range(ranks * frequency)}
    loads = [Load() for _ in range(ranks)]
    assign(costs, loads)
    each = costs["000"].refreshes[frequency, 0]
    assert each > 0
    assert [load.flops for load in loads] == [frequency * costs["000"].flops] * ranks
    for load in loads:
        assert load.refreshes == {(frequency, when): each for when in range(frequency)}


# Operations alone, of any dtype.
BARE = Rates(wide=1.0, access=0.0, entry=0.0)


def of(make, *shape, rates=BARE, dtype=torch.float32, **values):
    param = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
    return _cost(make([("w", param)], **values), rates=rates)


def test_what_costs_count():
    muon, shampoo, deva = sk.optim.Muon, sk.optim.Shampoo, sk.optim.DeVA
    third = of(muon, 64, 64).flops
    # Three matrices one below the other, and more steps.
    assert of(muon, 192, 64, split=3).flops == 3 * third
    assert of(muon, 192, 64, split=(64, 128)).flops == third + of(muon, 128, 64).flops
    assert of(muon, 192, 192, split=3).flops < of(muon, 192, 192).flops
    standard = {"method": "standard", "coefficients": [(3.4445, -4.7750, 2.0315)] * 5}
    assert of(muon, 8, 96, **standard).flops == 5 * (3 * 8 * 8 * 96 + 8**3)
    more = {**standard, "coefficients": standard["coefficients"] * 2}
    assert of(muon, 8, 96, **more).flops == 2 * of(muon, 8, 96, **standard).flops
    # One Gram matrix for all five steps of a long matrix: X is read twice, not 15 times.
    assert of(muon, 64, 640).flops == 3 * 64 * 64 * 640 + 17 * 64**3
    # One side alone, or none.
    both, left = (of(shampoo, 64, 32, sides=sides).refreshes for sides in ("both", "left"))
    assert both == {(10, 0): 35 * (64**3 + 32**3)} and left == {(10, 0): 35 * 64**3}
    assert of(shampoo, 64, 32, sides="shorter").refreshes == {(10, 0): 35 * 32**3}
    assert of(deva, 64, 64, norm="linf").flops == 0 < of(deva, 64, 64).flops
    # Blocks take turns too, and what is always due has no turn.
    blocks = of(shampoo, 96, 32, block_size=32, precondition_frequency=2).refreshes
    assert blocks == {(2, 0): 2 * 70 * 32**3, (2, 1): 70 * 32**3}
    assert of(shampoo, 64, 64, precondition_frequency=1).refreshes == {}


def test_passes_and_kinds_of_arithmetic_count():
    muon = sk.optim.Muon
    passes = Rates(narrow=0.0, access=1.0, entry=0.0)
    plain = of(muon, 64, 64, rates=passes).flops
    assert plain == 8 * 64 * 64
    for more, extra in (({"beta2": 0.95}, 4), ({"hyperball": True}, 4)):
        assert of(muon, 64, 64, rates=passes, **more).flops == plain + extra * 64 * 64
    narrow = of(muon, 64, 64, rates=passes, state_dtype=torch.bfloat16).flops
    assert narrow == plain + 12 * 64 * 64
    # A factor of 1024 rows is read and written, however short the other side is.
    assert of(sk.optim.SOAP, 4, 1024, rates=passes).flops > 6 * 1024**2
    tiles = Rates(narrow=0.25, wide=3.0, access=0.0, entry=0.0)
    sixteen, thirtytwo, sixtyfour = (
        of(muon, 64, 64, rates=tiles, compute_dtype=compute, dtype=dtype, method="standard").flops
        for compute, dtype in (
            (None, torch.float32),
            (torch.float32, torch.float32),
            (None, torch.float64),
        )
    )
    assert 4 * sixteen == thirtytwo and sixtyfour == 3 * thirtytwo
    # Of a mixture of both the tiles speed up Newton-Schulz alone.
    deva = sk.optim.DeVA
    assert of(deva, 64, 64, rates=tiles).flops < of(deva, 64, 64).flops
    assert of(sk.optim.SOAP, 64, 64, rates=tiles) == of(sk.optim.SOAP, 64, 64)
    half = Rates(access=0.0, entry=0.0, side=256)
    assert of(muon, 64, 64, rates=half).flops == 2 * of(muon, 64, 64).flops
    assert rates_of(torch.device("cuda")) is CARD


def test_work_has_no_shape_of_its_own():
    """Batches are as many matrices."""
    params = [torch.nn.Parameter(torch.empty(shape)) for shape in ((16, 24), (5, 16, 24))]
    one, five = (
        _cost(sk.optim.SOAP([{"params": [x], "batched": x.ndim == 3, "algorithm": "matrix"}]))
        for x in params
    )
    assert five.flops == 5 * one.flops and five.bytes == 5 * one.bytes
    assert five.refreshes == {when: 5 * taken for when, taken in one.refreshes.items()}
    values = sk.optim.SOAP([params[0]]).param_groups[0]
    step, refreshes = work("soap_step_", 16, 24, values, torch.float32)
    assert step.polynomials == 0.0 and len(refreshes) == 1


@settings(max_examples=200, **CAMPAIGN)
@given(st.lists(st.integers(1, 50)), st.integers(1, 200), st.integers(1, 5))
def test_buckets_have_work_for_every_rank_and_bounded_bytes(sizes, most, ranks):
    found = buckets([(size, size) for size in sizes], most, ranks)
    assert [size for bucket in found for size in bucket] == sizes
    for bucket in found[:-1]:
        assert len(bucket) >= ranks
    for bucket in found:
        assert len(bucket) <= ranks or sum(bucket) <= most

"""Who owns which matrix: even work, and even refreshes. No ranks are needed."""

from __future__ import annotations

from collections import Counter

import pytest
import spectral_kernels as sk
import torch
from hypothesis import given, settings, strategies as st
from spectral_kernels.optim._distributed.owners import Cost, Load, assign, buckets, cost
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


def _cost(optimizer, place=0):
    (param,) = optimizer.param_groups[0]["params"]
    values = optimizer.param_groups[0]
    offset = place if optimizer._staggered(values) else None
    form = optimizer._form(param, values)
    return cost(optimizer._operator, form, values, 4 * param.numel(), offset)


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


def test_what_costs_count():
    def of(make, *shape, **values):
        return _cost(make([torch.nn.Parameter(torch.empty(shape))], **values))

    muon, shampoo, deva = sk.optim.Muon, sk.optim.Shampoo, sk.optim.DeVA
    overhead = of(muon, 1, 1).flops - 5 * 4
    third = of(muon, 64, 64).flops - overhead
    # Three matrices one below the other, and more steps.
    assert of(muon, 192, 64, split=3).flops == 3 * third + overhead
    assert of(muon, 192, 64, split=(64, 128)).flops == third + of(muon, 128, 64).flops
    assert of(muon, 192, 192, split=3).flops < of(muon, 192, 192).flops
    assert of(muon, 64, 64, ns_steps=10).flops == 2 * third + overhead
    assert of(muon, 64, 64, coefficients="polar_express_8").flops * 5 == 8 * third + 5 * overhead
    # One side alone, or none.
    both, left = (of(shampoo, 64, 32, sides=sides).refreshes for sides in ("both", "left"))
    assert both == {(10, 0): 20 * (64**3 + 32**3)} and left == {(10, 0): 20 * 64**3}
    assert of(shampoo, 64, 32, sides="shorter").refreshes == {(10, 0): 20 * 32**3}
    assert of(deva, 64, 64, norm="linf").flops == overhead < of(deva, 64, 64).flops
    # Blocks take turns too, and what is always due has no turn.
    blocks = of(shampoo, 96, 32, block_size=32, precondition_frequency=2).refreshes
    assert blocks == {(2, 0): 2 * 40 * 32**3, (2, 1): 40 * 32**3}
    assert of(shampoo, 64, 64, precondition_frequency=1).refreshes == {}


@settings(max_examples=200, **CAMPAIGN)
@given(st.lists(st.integers(1, 50)), st.integers(1, 200), st.integers(1, 5))
def test_buckets_have_work_for_every_rank_and_bounded_bytes(sizes, most, ranks):
    found = buckets([(size, size) for size in sizes], most, ranks)
    assert [size for bucket in found for size in bucket] == sizes
    for bucket in found[:-1]:
        assert len(bucket) >= ranks
    for bucket in found:
        assert len(bucket) <= ranks or sum(bucket) <= most

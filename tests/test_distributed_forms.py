"""Over ranks: meshes of three dimensions, settings of another form, and what is sent as it lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from ranks.layouts import CHAINS
from ranks.runs import FEW, FORMS, OPTIMIZERS
from support.fuzzing import CAMPAIGN

# Meshes of three dimensions.

# All optimizers on those that are cut over two dimensions, some of them elsewhere.
ALL_OF_THEM = ("hsdp_tp 2x2x1", "hsdp_tp 1x2x2", "replicate_shard_shard 1x2x2")
EIGHT = pytest.param("hsdp_tp 2x2x2", marks=pytest.mark.long)


@pytest.mark.parametrize("layout", [*(x for x in CHAINS if not x.endswith("2x2x2")), EIGHT])
def test_the_bits_of_one_process_on_meshes_of_three_dimensions(workers, layout):
    names = tuple(OPTIMIZERS) if layout in ALL_OF_THEM else FEW
    world = 8 if layout.endswith("2x2x2") else 4
    for different in workers.run(world, "equal_to_one_process", layout, torch.float32, {}, names):
        assert different == dict.fromkeys(names, [])


@pytest.mark.parametrize(
    "layout, how",
    [
        ("hsdp_tp 1x2x2", {"hops": "each"}),
        ("hsdp_tp 2x1x2", {"hops": "each", "keep_weights": True}),
        ("replicate_shard_shard 1x2x2", {"hops": "each"}),
        ("replicate_shard_shard 2x2x1", {"keep_weights": True}),
    ],
)
def test_the_bits_of_one_process_on_them_by_other_ways(workers, layout, how):
    for different in workers.run(4, "equal_to_one_process", layout, torch.float32, how, FEW):
        assert different == dict.fromkeys(FEW, [])


@pytest.mark.parametrize("layout", ["hsdp_tp 1x2x2", "replicate_shard_shard 2x2x1"])
def test_there_and_back_from_meshes_of_three_dimensions(workers, layout):
    for different in workers.run(4, "there_and_back", layout, ["soap"]):
        assert different == {"soap": []}


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_sums_over_a_dimension_of_a_mesh_are_refused_by_name(workers, shape, which):
    for found in workers.run(4, "refused_sums", shape, which):
        for kind, message in found:
            assert kind == "TypeError"
            assert "(summed) has the placement P" in message and "redistribute it" in message


# Settings whose state or step has another form.


@pytest.mark.parametrize("world, layout", [(3, "fsdp"), (2, "ddp"), (4, "both")])
def test_the_bits_of_one_process_in_other_forms(workers, world, layout):
    arguments = (layout, torch.float32, {}, tuple(FORMS))
    for different in workers.run(world, "equal_to_one_process", *arguments):
        assert different == dict.fromkeys(FORMS, [])


@pytest.mark.parametrize("world, layout", [(3, "fsdp"), (2, "ddp")])
def test_state_of_other_forms_from_one_process_to_ranks_and_back(workers, world, layout):
    for different in workers.run(world, "there_and_back", layout, tuple(FORMS)):
        assert different == dict.fromkeys(FORMS, [])


# What is sent from where it lies and received where it belongs.


@pytest.mark.parametrize(
    "world, layout, how",
    [
        (2, "fsdp", {"bucket_bytes": 1}),
        (2, "ddp", {"bucket_bytes": 1}),
        (3, "fsdp", {"bucket_bytes": 1}),
        (2, "columns", {}),
        (2, "fsdp", {"keep_weights": True, "bucket_bytes": 1}),
        (4, "hsdp_tp 1x2x2", {"hops": "each", "bucket_bytes": 1}),
    ],
)
def test_the_bits_of_one_process_where_everything_travels_by_itself(workers, world, layout, how):
    found = workers.run(world, "in_place", layout, how)
    for different, messages, _ in found:
        assert different == dict.fromkeys(FEW, [])
        assert messages > 0
    # Rows are received in whole matrices; what waits, or goes on from line to line, is not.
    in_place = sum(there for *_, there in found)
    assert layout == "columns" or (in_place > 0) == (layout == "fsdp")


@pytest.mark.parametrize("by_messages, places", [(True, 3), (False, 1)])
@pytest.mark.parametrize("layout", ["fsdp", "ddp", "columns"])
def test_more_buckets_than_places(workers, layout, by_messages, places):
    for different, rooms in workers.run(2, "in_many_buckets", layout, by_messages):
        assert different == [] and rooms == [places]


SIZES = st.lists(st.integers(0, 9), max_size=5)


@pytest.mark.parametrize("examples", [15, pytest.param(500, marks=pytest.mark.long)])
def test_tensors_arrive_by_messages_and_by_collectives(workers, examples):
    @settings(max_examples=examples, **CAMPAIGN)
    @given(
        st.lists(SIZES, min_size=3, max_size=3),
        st.lists(st.booleans(), min_size=1, max_size=3),
        st.sampled_from([1, 8, 20, 1000]),
    )
    def check(sizes, numbers, small):
        for found in workers.run(3, "carried", sizes, numbers, small):
            assert all(map(all, found)) and len(found) == 4

    check()

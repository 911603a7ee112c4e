"""Optimizers that are spread over ranks: the bits of one process, in every layout."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import spectral_kernels as sk
import torch
from hypothesis import given, settings, strategies as st
from ranks.layouts import GRIDS, LAYOUTS
from ranks.runs import FEW, FORMS, OPTIMIZERS
from spectral_kernels.optim._distributed import wire
from support.fuzzing import CAMPAIGN

WORLDS = [(world, layout) for layout in LAYOUTS for world in (1, 2, 3, 4)]


@pytest.mark.parametrize("world, layout", [*WORLDS, *((4, layout) for layout in GRIDS)])
def test_the_bits_of_one_process(workers, world, layout):
    for different in workers.run(world, "equal_to_one_process", layout, torch.float32):
        assert different == dict.fromkeys(OPTIMIZERS, [])


@pytest.mark.parametrize("layout", ["fsdp", "ddp", "both"])
def test_the_bits_of_one_process_in_bfloat16(workers, layout):
    for different in workers.run(4, "equal_to_one_process", layout, torch.bfloat16):
        assert different == dict.fromkeys(OPTIMIZERS, [])


@pytest.mark.parametrize("world, layout", [(3, "fsdp"), (3, "ddp"), (4, "both")])
def test_the_bits_of_one_process_by_the_collectives_of_other_backends(workers, world, layout):
    for different, calls in workers.run(world, "by_collectives", layout):
        assert different == dict.fromkeys(FEW, []) and calls


# Gradients to owners and weights back, and along one dimension of the mesh after another.
KEEPING, ALONG = {"keep_weights": True}, {"hops": "each"}


@pytest.mark.parametrize(
    "world, layout, dtype, how",
    [
        (2, "fsdp", torch.float32, KEEPING),
        (3, "columns", torch.bfloat16, KEEPING),
        (4, "fsdp_tp", torch.float32, ALONG),
        (4, "hsdp", torch.float32, KEEPING | ALONG),
        (4, "both", torch.float32, KEEPING | ALONG),
    ],
)
def test_the_bits_of_one_process_by_other_ways(workers, world, layout, dtype, how):
    for different in workers.run(world, "equal_to_one_process", layout, dtype, how, FEW):
        assert different == dict.fromkeys(FEW, [])


@pytest.mark.parametrize(
    "world, layout, hops", [(3, "fsdp", "one"), (4, "both", "each"), (2, "columns", "one")]
)
def test_weights_that_others_change_travel_to_owners_that_keep_them(workers, world, layout, hops):
    found = workers.run(world, "changed_by_others", layout, hops)
    for different, _ in found:
        assert different == dict.fromkeys(FEW, [])
    first, *steps = (sum(sent) for sent in zip(*(sent for _, sent in found), strict=True))
    # Weights go along in the first step, in that of the change, and after loading.
    usual = steps[0]
    assert steps[1] == steps[3] == usual < steps[2] < first == steps[4]


def test_checksums_see_every_change(workers):
    assert workers.run(1, "checksums_of_changes") == [[]]


@pytest.mark.parametrize(
    "world, layout, dtype",
    [
        (3, "fsdp", torch.float32),
        (2, "ddp", torch.float32),
        (4, "hsdp", torch.float32),
        (4, "both", torch.bfloat16),
    ],
)
def test_a_wire_of_16_bits_keeps_its_bound(workers, world, layout, dtype):
    found = workers.run(world, "on_a_narrow_wire", layout, dtype)
    for worst, left_alone, differs in found:
        assert worst == found[0][0] and differs == []
        assert left_alone == dict.fromkeys(OPTIMIZERS, True)
        assert all(share <= 1.0 for share in worst.values()), worst
        if dtype == torch.float32:
            # No bound that anything would keep.
            assert all(share > 0.5 for share in worst.values()), worst


@pytest.mark.parametrize("cautious", [False, True])
def test_weights_decay_where_an_update_comes_as_where_it_is_made(cautious):
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(9, 14, generator=generator, dtype=torch.float32) for _ in range(2))
    params = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros_like(start))]
    for param in params:
        param.grad = grad.clone()
    sk.optim.Muon(params, lr=0.1, weight_decay=0.5, cautious_weight_decay=cautious).step()
    expected, update = (param.detach() for param in params)
    found = wire.moved(start, update, 1.0 - 0.1 * 0.5, cautious=cautious)
    ulps = 2.0 * torch.finfo(torch.float32).eps * start.abs()
    assert bool(((found - expected).abs() <= ulps).all())
    assert not torch.equal(found, wire.moved(start, update, 0.95, cautious=not cautious))
    assert torch.equal(wire.moved(start, torch.full_like(start, -0.0), 0.95), start)


def test_a_narrow_wire_of_many_forms(workers):
    for different in workers.run(3, "forms_on_a_narrow_wire"):
        assert different == []


@pytest.mark.parametrize("world, layout", [(2, "fsdp"), (3, "ddp"), (4, "both"), (4, "hsdp")])
def test_state_that_is_asked_for_before_the_first_step_changes_nothing(workers, world, layout):
    for different in workers.run(world, "asked_for_state_before_the_first_step", layout):
        assert different == dict.fromkeys(OPTIMIZERS, [])


@pytest.fixture(scope="module", params=["fsdp", "ddp", "both"])
def checkpoint(request, workers, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp(request.param))
    names = ["shampoo", "deva"] if request.param == "both" else [*OPTIMIZERS]
    workers.run(4, "save_in_the_middle", request.param, folder, names)
    return request.param, folder, names


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(workers, checkpoint, world):
    layout, folder, names = checkpoint
    layout = layout if layout in LAYOUTS or world % 2 == 0 else "columns"
    for different in workers.run(world, "resume", layout, folder, names):
        assert different == dict.fromkeys(names, [])


def test_a_checkpoint_goes_on_in_one_process(workers, checkpoint):
    _, folder, names = checkpoint
    assert workers.run(1, "resume", "alone", folder, names) == [dict.fromkeys(names, [])]


def test_a_checkpoint_that_is_written_while_steps_are_taken(workers, tmp_path):
    folder = str(tmp_path)
    assert workers.run(2, "save_while_training", folder) == [{"shampoo": []}] * 2
    found = workers.run(3, "resume", "columns", folder, ["shampoo"])
    assert found == [{"shampoo": []}] * 3


@pytest.mark.parametrize(
    "world, layout, names",
    [
        (3, "fsdp", [*OPTIMIZERS]),
        (2, "ddp", [*OPTIMIZERS]),
        (4, "both", ["soap"]),
        (4, "fsdp_tp", ["shampoo", "deva"]),
        (4, "some_plain", ["muon", "shampoo"]),
    ],
)
def test_from_one_process_to_ranks_and_back(workers, world, layout, names):
    for different in workers.run(world, "there_and_back", layout, names):
        assert different == dict.fromkeys(names, [])


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_what_one_rank_has_saved_is_refused_by_the_others(workers, layout, tmp_path):
    first, *others = workers.run(3, "parts_are_a_rank_s_own", layout, str(tmp_path))
    assert all("the parts of another rank" in message for message in others[0])
    assert first and others == [others[0], others[0]]


@pytest.mark.parametrize("what", ["state_dict", "load_state_dict", "consolidate"])
def test_a_call_on_one_rank_alone_is_a_sentence(workers, what):
    first, *others = workers.run(3, "called_by_the_first_rank", what)
    assert first.startswith(
        f"{what}() of an optimizer that is spread over 3 ranks is called by all"
    )
    assert "the ranks [1, 2] had not" in first and others == ["", ""]


def test_a_constructor_on_one_rank_alone_is_a_warning_and_a_sentence(workers):
    first, *others = workers.run(3, "made_by_the_first_rank")
    assert others == [([], ""), ([], "")]
    [warning], message = first
    expected = (
        "the constructor, or add_param_group(), of an optimizer that is spread over 3 ranks is "
        "called by all of them; after {} s the ranks [1, 2] had not"
    )
    assert warning == expected.format("0.2") + "; waiting for 0.3 s more"
    assert message.startswith(expected.format("0.5") + ": call it outside of `if rank == 0`")


# Gradients.


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_absent_gradients_are_as_in_one_process(workers, layout):
    for found in workers.run(3, "absent_everywhere", layout):
        assert found == dict.fromkeys(OPTIMIZERS, ([], 0))


@pytest.mark.parametrize("layout", ["fsdp", "replicated", "ddp"])
def test_a_gradient_that_one_rank_lacks_raises_on_all(workers, layout):
    for message, before, after in workers.run(3, "absent_on_one_rank", layout):
        assert message == (
            "tall has a gradient on the ranks [0, 2] and none on [1]: nothing was stepped"
        )
        assert before == after == []


def test_all_hear_of_what_some_ranks_of_another_mesh_lack(workers):
    """Ranks 0 and 2 share it, on a line of the mesh of all."""
    said = "one_row has a gradient on the ranks [0] and none on [2]: nothing was stepped"
    found = workers.run(4, "absent_on_one_rank", "fsdp_tp", "one_row", 2)
    for rank, (message, before, after) in enumerate(found):
        assert message == said + (" (on rank 0)" if rank in (1, 3) else "")
        assert before == after == []


def test_all_hear_of_groups_that_differ_in_another_mesh(workers):
    found = workers.run(4, "refused_on_a_line", "one_row")
    for rank, (kind, message, different) in enumerate(found):
        assert kind == "ValueError" and "rank 2 one_row of shape (2, 18)" in message
        assert message.endswith(" (on rank 0)") == (rank in (1, 3))
        assert different == []


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("lr", "ValueError", "param_groups[0]: lr must be in [0, inf), not -1.0"),
        ("another lr", "ValueError", "groups must be the same on all ranks, but rank 0 has even"),
        ("gradient", "TypeError", "the gradient of tall is a Parameter, the parameter a DTensor"),
        ("placements", "ValueError", "the gradient of tall has placements (Replicate(),)"),
    ],
)
def test_what_one_rank_cannot_do_raises_on_all(workers, what, kind, words):
    for rank, (found, message, before, after) in enumerate(
        workers.run(3, "wrong_on_one_rank", what)
    ):
        assert found == kind and message.startswith(words)
        assert message.endswith("(on rank 1)") == (rank != 1 and what != "another lr")
        assert before == after == []


@pytest.mark.parametrize("wrong", ["tall", "bias"])
def test_state_that_does_not_fit_on_one_rank_raises_on_all(workers, wrong):
    for kind, message, before, after in workers.run(3, "state_that_an_owner_has_lost", wrong):
        assert kind == "ValueError" and f"of {wrong} has shape (2,)" in message
        assert before == after == []


@pytest.mark.parametrize("what", ["gradients", "replicated", "weights"])
def test_copies_that_are_not_the_same_are_refused(workers, what):
    name = "weights" if what == "weights" else "gradients"
    for message, different in workers.run(3, "different_copies", what):
        assert message.startswith(f"the {name} of tall are not the same on the ranks [0, 1, 2]")
        assert different == []


@pytest.mark.parametrize(
    "layout, nonfinite",
    [
        ("fsdp", "skip"),
        ("columns", "skip"),
        ("ddp", "skip"),
        ("fsdp", "propagate"),
        ("fsdp", "raise"),
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank(workers, layout, nonfinite):
    for found in workers.run(3, "not_finite", layout, nonfinite):
        messages = found.pop("messages", set())
        assert messages == ({"uneven has a non-finite gradient"} if nonfinite == "raise" else set())
        for different, counts, expected in found.values():
            assert different == []
            if nonfinite == "skip":
                # The matrix is counted by its owner, AdamW's tensor by everyone.
                assert expected == 2 and sorted(counts) == [1, 1, 2]
            else:
                assert expected == 0 and counts == [0, 0, 0]


# Trainings.


@pytest.mark.parametrize("name", ["muon", "shampoo", "soap", "deva"])
@pytest.mark.parametrize("kind, world", [("ddp", 2), ("replicate", 2), ("fsdp", 2), ("hsdp", 4)])
def test_a_training_as_in_one_process(workers, kind, world, name):
    for different, _ in workers.run(world, "trained", kind, name):
        assert different == []


@pytest.mark.parametrize("target", ["dion", "distributed_shampoo"])
def test_swapped_kernels_under_other_people_s_distributors(workers, target):
    found = workers.run(2, "swapped", target)
    for different, calls, of_one in found:
        assert different == [] and 0 < calls <= of_one
    if target == "dion":
        # Each matrix once, on one of the ranks.
        assert sum(calls for _, calls, _ in found) == found[0][2] == 3 * 4


@pytest.mark.parametrize("real", [False, True])
def test_checkpoints_of_torchtitan_s_container(workers, real, tmp_path):
    """What it does to an optimizer, and where torchtitan is installed the container itself."""
    if real:
        pytest.importorskip("torchtitan", reason="torchtitan is not installed")
    workers.run(2, "save_from_a_container", "fsdp", str(tmp_path), real)
    for different in workers.run(3, "resume_in_a_container", "columns", str(tmp_path), real):
        assert different == dict.fromkeys(OPTIMIZERS, [])


@pytest.mark.parametrize("package", ["accelerate", "lightning.fabric", "lightning.pytorch"])
def test_a_training_under_a_trainer(workers, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    assert workers.run(2, "trained_by", package) == [[], []]


def test_clipping_sees_all_parts(workers):
    for same, ratio in workers.run(3, "clipped", "deva"):
        assert same and abs(ratio - 1.0) < 1e-5


def test_an_overflow_on_one_rank_skips_the_step_on_all(workers):
    assert workers.run(3, "overflowed") == [([], [])] * 3


# What is done and moved.


@pytest.mark.parametrize(
    "layout, how",
    [
        *((each, {}) for each in ("fsdp", "columns", "replicated", "ddp", "hsdp", "both")),
        ("fsdp", {"wire": torch.bfloat16}),
        ("ddp", {"wire": torch.bfloat16}),
        ("fsdp", KEEPING),
        ("both", ALONG),
        ("hsdp", KEEPING | ALONG),
    ],
)
def test_every_matrix_is_stepped_once_and_bytes_are_those_of_the_plan(workers, layout, how):
    found = workers.run(4, "work_done", layout, how)
    assert sum(each["entries"] for each in found) == 5
    assert all(each["loads"] == found[0]["loads"] for each in found)
    assert all(each["text"] == found[0]["text"] for each in found)
    buckets = found[0]["buckets"]
    # The meeting; then both ways, and what every rank holds one way only.
    ways = 1 if layout in ("replicated", "ddp") else 2
    hops = 2 if how.get("hops") == "each" else 1
    assert buckets > 1 and {each["collectives"] for each in found} == {1}
    assert max(each["messages"] for each in found) <= hops * ways * buckets * (4 // hops - 1)
    assert {each["of_group"] for each in found} == {4 // hops}
    assert sum(each["sent"] for each in found) == found[0]["planned"]


@pytest.mark.parametrize(
    "layout, how, moved",
    [
        # Of 16 x 24 every rank has a quarter, the owner too: three quarters go there, and back.
        ("fsdp", {}, (2 + 1) * 3 / 4 * 4),
        ("fsdp", KEEPING, (1 + 1) * 3 / 4 * 4),
        ("fsdp", {"wire": torch.bfloat16}, (1 + 1) * 3 / 4 * 2),
        # Half of it in each of two hops.
        ("both", ALONG, (2 + 1) * (1 / 2 + 1 / 2) * 4),
        ("both", KEEPING | ALONG, (1 + 1) * (1 / 2 + 1 / 2) * 4),
        # There half of it, within the owner's replica; back to the three others, each a half.
        ("hsdp", {}, (2 * 1 / 2 + 3 / 2) * 4),
        # Back all of it to one of the other replica, and then half of it within each.
        ("hsdp", KEEPING | ALONG, (1 * 1 / 2 + 1 + 2 * 1 / 2) * 4),
    ],
)
def test_bytes_of_an_element(workers, layout, how, moved):
    found = workers.run(4, "work_done", layout, how)
    assert {each["bytes"]["even"] for each in found} == {moved * 16 * 24}


def test_state_is_at_one_owner(workers):
    [whole] = workers.run(1, "whole_state")
    found = workers.run(4, "work_done", "fsdp")
    # Step counts of AdamW are on every rank.
    assert sum(each["state"] for each in found) == whole + 3 * 4 * 4
    loads, costs = found[0]["loads"], found[0]["costs"]
    assert sum(loads) == sum(costs.values()) and max(loads) <= sum(loads) / 4 + max(costs.values())
    # A quarter of the state and one matrix, as of the work: 3 of 20 are AdamW's, cut by rows.
    largest = 4 * max(18 * 33, 33 * 18) + 4
    assert max(each["state"] for each in found) <= whole / 4 + largest


def test_owners_do_not_depend_on_the_order_of_parameters(workers):
    one, other = (workers.run(3, "owners_by_name", order) for order in (0, 1))
    assert one == other == [one[0]] * 3
    assert {owner for owner in one[0].values() if owner is not None} == {0, 1, 2}


@pytest.mark.parametrize("how", ["whole", "few", "cut"])
def test_batches_of_matrices(workers, how):
    for different, owners in workers.run(3, "experts", how):
        assert different == []
        assert (owners == [None]) == (how != "cut")


def test_a_group_that_is_added_later(workers):
    assert workers.run(3, "added_later") == [[]] * 3


# Failures.


@pytest.mark.parametrize("phase, which", [("gather", 0), ("gather", 1), ("scatter", 0)])
@pytest.mark.parametrize("how", ["dies", "stops"])
def test_a_rank_that_dies_or_stops(workers, how, phase, which):
    timeout = 2.0
    found = workers.attempt(3, "interrupted", how, phase, which, timeout=timeout, of=[0, 1])
    for first, second, changed, names, took in found:
        # Which of those in flight fails first depends on how far the others had come.
        where = re.search(r"bucket (\d) of (\d), (gather|scatter), from (\w+) to \w+, in", first)
        assert where is not None and int(where[2]) == len(names)
        assert where[4] == names[int(where[1]) - 1]
        assert first.startswith("the ranks [0, 1, 2] could not end") and "step 3" in first
        assert changed == []
        assert second.startswith("step 3 ended between two exchanges")
        assert second.endswith("load a checkpoint")
        assert took < timeout + 1.0


# Refusals.


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("partial", "TypeError", "(summed) has the placement P"),
        ("group and DTensors", "ValueError", "distributed is for plain parameters"),
        ("offloaded", "ValueError", "(moved) lies on cpu and its mesh on cuda"),
        ("flat", "TypeError", "is flattened or partitioned by a wrapper"),
        ("not a group", "TypeError", "distributed must be a ProcessGroup"),
        ("wire", "ValueError", "wire must be None or torch.bfloat16, not torch.float16"),
        ("other wire", "ValueError", "groups must be the same on all ranks, but rank 0 has even"),
        ("a sphere and a wire", "ValueError", "has hyperball=True, whose step needs the weights"),
        ("mesh of two dimensions", "ValueError", "a mesh of one dimension, not of 2"),
        ("lr", "ValueError", "groups must be the same on all ranks, but rank 0 has even"),
        ("order", "ValueError", "groups must be the same on all ranks, but rank 0 has even"),
        ("shape", "ValueError", "rank 1 tall of shape (34, 18)"),
        ("dtype", "ValueError", "rank 1 tall of shape (33, 18), torch.bfloat16"),
        ("number", "ValueError", "rank 0 has 4 parameters, rank 1 has 3"),
    ],
)
def test_constructors_refuse_in_one_sentence(workers, what, kind, words):
    for found, message in workers.run(2, "refused", what):
        assert found == kind and words in message


def test_a_sphere_after_the_fact_is_refused_where_updates_travel(workers):
    for message, different in workers.run(2, "wire_and_a_later_sphere"):
        assert "has hyperball=True, whose step needs the weights" in message
        assert different == []


def test_loading_something_else_on_one_rank_raises_on_all(workers):
    for message, different in workers.run(3, "other_state_on_one_rank"):
        assert message.startswith("the ranks [0, 1, 2] were given different state of even")
        assert different == []


def test_loading_what_does_not_fit_raises_on_all(workers):
    for kind, message, different in workers.run(3, "state_that_does_not_fit"):
        assert kind == "ValueError" and "left of uneven has shape (5, 5)" in message
        assert different == []


# What hypothesis draws.

MESHES = [(3,), (4,), (2, 2), (1, 3), (3, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)]
# What an optimizer is told of exchanges.
HOWS = [{}, KEEPING, ALONG, KEEPING | ALONG]


@st.composite
def models(draw):
    mesh = draw(st.sampled_from(MESHES))
    params = []
    for _ in range(draw(st.integers(1, 5))):
        shape = tuple(
            draw(st.lists(st.integers(1, 12), min_size=1, max_size=2))
            if draw(st.booleans())
            else [draw(st.integers(1, 9)) for _ in range(4)]
        )
        dims = st.one_of(st.none(), st.integers(0, len(shape) - 1))
        params.append((shape, tuple(draw(dims) for _ in mesh)))
    return mesh, params


def campaign(few: int, many: int):
    """Few examples, the same at every run, and many in the long run."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.long)])


@campaign(10, 400)
def test_any_model_on_any_mesh(workers, examples):
    @settings(max_examples=examples, **CAMPAIGN)
    @given(
        # One knows its parameters by their names.
        st.sampled_from(sorted({*OPTIMIZERS, *FORMS} - {"muon_in_parts"})),
        models(),
        st.sampled_from([1, 500, 1 << 20]),
        st.sampled_from(HOWS),
        st.sampled_from([torch.float32, torch.bfloat16]),
        st.sampled_from([8, 1 << 18]),
    )
    def check(name, model, bucket_bytes, how, dtype, small):
        mesh, params = model
        arguments = name, mesh, params, {**how, "bucket_bytes": bucket_bytes}, dtype, small
        for different in workers.run(math.prod(mesh), "drawn", *arguments):
            assert different == []

    check()


@campaign(40, 1000)
def test_regions_are_what_dtensors_hold(workers, examples):
    cut = st.one_of(st.none(), st.tuples(st.integers(0, 1), st.sampled_from([1, 1, 2, 3])))

    @settings(max_examples=examples, **CAMPAIGN)
    @given(
        st.sampled_from(MESHES),
        st.tuples(st.integers(1, 20), st.integers(1, 20)),
        st.tuples(cut, cut, cut),
    )
    def check(mesh, shape, cuts):
        cuts = cuts[: len(mesh)]
        assert all(workers.run(math.prod(mesh), "placed_as_dtensor_does", mesh, shape, cuts))

    check()


@pytest.mark.long
def test_five_hundred_steps(workers):
    for growth, different in workers.run(3, "soak", 500):
        assert different == []
        assert growth * 4096 < 4 << 20


def test_plain_parameters_load_nothing_of_this():
    """Torch loads DTensors with its compiler, at the first step; nothing here does."""
    code = (
        "import sys, torch, spectral_kernels as sk\n"
        "x = torch.nn.Parameter(torch.ones(3, 4)); x.grad = torch.ones(3, 4)\n"
        "opt = sk.optim.Muon([x]); opt.step(); opt.load_state_dict(opt.state_dict())\n"
        "opt.consolidate(); print(opt.plan())\n"
        "ours = 'spectral_kernels.optim._distributed.'\n"
        "print({name.removeprefix(ours) for name in sys.modules if name.startswith(ours)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "matrix, whole on every rank" in done.stdout
    assert done.stdout.splitlines()[-1] in ("{'config', 'table'}", "{'table', 'config'}")


def test_a_copy_of_a_spread_optimizer_is_refused(workers):
    for kind, message in workers.run(2, "copied"):
        assert kind == "TypeError" and "spread over ranks cannot be copied or pickled" in message


@pytest.mark.parametrize("world", [2, 4])
def test_the_benchmark_has_the_owners_and_bytes_of_the_optimizers(workers, world):
    pytest.importorskip("matplotlib", reason="the extra 'cli' is not installed")
    distributed = pytest.importorskip("spectral_kernels.benchmarks.distributed")
    campaigns, found = zip(*workers.run(world, "benchmarked"), strict=True)
    campaign = campaigns[0]
    rows = distributed.compared(campaign, found)
    layouts = ["replicated", "ddp", "fsdp", *(["hsdp"] if world == 4 else [])]
    assert [row["key"] for row in rows] == [
        f"{name} {layout} {world}" for name in campaign.shapes for layout in layouts
    ]
    for row in rows:
        assert row["failure"] is None and row["predicted_s"] > 0.0 < row["median_s"]
    found[0].loads = {key: (loads, sent + 1) for key, (loads, sent) in found[0].loads.items()}
    for row in distributed.compared(campaign, found):
        assert row["layout"] == "replicated" or row["failure"].endswith("in plan()")


def test_a_second_optimizer_of_a_mesh_makes_no_process_group(workers):
    """Each has threads that wake up again and again, and ends with the process."""
    assert workers.run(4, "groups_of_another") == [(0, True)] * 4


def test_watching_a_spread_optimizer(workers):
    found = workers.run(3, "watched")
    names = [name for each in found for name in each]
    assert sorted(names) == sorted(set(names)) and len(names) == 5

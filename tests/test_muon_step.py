"""muon_step_ on every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from spectral_kernels.coefficients import resolve
from support.cases import later_step, new_step
from support.formats import FLOATS, also_on_cuda, named
from support.fuzzing import fuzzed
from support.inputs import MUON, gaussian, generator
from support.layouts import LAYOUTS, Placed, same_bits
from support.rule import error
from support.step_rules import assert_step_rule, roundings_of

pytestmark = pytest.mark.usefixtures("backend")


# muon_step_

LIST = ((5, 8), (9, 4), (2, 3, 7), (1, 6), (12, 40))


@pytest.mark.parametrize("dtype", also_on_cuda(FLOATS, torch.float32, torch.bfloat16), ids=named)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=named)
def test_muon_step(dtype, nesterov, compute_dtype, backend):
    case = later_step("muon_step_", LIST, dtype, nesterov=nesterov, compute_dtype=compute_dtype)
    assert_step_rule(case, backend.name, roundings=roundings_of(dtype, compute_dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"momentum": 0.0},
        {"weight_decay": 0.0, "momentum": 0.5},
        {"norm": "schatten8"},
        {"method": "gram", "restarts": [(2, 4), (2,), (1, 3), (2, 3), (1, 2, 3, 4)]},
        {"method": "standard", "rows": resolve("quintic").rows},
        {"eps": 100.0},
        {"norm_factor": 1.5},
        {"scales": [0.0, 0.5, 1.0, 2.0, 4.0]},
    ],
    ids=str,
)
def test_muon_step_options(options, backend):
    assert_step_rule(later_step("muon_step_", LIST, **options), backend.name)


@pytest.mark.in_full("cuda")
def test_first_muon_step_of_zero_momentum(backend):
    assert_step_rule(new_step("muon_step_", LIST), backend.name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_muon_step_in_any_layout_writes_nothing_around(layout, backend):
    case = later_step("muon_step_", ((2, 6, 10), (7, 5)))
    lists = {}
    placed = []
    for name in ("params", "grads", "momentum_buffers"):
        placed += (of_name := [Placed(x, layout) for x in case[name]])
        lists[name] = [x.tensor for x in of_name]
    moved = case.with_(**lists)
    expected = case.to(torch.float64).run_reference()
    moved.run(backend.name)
    for x in placed:
        x.assert_untouched_around()
    for name in ("params", "momentum_buffers"):
        for ours, truth in zip(moved[name], expected[name], strict=True):
            assert error(ours, truth) < 1e-5


def test_muon_step_with_an_expanded_gradient(backend):
    case = new_step("muon_step_", ((4, 6), (3, 4, 6)))
    wide = [gaussian(1, 6).expand(4, 6), gaussian(4, 6).expand(3, 4, 6)]
    narrow = [grad.contiguous() for grad in wide]
    assert same_bits(
        case.clone().with_(grads=wide).run(backend.name),
        case.clone().with_(grads=narrow).run(backend.name),
    )


def test_muon_step_of_mixed_dtypes(backend):
    shapes = ((5, 8), (8, 5), (6, 6), (2, 4, 9))
    case = later_step("muon_step_", shapes, FLOATS)
    together = case.clone()
    together.run(backend.name)
    for i, shape in enumerate(shapes):
        alone = later_step("muon_step_", shapes, FLOATS)
        one = alone.with_(
            **{name: alone[name][i : i + 1] for name in alone.names(write=True)[:-1] + ["grads"]},
            scales=alone.options["scales"][i : i + 1],
            restarts=alone.options["restarts"][i : i + 1],
        )
        one.run(backend.name)
        assert same_bits(one["params"][0], together["params"][i]), shape
        assert same_bits(one["momentum_buffers"][0], together["momentum_buffers"][i]), shape


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("empty", [(0, 5), (5, 0), (0, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty_entries_of_a_muon_step(empty, position, backend):
    shapes = [(3, 4), (4, 3), (5, 5), (2, 7)]
    case = later_step("muon_step_", shapes)
    alone = case.clone().run(backend.name)
    with_empty = case.clone()
    for name in [*case.names(write=True)[:-1], "grads"]:
        nothing = torch.zeros(()) if name == "step_counts" else torch.zeros(empty)
        with_empty[name].insert(position, nothing)
    with_empty.options["scales"].insert(position, 1.0)
    with_empty.options["restarts"].insert(position, ())
    with_empty.run(backend.name)
    for name in [*case.names(write=True)[:-1], "grads"]:
        del with_empty[name][position]
    assert same_bits(with_empty.written(), alone)


def test_empty_list(backend):
    new_step("muon_step_", ()).run(backend.name)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_zero_gradient_decays_only(dtype, backend):
    case = new_step("muon_step_", ((4, 6),), dtype, lr=0.5, weight_decay=0.5)
    case = case.with_(grads=[torch.zeros(4, 6, dtype=dtype)])
    before = case["params"][0].clone()
    case.run(backend.name)
    assert torch.equal(case["params"][0], before * 0.75)
    assert not case["momentum_buffers"][0].any()
    assert case["step_counts"][0] == 1.0


def test_muon_step_at_any_scale(backend):
    case = new_step("muon_step_", ((4, 9), (9, 4)))
    grads = [
        torch.randint(-15, 16, p.shape, generator=generator(1)).float() for p in case["params"]
    ]
    unit = case.clone().with_(grads=grads)
    unit.run(backend.name)
    for k in (-118, -60, 60, 118):
        scaled = case.clone().with_(
            grads=[g * 2.0 ** (k // 2) * 2.0 ** (k - k // 2) for g in grads]
        )
        scaled.run(backend.name)
        assert same_bits(scaled["params"], unit["params"]), k


@st.composite
def muon_steps(draw):
    sizes = st.integers(1, 12)
    shapes = draw(
        st.lists(
            st.one_of(st.tuples(sizes, sizes), st.tuples(st.just(2), sizes, sizes)), max_size=4
        )
    )
    # One element nearly cancels in the step now and then, and nothing is accurate then.
    shapes = [s for s in shapes if s[-1] * s[-2] > 1]
    dtypes = [draw(st.sampled_from(FLOATS)) for _ in shapes]
    return later_step(
        "muon_step_",
        shapes,
        dtypes,
        taken=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**31)),
        lr=draw(st.floats(0.0, 0.5)),
        momentum=draw(st.sampled_from([0.0, 0.5, 0.95])),
        nesterov=draw(st.booleans()),
        weight_decay=draw(st.sampled_from([0.0, 0.3])),
        maximize=draw(st.booleans()),
        # As the public function has it for matrices of this size: the standard form.
        restarts=[tuple(range(1, len(MUON)))] * len(shapes),
    )


@fuzzed(muon_steps(), long=3000)
def test_any_muon_step(case):
    assert_step_rule(case, "cpu")

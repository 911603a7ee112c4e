"""deva_step_ on every backend and instruction set."""

from __future__ import annotations

import math

import pytest
import spectral_kernels as sk
import torch
from hypothesis import strategies as st
from spectral_kernels._operators import TABLE
from support import step_rules
from support.cases import later_step, new_step, next_step
from support.formats import FLOATS, FULL, named
from support.fuzzing import fuzzed
from support.inputs import gaussian, generator, orthogonal
from support.layouts import LAYOUTS, same_bits
from support.rule import error, unit_roundoff
from support.step_rules import assert_step_rule

pytestmark = pytest.mark.usefixtures("backend")

SQUARES = ((5, 5), (2, 4, 4), (9, 9), (1, 1))
LIST = ((5, 8), (9, 4), (2, 3, 6), (1, 6), (12, 12))
VARIANCES = ("momentum", "gradient", "instant", "low_memory", "none")
NORMS_AND_VARIANCES = [
    (norm, variance)
    for norm in ("schatten", "linf")
    for variance in VARIANCES
    if (norm, variance) != ("linf", "low_memory")
]
PUBLIC = {"reference": True, "eps_mode": "inside"}
STATE = TABLE["deva_step_"].states


def started(shapes, dtype, *, taken=4, seed=0, **options):
    """A step in the middle of a run that began with given bases and definite factors.

    The factor of a first gradient has a null space, in which any basis is an eigenbasis.
    """
    case = new_step("deva_step_", shapes, dtype, seed=seed, **options)
    for side in ("left", "right"):
        for i, (factor, q) in enumerate(zip(case[f"{side}s"], case[f"{side}_bases"], strict=True)):
            if q.numel():
                q.copy_(orthogonal(q.shape[-1], seed + i).expand(q.shape))
                factor.diagonal(dim1=-2, dim2=-1).fill_(0.5)
    for t in range(taken):
        case = next_step(case.run_reference(), seed + 1000 * (t + 1))
    return case


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
@pytest.mark.parametrize("refresh", [0, 1])
@pytest.mark.parametrize("variance", VARIANCES)
def test_deva_step(variance, refresh, dtype, backend):
    case = started(LIST, dtype, variance=variance, refresh=[refresh] * len(LIST))
    assert_step_rule(case, backend.name)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("variance", [v for v in VARIANCES if v != "low_memory"])
def test_elementwise_norm(variance, dtype, backend):
    case = started(LIST, dtype, norm="linf", variance=variance)
    assert_step_rule(case, backend.name)


TRAJECTORIES = (
    {"variance": "momentum"},
    {"variance": "instant"},
    {"variance": "momentum", "sign": True},
    {"variance": "momentum", "correct_bias": False},
    {"variance": "momentum", "normalize_grads": True},
    {"variance": "momentum", "norm": "linf"},
)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("refresh", [0, 1])
@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("options", TRAJECTORIES, ids=str)
def test_public_trajectory(options, dtype, refresh, backend):
    case = started(SQUARES, dtype, refresh=[refresh] * len(SQUARES), **PUBLIC, **options)
    assert_step_rule(case, backend.name)


OPTIONS = (
    *step_rules.OPTIONS,
    {"nesterov": False},
    {"sign": True},
    {"eps_mode": "inside", "eps": 1e-3},
    {"eps_mode": "outside", "eps": 1e-3},
    {"variance": "low_memory", "eps_mode": "outside", "eps": 1e-3},
    {"variance": "low_memory", "eps_mode": "inside", "eps": 1e-3, "correct_bias": False},
    {"scales": [0.0, 0.5, 1.0, 2.0]},
    {"eps": 0.0},
    {"norm": "linf", "eps_mode": "outside", "eps": 1e-3, "maximize": True},
)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_deva_options(dtype, options, backend):
    case = started(SQUARES, dtype, **options)
    assert_step_rule(case, backend.name)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=named)
def test_bfloat16_products(dtype, backend):
    case = started(LIST, dtype, compute_dtype=torch.bfloat16)
    assert_step_rule(case, backend.name, roundings=step_rules.roundings_of(dtype, torch.bfloat16))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("options", [{}, PUBLIC], ids=["corrected", "public"])
@pytest.mark.parametrize("dtype", FULL, ids=named)
def test_first_call(dtype, options, backend):
    def assert_basis(q):
        q = q.double()
        eye = torch.eye(q.shape[-1], dtype=torch.float64).expand_as(q)
        assert error(q.mT @ q, eye) < 16.0 * unit_roundoff(dtype)

    case = new_step("deva_step_", SQUARES, dtype, **options)
    step_rules.assert_first_call(
        case, backend.name, idle=options is PUBLIC, assert_basis=assert_basis
    )


def test_first_update_is_the_scaled_polar_factor(backend):
    """Gamma = 1 at t = 1 on the range of G."""
    options = {"rows": ((1.875, -1.25, 0.375),) * 40, "lr": 1.0, "weight_decay": 0.0, "eps": 0.0}
    case = new_step("deva_step_", ((6, 6),), torch.float64, scales=[0.5], **options)
    before = case["params"][0].clone()
    case.run(backend.name)
    assert error(before - case["params"][0], 0.5 * sk.polar(case["grads"][0])) < 1e-9


@pytest.mark.parametrize(
    "options", [{}, {"variance": "low_memory"}, {"variance": "instant"}, PUBLIC], ids=str
)
def test_a_run_follows_the_specification(options, backend):
    first = new_step("deva_step_", ((6, 6), (8, 8)), torch.float64, **options)
    follows = {"steps": 12, "refreshed": lambda t: t % 4 == 3, "limit": 1e-7}
    step_rules.assert_run_follows_reference(first, backend.name, **follows)


def test_elementwise_limit_is_adam(backend):
    options = {"norm": "linf", "variance": "gradient", "eps_mode": "outside", "nesterov": False}
    case = new_step(
        "deva_step_",
        ((4, 7),),
        torch.float64,
        sides=(),
        lr=0.01,
        weight_decay=0.0,
        scales=[1.0],
        **options,
    )
    param = torch.nn.Parameter(case["params"][0].clone())
    adam = torch.optim.Adam([param], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for t in range(6):
        case = next_step(case, t)
        param.grad = case["grads"][0].clone()
        adam.step()
        case.run(backend.name)
    assert error(case["params"][0], param.data) < 1e-14


def test_elementwise_limit_without_variance_is_signum(backend):
    case = new_step(
        "deva_step_",
        ((4, 7),),
        sides=(),
        norm="linf",
        variance="none",
        nesterov=False,
        scales=[1.0],
    )
    w, m = case["params"][0].clone(), torch.zeros(4, 7)
    for t in range(6):
        case = next_step(case, t)
        m = 0.9 * m + 0.1 * case["grads"][0]
        w = (1.0 - 0.1 * 0.1) * w - 0.1 * m.sign()
        case.run(backend.name)
    assert error(case["params"][0], w.double()) < 1e-6


@pytest.mark.parametrize(("norm", "variance"), NORMS_AND_VARIANCES)
def test_power_of_two_gradients_give_the_same_bits(norm, variance, backend):
    """F07: a relative eps knows no scale."""
    case = new_step("deva_step_", ((5, 7), (4, 4)), norm=norm, variance=variance)

    def run_of_three(scale):
        x = case.clone()
        for seed in (3, 4, 5):
            x = next_step(x, seed)
            x = x.with_(grads=[g * scale for g in x["grads"]])
            x.run(backend.name)
        return x["params"]

    unit = run_of_three(1.0)
    for k in (-30, -1, 5, 30, 46):
        assert same_bits(run_of_three(2.0**k), unit), k
    # The squares of the smallest elements are subnormal here.
    for x, y in zip(run_of_three(2.0**-46), unit, strict=True):
        assert error(x, y) < 1e-5


@pytest.mark.parametrize("exponent", [-52, 52])
def test_gradients_out_of_range_are_skipped(exponent, backend):
    step_rules.assert_skips_the_second("deva_step_", 2.0**exponent, backend.name)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("exponent", [-52, 52])
def test_gradients_out_of_range_spare_their_mates(exponent, nonfinite, backend):
    """Only where eps is relative to what the gradients are."""
    case = later_step("deva_step_", ((2, 4, 4), (4, 4)), nonfinite=nonfinite)
    case["grads"][0][0] *= 2.0**exponent
    before = case.clone()
    case.run(backend.name)
    assert int(case["skipped"]) == 1
    for name in ("params", *STATE):
        assert same_bits(case[name][0][0], before[name][0][0]), name
        assert not same_bits(case[name][0][1], before[name][0][1]), name
        assert not same_bits(case[name][1], before[name][1]), name
    free = before.with_(eps_mode="inside")
    free.run(backend.name)
    assert int(free["skipped"]) == 0


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("variance", ["momentum", "low_memory"])
@pytest.mark.parametrize("where", ["grads", "exp_avgs", "exp_avg_sqs", "rights"])
def test_what_is_not_finite_is_kept(where, variance, backend):
    def spoil(case):
        matrix = case[where][0][1]
        matrix.view(-1)[13 % matrix.numel()] = math.nan

    case = started(((3, 5, 6), (4, 4)), torch.float32, variance=variance, refresh=[1, 0])
    step_rules.assert_spares_its_mates(case, spoil, backend.name)


def test_permuted_bases_give_the_same_updates(backend):
    """F16: state bound to a basis follows it, whatever the order of the columns."""
    case = later_step("deva_step_", ((6, 6),), torch.float64, taken=5)
    order = torch.randperm(6, generator=generator(3))
    moved = case.clone()
    moved["right_bases"][0].copy_(case["right_bases"][0][:, order])
    for name in ("exp_avgs", "exp_avg_sqs"):
        moved[name][0].copy_(case[name][0][:, order])
    for t in range(20):
        case, moved = (next_step(x, 100 + t) for x in (case, moved))
        case.run(backend.name)
        moved.run(backend.name)
        assert error(moved["params"][0], case["params"][0]) < 1e-9


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("options", [{}, {"variance": "low_memory"}, PUBLIC], ids=str)
def test_zero_gradients_from_the_start(options, backend):
    decays = options is not PUBLIC
    step_rules.assert_zero_gradients_decay_only(
        "deva_step_", backend.name, decays=decays, **options
    )


@pytest.mark.parametrize("options", [{}, PUBLIC], ids=["corrected", "public"])
def test_zero_rows_stay(options, backend):
    case = started(((6, 9),), torch.float32, taken=0, weight_decay=0.0, sides=(), **options)
    case["grads"][0][2] = 0.0
    before = case["params"][0].clone()
    case.run(backend.name)
    assert torch.equal(case["params"][0][2], before[2])
    assert case["params"][0].isfinite().all()


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", FULL, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variance", ["momentum", "low_memory"])
def test_deva_step_in_any_layout_writes_nothing_around(variance, layout, dtype, backend):
    case = started(((2, 5, 5), (4, 7)), dtype, variance=variance)
    # Packed variances are one line, see below.
    but = ("exp_avg_sqs",) if variance == "low_memory" else ()
    step_rules.assert_writes_nothing_around(case, layout, backend.name, but=but)


@pytest.mark.in_full("cuda")
def test_packed_variances_in_a_strided_buffer(backend):
    case = started(((4, 7),), torch.float32, variance="low_memory")
    expected = case.clone().run(backend.name)
    wide = torch.full((22,), torch.nan)
    packed = wide[::2]
    packed.copy_(case["exp_avg_sqs"][0])
    moved = case.with_(exp_avg_sqs=[packed])
    assert same_bits([x.contiguous() for x in moved.run(backend.name)], expected)
    assert wide[1::2].isnan().all()


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("empty", [(0, 5), (5, 0), (2, 0, 4)], ids=str)
def test_empty_entries(empty, position, backend):
    alone = later_step("deva_step_", ((3, 3), (5, 5))).run(backend.name)
    case = later_step("deva_step_", ((3, 3), (5, 5)))
    nothing = new_step("deva_step_", (empty,))
    for name in ("grads", *case.names(write=True)):
        if name != "skipped":
            case[name].insert(position, nothing[name][0])
    case.options["refresh"] = [1, 1, 1]
    case.options["scales"].insert(position, 1.0)
    case.run(backend.name)
    for name in case.names(write=True):
        if name != "skipped":
            del case[name][position]
    assert same_bits(case.written(), alone)


def test_mixed_dtypes_are_as_one_by_one(backend):
    shapes = ((5, 5), (4, 6), (6, 4), (7, 7))
    case = started(shapes, FLOATS)
    together = case.clone()
    together.run(backend.name)
    for i in range(len(shapes)):
        one = case.clone()
        lists = [name for name in ("grads", *case.names(write=True)) if name != "skipped"]
        one = one.with_(
            **{name: one[name][i : i + 1] for name in lists},
            scales=case.options["scales"][i : i + 1],
            refresh=[1],
        )
        one.run(backend.name)
        for name in lists:
            assert same_bits(one[name][0], together[name][i]), (name, i)


@st.composite
def deva_steps(draw):
    sizes = st.integers(1, 8)
    shape = st.one_of(st.tuples(sizes, sizes), st.tuples(st.just(2), sizes, sizes))
    shapes = tuple(draw(st.lists(shape, min_size=1, max_size=3)))
    norm, variance = draw(st.sampled_from(NORMS_AND_VARIANCES))
    return started(
        shapes,
        [draw(st.sampled_from(FLOATS)) for _ in shapes],
        taken=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**20)),
        sides=draw(st.sampled_from([("left", "right"), ("left",), ("right",), ()])),
        norm=norm,
        variance=variance,
        nesterov=draw(st.booleans()),
        correct_bias=draw(st.booleans()),
        normalize_grads=draw(st.booleans()),
        maximize=draw(st.booleans()),
        eps_mode=draw(st.sampled_from(["relative", "inside", "outside"])),
        eps=draw(st.sampled_from([1e-8, 1e-3])),
        refresh=[draw(st.integers(0, 1)) for _ in shapes],
    )


@fuzzed(deva_steps(), long=2000)
def test_any_deva_step(case):
    assert_step_rule(case, "cpu")


@pytest.mark.in_full("cuda")
def test_gradients_of_rank_one(backend):
    case = new_step("deva_step_", ((6, 6),), variance="momentum")
    outer = gaussian(6, 1) @ gaussian(1, 6, seed=1)
    for _ in range(4):
        case = case.with_(grads=[outer])
        case.run(backend.name)
    assert case["params"][0].isfinite().all() and int(case["skipped"]) == 0

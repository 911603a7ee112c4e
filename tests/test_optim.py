"""What the optimizers compute: shapes, scale, failures."""

from __future__ import annotations

import math

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import CONFIGS, needs_kernels, parameter, with_grads
from support.states import assert_same, snapshot
from torch import nn

FP64 = torch.float64


pytestmark = pytest.mark.usefixtures("one_thread")


# Shapes.

FORMS = {
    "conv": ((6, 3, 2, 2), {}, lambda w: w.reshape(6, 12)),
    "depthwise": ((8, 1, 3, 3), {}, lambda w: w.reshape(8, 9)),
    "pointwise": ((6, 8, 1, 1), {}, lambda w: w.reshape(6, 8)),
    "conv3d": ((4, 2, 2, 2, 2), {}, lambda w: w.reshape(4, 16)),
    "declared": ((5, 2, 4), {"matrix_dims": (0, (1, 2))}, lambda w: w.reshape(5, 8)),
    "turned": ((6, 2, 3), {"matrix_dims": ((1, 2), 0)}, lambda w: w.reshape(6, 6).mT),
}


@pytest.mark.parametrize("form", FORMS)
def test_F20_F22_flattened_weight_steps_as_its_matrix(make, form):
    shape, declared, flatten = FORMS[form]
    if form == "turned":
        needs_kernels()
    weight = parameter(*shape)
    matrix = nn.Parameter(flatten(weight.detach()).clone(memory_format=torch.contiguous_format))
    optimizer = make([{"params": [weight], **declared}])
    other = make([matrix])
    for seed in range(4):
        with_grads([weight], seed)
        matrix.grad = flatten(weight.grad).contiguous()
        optimizer.step()
        other.step()
    assert torch.equal(flatten(weight), matrix)


@pytest.mark.parametrize(
    "layout",
    [
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: torch.stack([w, w], -1)[..., 0],
        lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ],
    ids=["channels_last", "sliced", "reversed"],
)
def test_F27_layout_of_a_kernel_does_not_matter(make, layout):
    plain = parameter(6, 3, 2, 2)
    other = nn.Parameter(layout(plain.detach().clone()))
    assert other.stride() != plain.stride()
    optimizers = make([plain]), make([other])
    for seed in range(4):
        with_grads([plain], seed)
        other.grad = plain.grad.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, other)


@pytest.mark.parametrize("bad_step", [0, 1])
def test_F21_batch_of_experts_steps_as_single_ones(make, bad_step):
    """(E, m, n) with one step count each; one expert has a NaN once."""
    experts = parameter(3, 6, 7)
    singles = [nn.Parameter(experts.detach()[i].clone()) for i in range(3)]
    stagger = {} if "muon" in str(make).lower() else {"stagger": False}
    optimizer = make([{"params": experts, "batched": True, **stagger}])
    others = [make([{"params": single, **stagger}]) for single in singles]
    for seed in range(4):
        with_grads([experts], seed)
        if seed == bad_step:
            experts.grad[1, 2, 3] = torch.nan
        for i, (single, other) in enumerate(zip(singles, others, strict=True)):
            single.grad = experts.grad[i].clone()
            other.step()
        optimizer.step()
    assert optimizer.state[experts]["step"].shape[-1] == 3
    # A refresh is due for a whole batch at once, by the expert that is farthest.
    for i in (0, 2):
        assert torch.equal(experts[i], singles[i])
    assert optimizer.skipped == 1


def test_F22_three_dimensions_must_be_declared(make_few):
    param = parameter(3, 4, 5)
    with pytest.raises(ValueError, match=r"w\) of shape \(3, 4, 5\).*ambiguous.*batched=True"):
        make_few([("w", param)])
    with pytest.raises(ValueError, match="at least two dimensions"):
        make_few([{"params": [parameter(4)], "algorithm": "matrix"}])
    for dims in ((0, 0), (0, 3), ((0, 1), 1)):
        with pytest.raises(ValueError, match="matrix_dims"):
            make_few([{"params": [param], "matrix_dims": dims}])
    with pytest.raises(TypeError, match="matrix_dims must be a pair"):
        make_few([{"params": [param], "matrix_dims": "rows"}])
    assert make_few([{"params": [param], "algorithm": "adamw"}])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 2, 2)])
def test_F25_empty_parameters_are_no_ops(make_few, shape, place):
    params, others = ([parameter(4, 6), parameter(6, 4)] for _ in range(2))
    with_empty = [*params]
    with_empty.insert(place, parameter(*shape))
    stagger = {} if make_few is CONFIGS["muon"] else {"stagger": False}
    optimizer, other = make_few(with_empty, **stagger), make_few(others, **stagger)
    for seed in range(4):
        with_grads(params, seed)
        with_grads(others, seed)
        with_empty[place].grad = torch.zeros(shape)
        optimizer.step()
        other.step()
    assert_same(params, others)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 31)])
def test_F26_thin_matrices(make, shape):
    param = parameter(*shape)
    optimizer = make([param])
    before = param.detach().clone()
    for seed in range(4):
        with_grads([param], seed)
        optimizer.step()
    assert param.isfinite().all()
    assert not torch.equal(param, before)


def test_F27_parameter_without_own_elements_is_refused(make_few):
    with pytest.raises(ValueError, match=r"overlap in memory: shape \(3, 4\), strides \(0, 1\)"):
        make_few([nn.Parameter(torch.zeros(1, 4).expand(3, 4))])


def test_blocks_are_independent_matrices():
    """Blocks of 4 x 5 equal nine parameters of their own."""
    param = parameter(10, 13)
    cuts = [(r, c) for r in ((0, 5), (5, 10)) for c in ((0, 5), (5, 10), (10, 13))]
    own = [nn.Parameter(param.detach()[a:b, c:d].clone()) for (a, b), (c, d) in cuts]
    options = {"block_size": 5, "precondition_frequency": 2, "stagger": False}
    optimizer, other = sk.optim.Shampoo([param], **options), sk.optim.Shampoo(own, **options)
    for seed in range(5):
        with_grads([param], seed)
        for block, ((a, b), (c, d)) in zip(own, cuts, strict=True):
            block.grad = param.grad[a:b, c:d].clone()
        optimizer.step()
        other.step()
    for block, ((a, b), (c, d)) in zip(own, cuts, strict=True):
        assert torch.equal(param[a:b, c:d], block)
    assert optimizer.state[param]["step"].tolist() == [5.0] * 6


def test_a_first_gradient_of_zero_leaves_shampoo_able_to_move():
    """Until a root can be taken it is the identity, and grafting gives the length."""
    param = parameter(4, 5)
    optimizer = sk.optim.Shampoo([param], weight_decay=0.0, precondition_frequency=10)
    param.grad = torch.zeros(4, 5)
    optimizer.step()
    before = param.detach().clone()
    with_grads([param])
    optimizer.step()
    assert torch.equal((before - param.detach()).sign(), param.grad.sign())


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("schatten", {"norm": "schatten", "variance": "momentum", "sign": False}),
        ("instant", {"norm": "schatten", "variance": "instant", "sign": False}),
        ("sign", {"norm": "schatten", "variance": "momentum", "sign": True}),
        ("low_memory", {"norm": "schatten", "variance": "low_memory", "sign": True}),
        ("linf", {"norm": "linf", "variance": "momentum", "nesterov": False, "scale": "none"}),
    ],
)
def test_variants_of_deva_are_sets_of_options(variant, options):
    param, other = parameter(6, 8, dtype=FP64), parameter(6, 8, dtype=FP64)
    named = sk.optim.DeVA([param], variant=variant)
    state = [torch.zeros(6, 8, dtype=FP64), torch.zeros(6, 8, dtype=FP64)]
    if variant == "low_memory":
        state[1] = torch.zeros(14, dtype=FP64)
    sides = [[None if variant == "linf" else torch.zeros(n, n, dtype=FP64)] for n in (6, 8, 6, 8)]
    for seed in range(3):
        with_grads([param], seed)
        named.step()
        with torch.no_grad():
            sk.deva_step_(
                [other],
                [param.grad],
                [state[0]],
                [state[1]],
                *sides,
                lr=3e-3,
                weight_decay=0.01,
                step_counts=[torch.tensor(float(seed))],
                refresh=False,
                **options,
            )
    assert torch.equal(param, other)


def test_sides():
    param = parameter(4, 6)
    for sides, sizes in (("both", (16, 36)), ("left", (16, 0)), ("right", (0, 36))):
        optimizer = sk.optim.Shampoo([param], sides=sides)
        optimizer.init_state()
        state = optimizer.state[param]
        assert (state["left"]["0"].numel(), state["right"]["0"].numel()) == sizes
    shorter = sk.optim.Shampoo([param, tall := parameter(6, 4)], sides="shorter")
    shorter.init_state()
    assert (
        shorter.state[param]["right"]["0"].numel() == shorter.state[tall]["left"]["0"].numel() == 0
    )


@pytest.mark.parametrize("make", [sk.optim.SOAP, sk.optim.DeVA], ids=["soap", "deva"])
@pytest.mark.parametrize(("limit", "sizes"), [(3, (0, 0)), (4, (16, 0)), (6, (16, 36))])
def test_a_side_longer_than_allowed_has_no_factor(limit, sizes, make):
    optimizer = make([param := parameter(4, 6)], max_precond_dim=limit)
    optimizer.init_state()
    state = optimizer.state[param]
    assert (state["left"].numel(), state["right"].numel()) == sizes


# Scale.


@pytest.mark.parametrize("exponent", [-110, -60, 60, 110])
def test_F01_F02_F18_muon_does_not_see_the_scale_of_gradients(exponent):
    params, others = [parameter(6, 9)], [parameter(6, 9)]
    optimizer, other = sk.optim.Muon(params), sk.optim.Muon(others)
    for seed in range(3):
        with_grads(others, seed)
        params[0].grad = others[0].grad * 2.0**exponent
        optimizer.step()
        other.step()
    assert_same(params, others)


@pytest.mark.parametrize("name", ["shampoo", "shampoo_blocks", "kl_shampoo", "deva", "deva_sign"])
@pytest.mark.parametrize("exponent", [-40, 40])
def test_F07_scale_free_optimizers(name, exponent):
    params, others = [parameter(6, 9)], [parameter(6, 9)]
    optimizer, other = CONFIGS[name](params), CONFIGS[name](others)
    for seed in range(6):
        with_grads(params, seed)
        params[0].grad.mul_(2.0**exponent)
        with_grads(others, seed)
        optimizer.step()
        other.step()
    torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)


def test_F07_gradients_out_of_range_are_skipped_and_counted():
    for name in ("shampoo", "kl_shampoo", "deva"):
        param = parameter(6, 9)
        optimizer = CONFIGS[name]([param])
        before = param.detach().clone()
        for scale in (1e25, 1e-25):
            with_grads([param], scale=scale)
            optimizer.step()
        assert torch.equal(param, before)
        assert optimizer.skipped == 2


# Non-finite gradients.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_F04_matrix_with_a_non_finite_gradient_is_skipped_alone(make, value):
    """The others step as if it were not there, and it goes on as if the step had not been."""
    params, others = ([parameter(5, 7, seed=i) for i in range(3)] for _ in range(2))
    stagger = {} if "muon" in str(make).lower() else {"stagger": False}
    optimizer, other = make(params, **stagger), make(others, **stagger)
    for seed in range(5):
        with_grads(params, seed)
        with_grads(others, seed)
        if seed in (0, 3):
            params[1].grad[-1, 0] = value
            others[1].grad = None
        optimizer.step()
        other.step()
    if "block_size" in make.keywords:
        # There a block is the matrix that is skipped: two of the four go on.
        assert params[1].isfinite().all()
        params, others = params[::2], others[::2]
    else:
        assert_same(optimizer.state_dict()["state"], other.state_dict()["state"])
    assert_same(params, others)
    assert optimizer.skipped == 2 and other.skipped == 0


def test_F04_raise_names_the_parameter_and_writes_nothing(make_few):
    params = [("first", parameter(5, 7)), ("second", parameter(7, 5)), ("scale", parameter(5))]
    optimizer = make_few(params, nonfinite="raise")
    for seed in range(2):
        with_grads([param for _, param in params], seed)
        optimizer.step()
    before = snapshot(optimizer)
    params[1][1].grad[0, 0] = math.inf
    with pytest.raises(ValueError, match="second has a non-finite gradient"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_F04_propagate_gives_nan(make_few):
    params = [parameter(5, 7), parameter(7, 5)]
    optimizer = make_few(params, nonfinite="propagate")
    for seed in range(2):
        with_grads(params, seed)
        params[0].grad[0, 0] = math.nan
        optimizer.step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all()
    assert optimizer.skipped == 0


# Transactions.


@pytest.mark.parametrize("bad", range(4))
def test_F36_a_step_that_raises_changes_nothing(make_few, bad):
    """A parameter anywhere, in groups of both kinds."""
    params = [parameter(5, 7), parameter(4), parameter(3, 2, 3, 3), parameter(7, 5)]
    optimizer = make_few([{"params": params[:2]}, {"params": params[2:]}])
    with_grads(params)
    optimizer.step()
    with_grads(params, 1)
    params[bad].grad = params[bad].grad.to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="must be a dense tensor"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_F36_refused_backend_changes_nothing(make_few):
    params = [parameter(5, 7), parameter(4)]
    optimizer = make_few(params)
    with_grads(params)
    before = [param.detach().clone() for param in params]
    with sk.use_backend("triton"), pytest.raises(RuntimeError, match="backend cannot run"):
        optimizer.step()
    assert_same([param.detach() for param in params], before)

"""What the optimizers compute: public trajectories, limits, routing, shapes, failures."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle
import warnings
from pathlib import Path

import pytest
import spectral_kernels as sk
import torch
from optim_support import (
    CONFIGS,
    assert_same,
    batches,
    model,
    needs_kernels,
    parameter,
    snapshot,
    tensors,
    torch_scales,
    train,
    with_grads,
)
from torch import nn

GOLDEN = json.loads((Path(__file__).parent / "golden" / "public_trajectories.json").read_text())
FP64 = torch.float64


pytestmark = pytest.mark.usefixtures("one_thread")


# Public trajectories, in float64.

ROTATED = {
    "lr": GOLDEN["lr"],
    "weight_decay": GOLDEN["weight_decay"],
    "betas": (0.9, 0.95),
    "shampoo_beta": 0.8,
    "precondition_frequency": GOLDEN["frequency"],
}
LINF = {**ROTATED, "variant": "linf", "reference": True, "eps": 1e-5}
DISTRIBUTED = {"lr": GOLDEN["lr"], "weight_decay": GOLDEN["weight_decay"], "epsilon": 1e-6}

PUBLIC = {
    "soap": lambda p: sk.optim.SOAP(p, **ROTATED),
    "soap_normalized": lambda p: sk.optim.SOAP(p, normalize_grads=True, **ROTATED),
    "soap_uncorrected": lambda p: sk.optim.SOAP(p, correct_bias=False, **ROTATED),
    "deva": lambda p: sk.optim.DeVA(p, reference=True, **ROTATED),
    "deva_plain": lambda p: sk.optim.DeVA(p, reference=True, nesterov=False, **ROTATED),
    "deva_sign": lambda p: sk.optim.DeVA(p, variant="sign", reference=True, **ROTATED),
    "deva_instant": lambda p: sk.optim.DeVA(p, variant="instant", reference=True, **ROTATED),
    "deva_linf": lambda p: sk.optim.DeVA(p, **LINF),
    "deva_linf_nesterov": lambda p: sk.optim.DeVA(p, nesterov=True, **LINF),
    "shampoo_none_4": lambda p: distributed(p, 4),
    "shampoo_none_2": lambda p: distributed(p, 2),
    "shampoo_sgd_4": lambda p: distributed(p, 4, graft="sgd"),
    "shampoo_adagrad_4": lambda p: distributed(p, 4, beta2=1.0, graft="adagrad"),
    "shampoo_rmsprop_2": lambda p: distributed(p, 2, graft="rmsprop", graft_beta2=0.9),
    "shampoo_adam_4": lambda p: distributed(p, 4, graft="adam", graft_beta2=0.9),
    "shampoo_undebiased_4": lambda p: distributed(p, 4, use_bias_correction=False),
}


def distributed(params, root, *, beta2=0.95, **options):
    return sk.optim.Shampoo.like_distributed(
        params, betas=(0.9, beta2), exponent=1 / root, **DISTRIBUTED, **options
    )


def test_every_public_trajectory_is_compared():
    assert {name for group in GOLDEN["groups"] for name in group["ends"]} == PUBLIC.keys()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", PUBLIC)
def test_public_trajectory(name, backend):
    (group,) = (group for group in GOLDEN["groups"] if name in group["ends"])
    param = nn.Parameter(torch.tensor(group["start"], dtype=FP64))
    optimizer = PUBLIC[name]([param])
    with sk.use_backend(backend):
        for grad in group["grads"]:
            param.grad = torch.tensor(grad, dtype=FP64)
            optimizer.step()
    end = torch.tensor(group["ends"][name], dtype=FP64)
    torch.testing.assert_close(param.detach(), end, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_agrees_with_torch(adjust, nesterov, monkeypatch):
    shapes = ((24, 40), (40, 24), (33, 33))
    options = {"lr": 0.05, "nesterov": nesterov, "weight_decay": 0.1}
    mine, theirs = ([parameter(*s, seed=i) for i, s in enumerate(shapes)] for _ in range(2))
    start = [param.detach().clone() for param in mine]
    torch_scales(monkeypatch, adjust)
    optimizer = sk.optim.Muon(mine, **options)
    public = torch.optim.Muon(theirs, **options)
    public.param_groups[0]["adjust_lr_fn"] = adjust
    optimizer.load_state_dict(public.state_dict())
    assert optimizer.param_groups[0]["adjust_lr_fn"] == adjust
    for seed in range(10):
        with_grads(mine, seed)
        with_grads(theirs, seed)
        optimizer.step()
        public.step()
    for param, other, first in zip(mine, theirs, start, strict=True):
        # Both compute in bfloat16, u = 2^-9, and round differently.
        assert (param - other).norm() <= 0.02 * (other - first).norm()


def test_F31_bfloat16_muon_without_nesterov_keeps_its_momentum():
    """torch 2.13 normalises the momentum buffer in place there."""
    param = parameter(8, 8, dtype=torch.bfloat16)
    optimizer = sk.optim.Muon([param], nesterov=False, momentum=0.5)
    expected = torch.zeros(8, 8)
    for seed in range(3):
        with_grads([param], seed)
        expected = 0.5 * expected + 0.5 * param.grad.float()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], expected)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "eps": 1e-6}, {"maximize": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_F19_adamw_groups_are_torchs_bit_for_bit(make_few, options, dtype):
    shapes = ((7,), (5, 6), (), (2, 3, 4))
    mine, theirs = (
        [parameter(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)] for _ in range(2)
    )
    values = {"lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": 0.1, **options}
    optimizer = make_few([{"params": mine, "algorithm": "adamw", **values}])
    public = torch.optim.AdamW(theirs, **values)
    with pytest.warns(UserWarning, match="no matrix to update"):
        for seed in range(100):
            with_grads(mine, seed)
            with_grads(theirs, seed)
            optimizer.step()
            public.step()
    assert_same(mine, theirs)
    assert_same(optimizer.state_dict()["state"], public.state_dict()["state"])


# Limits.


def test_deva_is_adam_in_the_limit_of_linf_and_gradient_variance():
    mine, theirs = parameter(6, 9, dtype=FP64), parameter(6, 9, dtype=FP64)
    values = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    limit = {"norm": "linf", "variance": "gradient", "nesterov": False, "eps_mode": "outside"}
    optimizer, adam = (
        sk.optim.DeVA([mine], **values, **limit),
        torch.optim.AdamW([theirs], **values),
    )
    for seed in range(30):
        with_grads([mine], seed)
        with_grads([theirs], seed)
        optimizer.step()
        adam.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


def test_deva_is_signum_without_variance():
    param = parameter(6, 9, dtype=FP64)
    optimizer = sk.optim.DeVA(
        [param], lr=0.01, betas=(0.9, 0.9), weight_decay=0.1, norm="linf", variance="none"
    )
    expected, momentum = param.detach().clone(), torch.zeros(6, 9, dtype=FP64)
    for seed in range(30):
        with_grads([param], seed)
        momentum = 0.9 * momentum + 0.1 * param.grad
        expected = (1 - 0.01 * 0.1) * expected - 0.01 * momentum.sign()
        optimizer.step()
    torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-13)


def test_deva_without_variance_is_rotated_muon():
    """polar(Q_L^T N Q_R) = Q_L^T polar(N) Q_R: the bases cancel."""
    mine, theirs = parameter(8, 8, dtype=FP64), parameter(8, 8, dtype=FP64)
    rows = "polar_express_8"
    optimizer = sk.optim.DeVA(
        [mine], lr=0.01, variance="none", coefficients=rows, precondition_frequency=2
    )
    muon = sk.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.01, coefficients=rows, adjust_lr_fn="match_rms_adamw"
    )
    for seed in range(6):
        with_grads([mine], seed)
        with_grads([theirs], seed)
        optimizer.step()
        muon.step()
    # The two start from different norms, Schatten-8 and Frobenius, and eight rows end within 1e-3.
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-3)


def test_shampoo_without_averages_is_muon():
    """With beta1 = beta2 = 0 and exponent 1/4, (GG^T)^(-1/4) G (G^TG)^(-1/4) = polar(G)."""
    param = parameter(6, 6, dtype=FP64)
    optimizer = sk.optim.Shampoo(
        [param],
        lr=1.0,
        betas=(0.0, 0.0),
        weight_decay=0.0,
        graft="none",
        relative_ridge=0.0,
        precondition_frequency=1,
    )
    for seed in range(3):
        before = param.detach().clone()
        with_grads([param], seed)
        optimizer.step()
        torch.testing.assert_close(before - param.detach(), sk.polar(param.grad))


def test_adagrad_sum_is_not_debiased():
    param = parameter(4, 5, dtype=FP64)
    optimizer = sk.optim.Shampoo([param], betas=(0.9, 1.0), precondition_frequency=1)
    total = torch.zeros(4, 4, dtype=FP64)
    for seed in range(3):
        with_grads([param], seed)
        total += param.grad @ param.grad.mT
        optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["left"]["0"], total)


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


# Hyper-parameters.

BAD_ANYWHERE = [
    ("lr", -1.0, "lr must be in"),
    ("lr", math.inf, "lr must be in"),
    ("lr", math.nan, "lr must be in"),
    ("lr", "fast", "lr must be a number"),
    ("lr", torch.ones(2), "lr must be one floating-point number"),
    ("lr", torch.tensor(-1.0), "lr must be in"),
    ("weight_decay", -0.1, "weight_decay must be in"),
    ("maximize", 1, "maximize must be True or False"),
    ("nonfinite", "ignore", "nonfinite must be one of"),
    ("batched", None, "batched must be True or False"),
]
BAD = {
    "muon": [
        ("momentum", 1.5, r"momentum must be in \[0, 1\), not 1.5"),
        ("momentum", -0.1, "momentum must be in"),
        ("eps", -1.0, "eps must be in"),
        ("ns_steps", 0, "ns_steps must be in 1..99"),
        ("ns_steps", -3, "ns_steps must be in 1..99"),
        ("ns_steps", 100, "ns_steps must be in 1..99"),
        ("ns_steps", 2.5, "ns_steps must be an int"),
        ("ns_coefficients", (1.0, 2.0), "must be a row|three"),
        ("ns_coefficients", "best", "unknown coefficients 'best'"),
        ("adjust_lr_fn", "other", "adjust_lr_fn must be one of"),
        ("method", "fast", "method must be one of"),
        ("compute_dtype", torch.int8, "compute_dtype must be"),
        ("nesterov", None, "nesterov must be True or False"),
    ],
    "shampoo": [
        ("betas", (0.9, 1.5), r"betas\[1\] must be in \[0, 1\]"),
        ("betas", (1.0, 0.9), r"betas\[0\] must be in \[0, 1\)"),
        ("betas", 0.9, "betas must be a pair"),
        ("exponent", 0.3, "exponent must be one of 1, 1/2"),
        ("exponent", 0.1, "exponent must be in"),
        ("kl", True, None),
        ("block_size", 0, "block_size must be at least 1"),
        ("precondition_frequency", 0, "precondition_frequency must be at least 1"),
        ("graft", "lamb", "graft must be one of"),
        ("graft_beta2", 1.0, "graft_beta2 must be in"),
        ("graft_eps", -1e-8, "graft_eps must be in"),
        ("relative_ridge", -1.0, "relative_ridge must be in"),
        ("root_method", "qr", "root_method must be one of"),
        ("sides", "top", "sides must be one of"),
        ("max_root_failures", -1, "max_root_failures must be at least 0"),
    ],
    "soap": [
        ("betas", (0.9, 1.0), r"betas\[1\] must be in \[0, 1\)"),
        ("shampoo_beta", -1, "shampoo_beta must be in"),
        ("eps", -1.0, "eps must be in"),
        ("precondition_frequency", 1.5, "precondition_frequency must be an int"),
        ("max_precond_dim", -1, "max_precond_dim must be at least 0"),
        ("skip_first", "no", "skip_first must be True or False"),
    ],
    "deva": [
        ("variant", "spectral", "variant must be one of schatten, instant"),
        ("norm", "l2", "norm must be one of"),
        ("variance", "gradients", "variance must be one of"),
        ("eps_mode", "inner", "eps_mode must be one of"),
        ("scale", -1.0, "scale must be in"),
        ("coefficients", [], "at least one row"),
        ("steps", 0, "steps must be in 1..99"),
        ("correct_bias", 0, "correct_bias must be True or False"),
    ],
}
BAD_CASES = [
    (name, *case)
    for name, cases in BAD.items()
    for case in (*BAD_ANYWHERE, *cases)
    if case[2] is not None
]


@pytest.mark.parametrize(("name", "key", "value", "message"), BAD_CASES)
def test_F42_bad_values_are_refused_wherever_they_come_from(name, key, value, message):
    cls = type(CONFIGS[name]([parameter(2, 2)]))
    if key != "batched":
        with pytest.raises((TypeError, ValueError), match=message):
            cls([parameter(3, 3)], **{key: value})
    optimizer = cls([parameter(3, 3)])
    with pytest.raises((TypeError, ValueError), match=rf"param_groups\[1\]: .*({message})"):
        optimizer.add_param_group({"params": [parameter(3, 3)], key: value})
    assert len(optimizer.param_groups) == 1
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises((TypeError, ValueError), match=rf"param_groups\[0\]: .*({message})"):
        optimizer.load_state_dict(saved)
    with_grads(optimizer.param_groups[0]["params"])
    optimizer.param_groups[0][key] = value
    before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
    with pytest.raises((TypeError, ValueError), match=rf"param_groups\[0\]: .*({message})"):
        optimizer.step()
    assert_same([param.detach() for param in optimizer.param_groups[0]["params"]], before)


def test_F42_values_that_do_not_fit_one_another():
    params = [parameter(3, 3)]
    with pytest.raises(ValueError, match="exponent is 1/4, not 1/2"):
        sk.optim.Shampoo(params, kl=True, exponent=0.25)
    with pytest.raises(ValueError, match="newton_db"):
        sk.optim.Shampoo(params, root_method="newton_db", exponent=1 / 3)
    with pytest.raises(ValueError, match="low_memory.*linf"):
        sk.optim.DeVA(params, variant="low_memory", norm="linf")
    with pytest.raises(ValueError, match="reference=True"):
        sk.optim.DeVA(params, variant="low_memory", reference=True)
    with pytest.raises(ValueError, match="reference=True"):
        sk.optim.DeVA(params, eps_mode="outside", reference=True)
    with pytest.raises(ValueError, match="steps=3 differs from the number of rows, 1"):
        sk.optim.Muon(params, ns_coefficients=[(2.0, -1.5, 0.5)], ns_steps=3)


def test_F42_bad_adamw_values():
    with pytest.raises(ValueError, match="a key of adamw must be one of lr, betas"):
        sk.optim.Muon([parameter(3, 3)], adamw={"momentum": 0.9})
    with pytest.raises(ValueError, match="adamw: lr must be in"):
        sk.optim.Muon([parameter(3, 3)], adamw={"lr": -1.0})
    with pytest.raises(ValueError, match=r"param_groups\[0\]: betas\[1\] must be in \[0, 1\)"):
        sk.optim.Muon([{"params": [parameter(3)], "betas": (0.9, 1.0)}])
    with pytest.raises(ValueError, match="algorithm must be one of auto, matrix, adamw"):
        sk.optim.Muon([{"params": [parameter(3, 3)], "algorithm": "sgd"}])


def test_F45_numbers_of_any_kind():
    numpy = pytest.importorskip("numpy")
    param, other = parameter(4, 5), parameter(4, 5)
    optimizer = sk.optim.Muon(
        [param], lr=numpy.float32(0.5), weight_decay=1, momentum=0, ns_steps=5
    )
    plain = sk.optim.Muon([other], lr=0.5, weight_decay=1.0, momentum=0.0)
    group = optimizer.param_groups[0]
    assert {type(group[name]) for name in ("lr", "weight_decay", "momentum")} == {float}
    for each, stepped in ((param, optimizer), (other, plain)):
        with_grads([each])
        stepped.step()
    assert torch.equal(param, other)


CHANGES = {
    "muon": [("momentum", 0.5), ("nesterov", False), ("ns_steps", 3), ("weight_decay", 0.5)],
    "shampoo": [("betas", (0.5, 0.5)), ("precondition_frequency", 1), ("graft_eps", 0.5)],
    "soap": [("betas", (0.5, 0.5)), ("precondition_frequency", 1), ("eps", 0.5)],
    "deva": [("betas", (0.5, 0.5)), ("precondition_frequency", 1), ("eps", 0.5), ("sign", True)],
}


@pytest.mark.parametrize(
    ("name", "key", "value"), [(name, *case) for name, cases in CHANGES.items() for case in cases]
)
def test_F41_changed_value_counts_from_the_next_step(name, key, value):
    """As an optimizer that was made with it and got the state; unlike one that was not."""
    params = [parameter(6, 8)]
    optimizer = CONFIGS[name](params)
    for seed in range(3):
        with_grads(params, seed)
        optimizer.step()
    twins = []
    for options in ({key: value}, {}):
        param = nn.Parameter(params[0].detach().clone())
        other = CONFIGS[name]([param], **options)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group.update(options)
        other.load_state_dict(saved)
        twins.append((param, other))
    optimizer.param_groups[0][key] = value
    for seed in range(3, 7):
        for param, stepped in ((params[0], optimizer), *twins):
            with_grads([param], seed)
            stepped.step()
    assert torch.equal(params[0], twins[0][0])
    assert not torch.equal(params[0], twins[1][0])


# Routing.


def test_raw_list_is_routed_by_dimensions(make_few):
    params = [parameter(4), parameter(3, 4), parameter(), parameter(4, 2, 3, 3)]
    optimizer = make_few(params)
    (group,) = optimizer.param_groups
    assert group["algorithm"] == "auto"
    assert list(map(id, group["params"])) == list(map(id, params))
    found = [optimizer.algorithm_of(param) for param in params]
    assert found == ["adamw", "matrix", "adamw", "matrix"]
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        optimizer.algorithm_of(parameter(3))


def routes(net: nn.Module, **options) -> dict[str, set[str]]:
    groups = sk.optim.param_groups(net, verbose=False, **options)
    return {group["algorithm"]: {name for name, _ in group["params"]} for group in groups}


class Block(nn.Module):
    def __init__(self, width: int, experts: int = 0) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        if experts:
            self.experts = nn.Parameter(torch.zeros(experts, width, width))


class Gpt(nn.Module):
    def __init__(self, *, tied: bool, experts: int = 0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.blocks = nn.ModuleList([Block(8, experts)])
        self.ln_f = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


HIDDEN = {
    "blocks.0.attn.in_proj_weight",
    "blocks.0.attn.out_proj.weight",
    "blocks.0.mlp.0.weight",
    "blocks.0.mlp.2.weight",
}


@pytest.mark.parametrize("tied", [True, False])
def test_F23_routing_of_a_transformer(tied):
    net = Gpt(tied=tied)
    assert routes(net)["matrix"] == HIDDEN
    assert routes(net)["adamw"] == {name for name, _ in net.named_parameters()} - HIDDEN


def test_F23_routing_of_experts():
    net = Gpt(tied=False, experts=3)
    groups = sk.optim.param_groups(net, matrix={"lr": 0.5}, verbose=False)
    optimizer = sk.optim.Muon(groups)
    (batched,) = (group for group in optimizer.param_groups if group.get("batched"))
    assert batched["param_names"] == ["blocks.0.experts"]
    assert batched["lr"] == 0.5
    experts = net.blocks[0].experts
    with_grads([experts])
    optimizer.step()
    assert optimizer.state[experts]["step"].shape == (3,)


def test_overrides_declare_batches_of_matrices(make_few):
    net = Gpt(tied=False, experts=3)
    overrides = {"*.experts*": "batched", "*.mlp.0.*": "adamw"}
    groups = sk.optim.param_groups(net, overrides=overrides, matrix={"lr": 0.25}, verbose=False)
    assert [group["algorithm"] for group in groups] == ["matrix", "matrix", "adamw"]
    assert [name for name, _ in groups[1]["params"]] == ["blocks.0.experts"]
    assert groups[1]["batched"] is True and groups[1]["lr"] == 0.25
    optimizer = make_few(groups)
    experts = net.blocks[0].experts
    with_grads([experts])
    optimizer.step()
    assert optimizer.state[experts]["step"].shape[-1] == 3
    with pytest.raises(ValueError, match=r"experts of shape \(3, 8, 8\): .* ambiguous.*'batched'"):
        sk.optim.param_groups(net, overrides={"*.experts": "matrix"}, verbose=False)
    with pytest.raises(ValueError, match="ln_f.weight of shape .* at least two dimensions"):
        sk.optim.param_groups(net, overrides={"ln_f.*": "matrix"}, verbose=False)


def test_F23_routing_of_a_convolutional_net():
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 4, 3))
    net.add_module("norm", nn.BatchNorm2d(4))
    net.add_module("body", nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Linear(4, 4)))
    net.add_module("fc", nn.Linear(4, 10))
    assert routes(net)["matrix"] == {"stem.weight", "body.0.weight", "body.2.weight"}


def test_F23_shared_and_frozen_modules():
    shared = nn.Linear(4, 4)
    net = nn.Module()
    net.first, net.second, net.frozen = shared, shared, nn.Linear(4, 4).requires_grad_(False)
    net.tail = nn.LayerNorm(4)
    # One module in two places is still a hidden matrix; one weight in two modules is tied.
    assert routes(net) == {
        "matrix": {"first.weight"},
        "adamw": {"first.bias", "tail.weight", "tail.bias"},
    }


def test_F23_named_parameters_are_routed_by_name():
    net = Gpt(tied=False)
    optimizer = sk.optim.Muon(net.named_parameters())
    chosen = {n for n, p in net.named_parameters() if optimizer.algorithm_of(p) == "matrix"}
    assert chosen == HIDDEN
    names = [
        ("module.lm_head.weight", "adamw"),
        ("blocks.0.heads.0.key.weight", "matrix"),
        ("tok_embeddings.weight", "adamw"),
        ("token_mixing.fc1.weight", "matrix"),
        ("relative_position_bias_table", "adamw"),
        ("model.layers.0.self_attn.q_proj.weight", "matrix"),
    ]
    for name, algorithm in names:
        param = parameter(3, 4)
        assert sk.optim.Muon([(name, param)]).algorithm_of(param) == algorithm, name


def test_F23_table_and_wrong_overrides(capsys):
    net = Gpt(tied=True)
    sk.optim.param_groups(net, overrides={"blocks.0.mlp.0.*": "adamw"})
    printed = capsys.readouterr().out
    assert "blocks.0.mlp.0.weight" in printed and "override" in printed and "tied" in printed
    with pytest.raises(ValueError, match=r"overrides\['x'\] fits no parameter"):
        sk.optim.param_groups(net, overrides={"x": "adamw"})
    with pytest.raises(ValueError, match="must be one of matrix, batched, adamw, not 'sgd'"):
        sk.optim.param_groups(net, overrides={"*": "sgd"})
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        sk.optim.param_groups(nn.ReLU())


class Wrapped(torch.Tensor):
    """A tensor without storage of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(x):
            return x.inner if isinstance(x, cls) else x

        return func(*map(plain, args), **(kwargs or {}))


def test_F34_F47_wrapped_and_flattened_parameters_are_refused(make_few):
    with pytest.raises(TypeError, match=r"\(w\) is a Wrapped, which has no storage of its own"):
        make_few([("w", Wrapped(torch.ones(3, 3)))])
    flat = parameter(9)
    flat._is_flat_param = True
    with pytest.raises(TypeError, match="flattened or partitioned by a wrapper"):
        make_few([flat])
    with pytest.raises(TypeError, match="has no shape yet"):
        make_few(list(nn.LazyLinear(3).parameters()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_original_parameters_of_FSDP1_are_refused(make_few, when):
    """Their marks, and a 1-D piece of each; the others are empty and get no gradient."""
    params = [parameter(4, 6), parameter(6)]
    optimizer = make_few(params) if when == "after" else None
    for param in params:
        param._fsdp_flattened = True
        param.data = param.data.flatten()[:0]
    message = r"FSDP1 with use_orig_params=True\), .*use fully_shard"
    with pytest.raises(TypeError, match=message):
        (optimizer or make_few(params)).step()
    if optimizer is not None:
        params[0].data = torch.ones(12)
        params[0].grad = torch.ones(12)
        with pytest.raises(TypeError, match=message):
            optimizer.step()
        assert torch.equal(params[0], torch.ones(12)) and not any(optimizer.state.values())


@pytest.mark.parametrize("case", ["replaced", "late", "frozen"])
def test_steps_in_which_nothing_can_move_are_warned_of_once(make_few, case):
    params = [("w", parameter(4, 6)), ("b", parameter(6))]
    optimizer = make_few(params)
    for _, param in params:
        param.requires_grad_(case != "frozen")
    counts = []
    for step in range(6):
        if case == "late" and step == 2:
            with_grads([param for _, param in params])
        elif step == 3:
            optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        counts.append([str(x.message) for x in caught])
    assert [len(x) for x in counts] == [0, 0, int(case == "replaced"), 0, 0, 0]
    if case == "replaced":
        assert "none of its 2 parameters that require grad (w is the first)" in counts[2][0]


# Schedules and failures.


def test_F17_steps_are_counted_once(make):
    net = model()
    optimizer = make(net.parameters())
    for count in range(1, 4):
        train(net, optimizer, batches(1))
        idle = optimizer.param_groups[0].get("skip_first") or optimizer.param_groups[0].get(
            "reference"
        )
        for group in optimizer.param_groups:
            for param in group["params"]:
                matrix = optimizer.algorithm_of(param) == "matrix"
                expected = count - (1 if idle and matrix else 0)
                assert set(optimizer.state[param]["step"].flatten().tolist()) == {float(expected)}


def test_F54_roots_are_spread_over_the_steps():
    """Ten matrices at frequency 5: all at the first step, then two a step."""
    params = [parameter(3, 4, seed=i) for i in range(10)]
    optimizer = sk.optim.Shampoo(params, precondition_frequency=5)
    optimizer.init_state()
    before = [optimizer.state[p]["left_root"]["0"].clone() for p in params]
    refreshed = []
    for seed in range(11):
        with_grads(params, seed)
        optimizer.step()
        roots = [optimizer.state[p]["left_root"]["0"].clone() for p in params]
        refreshed.append(
            {i for i, (a, b) in enumerate(zip(before, roots, strict=True)) if not torch.equal(a, b)}
        )
        before = roots
    assert refreshed[0] == set(range(10))
    assert all(len(each) == 2 for each in refreshed[1:])
    assert set().union(*refreshed[1:6]) == set(range(10))


def test_refresh_together_without_stagger():
    params = [parameter(3, 4, seed=i) for i in range(3)]
    optimizer = sk.optim.SOAP(params, precondition_frequency=2, skip_first=False)
    changed = []
    for seed in range(6):
        with_grads(params, seed)
        before = [optimizer.state[p].get("left_basis", torch.zeros(3, 3)).clone() for p in params]
        optimizer.step()
        after = [optimizer.state[p]["left_basis"] for p in params]
        changed.append({not torch.equal(a, b) for a, b in zip(before, after, strict=True)})
    assert changed == [{True}, {True}, {False}, {True}, {False}, {True}]


def test_F08_roots_that_keep_failing_stop_the_run_at_the_next_step():
    params = [("good", parameter(4, 5)), ("bad", parameter(4, 5, seed=1))]
    optimizer = sk.optim.Shampoo(
        params, precondition_frequency=1, root_method="eigen", max_root_failures=2, betas=(0.9, 0.5)
    )
    bad = params[1][1]
    with_grads([param for _, param in params])
    optimizer.step()
    state = optimizer.state[bad]
    root = state["left_root"]["0"].clone()
    for seed in range(1, 4):
        # A factor that is far from semidefinite has no root.
        state["left"]["0"].copy_(-1e6 * torch.eye(4))
        with_grads([param for _, param in params], seed)
        optimizer.step()
        assert state["root_failures"]["0"].tolist() == [seed, 0]
        assert torch.equal(state["left_root"]["0"], root)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="3 inverse roots of bad in a row .*max_root_failures=2"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_F08_a_root_that_succeeds_ends_the_row_of_failures():
    param = parameter(4, 5)
    optimizer = sk.optim.Shampoo(
        [param], precondition_frequency=1, root_method="eigen", max_root_failures=1
    )
    for seed in range(8):
        with_grads([param], seed)
        if seed % 2:
            optimizer.state[param]["left"]["0"].copy_(-1e6 * torch.eye(4))
        elif seed:
            optimizer.state[param]["left"]["0"].copy_(torch.eye(4))
        optimizer.step()
        assert optimizer.state[param]["root_failures"]["0"].tolist() == [seed % 2, 0]


@contextlib.contextmanager
def without_eigensolver():
    """On the specification, whose solver can be made to fail."""

    def fails(*args, **options):
        raise torch.linalg.LinAlgError("no convergence")

    with sk.use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails)
        yield


# No ridge, so that there is no other way to take the root.
HARD = {"root_method": "eigen", "relative_ridge": 0.0, "precondition_frequency": 10}


@pytest.mark.parametrize("options", [{}, {"kl": True}, {"kl": True, "kl_order": "simultaneous"}])
@pytest.mark.parametrize("device_memo", [False, True])
def test_F08_a_failed_first_root_is_tried_again_at_the_next_step(options, device_memo, monkeypatch):
    param = parameter(5, 4)
    optimizer = sk.optim.Shampoo([("bad", param)], **HARD, **options)
    optimizer.init_state()
    state = optimizer.state[param]
    if device_memo:  # what the next step is told without waiting for a device
        known = optimizer._known_failures
        monkeypatch.setattr(optimizer, "_has_failed", lambda x: known.get(id(x), (x, False))[1])
    with_grads([param])
    with without_eigensolver(), pytest.warns(RuntimeWarning, match="of bad failed at step 1") as w:
        optimizer.step()
    assert all("residual of" in str(warning.message) for warning in w)
    assert state["root_failures"]["0"].tolist() == [1, 1] and optimizer.failed_roots == 2
    if not options:
        assert torch.equal(state["left_root"]["0"], torch.eye(5))
    roots = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (1, 2, 3):
            with_grads([param], seed)
            with sk.use_backend("reference"):
                optimizer.step()
            roots.append(state["left_root"]["0"].clone())
            assert state["root_failures"]["0"].tolist() == [0, 0]
    assert not torch.equal(roots[0], torch.eye(5)) and torch.equal(roots[1], roots[2])
    assert options or torch.equal(roots[0], roots[1])  # taken at the second step, and not again
    assert optimizer.failed_roots == 2
    assert pickle.loads(pickle.dumps(optimizer)).failed_roots == 2


def test_F08_failed_roots_are_warned_of_once_and_counted():
    params = [parameter(4, 5, seed=seed) for seed in range(3)]
    optimizer = sk.optim.Shampoo(params, **HARD, max_root_failures=5)
    optimizer.watch()
    caught = []
    for seed in range(3):
        with_grads(params, seed)
        with without_eigensolver(), warnings.catch_warnings(record=True) as new:
            warnings.simplefilter("always")
            optimizer.step()
        caught += new
    assert len(caught) == 2  # both sides of the first
    report = optimizer.diagnostics()
    assert report.failed_roots == optimizer.failed_roots == 18
    assert dict(report.scalars())["failed_roots"] == 18.0
    assert {figures.root_failures for figures in report.parameters.values()} == {3}


def test_F08_a_resumed_run_tries_a_failed_root_again():
    param = parameter(4, 5)
    optimizer = sk.optim.Shampoo([param], **HARD)
    with_grads([param])
    with without_eigensolver(), pytest.warns(RuntimeWarning, match="failed at step 1"):
        optimizer.step()
    resumed = sk.optim.Shampoo([param], **HARD)
    resumed.load_state_dict(optimizer.state_dict())
    with_grads([param], 1)
    resumed.step()
    assert resumed.state[param]["root_failures"]["0"].tolist() == [0, 0]
    assert not torch.equal(resumed.state[param]["left_root"]["0"], torch.eye(4))


def test_F08_with_a_ridge_the_iteration_takes_what_the_eigensolver_cannot():
    params = [parameter(6, 5), parameter(6, 5)]
    with torch.no_grad():
        params[1].copy_(params[0])
    failing, right = (
        sk.optim.Shampoo([param], **{**HARD, "relative_ridge": 1e-4}) for param in params
    )
    with_grads(params[:1])
    params[1].grad = params[0].grad.clone()
    with without_eigensolver():
        failing.step()
    with sk.use_backend("reference"):
        right.step()
    assert failing.failed_roots == 0
    for side in ("left_root", "right_root"):
        ours, exact = (o.state[p][side]["0"] for o, p in zip((failing, right), params, strict=True))
        assert float((ours - exact).norm() / exact.norm()) < 1e-3


def test_every_matrix_goes_through_the_kernel(make_few):
    """F49: a counter, not a changed parameter, proves what ran."""
    net = model()
    optimizer = make_few(net.parameters())
    sk.call_counts(reset=True)
    with sk.use_backend("reference"):
        train(net, optimizer, batches(3))
    assert sk.call_counts() == {f"{optimizer._operator}/reference": 3}


def test_state_is_finite_on_rank_deficient_gradients(make):
    param = parameter(8, 6)
    optimizer = make([param])
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        param.grad = torch.outer(
            torch.randn(8, generator=generator), torch.randn(6, generator=generator)
        )
        optimizer.step()
    assert param.isfinite().all()
    assert all(x.isfinite().all() for x in tensors(optimizer.state_dict()["state"]))


def test_compiled_training_step(make_few):
    """A compiled forward and backward, and a step called from a compiled function."""
    net, plain = model(), model()
    optimizers = make_few(net.parameters()), make_few(plain.parameters())

    @torch.compile(backend="eager")
    def step():
        optimizers[0].step()

    for seed in range(3):
        with_grads(net.parameters(), seed)
        with_grads(plain.parameters(), seed)
        step()
        optimizers[1].step()
    assert_same(list(net.parameters()), list(plain.parameters()))

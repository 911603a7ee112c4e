"""The optimizers against public trajectories, and their limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import parameter, torch_scales, with_grads
from support.states import assert_same
from test_optim import FP64
from torch import nn

GOLDEN = json.loads((Path(__file__).parent / "golden" / "public_trajectories.json").read_text())


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

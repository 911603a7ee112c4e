"""Arguments of the optimizers, of any kind and at any time."""

from __future__ import annotations

import copy
import math

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import CONFIGS, parameter, with_grads
from support.states import assert_same
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


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

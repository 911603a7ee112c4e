"""State: layout, ownership, checkpoints, resumption, the state of other optimizers, memory."""

from __future__ import annotations

import copy

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import CONFIGS, batches, model, needs_kernels, parameter, train, with_grads
from support.states import assert_go_on_alike, assert_same, snapshot, tensors
from torch import nn

KEYS = {
    "muon": {"step", "momentum_buffer"},
    "soap": {"step", "exp_avg", "exp_avg_sq", "left", "right", "left_basis", "right_basis"},
    "deva": {"step", "exp_avg", "exp_avg_sq", "left", "right", "left_basis", "right_basis"},
    "shampoo": {
        "step",
        "momentum_buffer",
        "left",
        "right",
        "left_root",
        "right_root",
        "graft_sq",
        "root_failures",
    },
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_state(name):
    param = parameter(4, 6)
    optimizer = CONFIGS[name]([param])
    with_grads([param])
    optimizer.step()
    assert set(optimizer.state[param]) == KEYS[name]
    assert optimizer.state_dict()["state_version"] == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_F37_state_is_float32_under_16_bit_parameters_and_stays_so(make, dtype):
    net = model(dtype)
    optimizer = make(net.parameters())
    train(net, optimizer, batches(4, dtype))
    full = torch.float64 if dtype == torch.float64 else torch.float32
    for group in optimizer.param_groups:
        for param in group["params"]:
            for name, value in optimizer.state[param].items():
                floats = [x for x in tensors(value) if x.is_floating_point()]
                if name == "step":
                    assert all(x.dtype == torch.float32 for x in floats)
                elif optimizer.algorithm_of(param) == "matrix":
                    assert all(x.dtype == full for x in floats), name
                else:
                    assert all(x.dtype == dtype for x in floats), name
    other_net = model(dtype)
    other = make(other_net.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("before", range(1, 6))
def test_F38_resumed_run_equals_uninterrupted_one(make, before):
    """Through every phase of a schedule of three steps."""
    net = model()
    optimizer = make(net.parameters())
    steps = list(batches(before + 4))
    train(net, optimizer, steps[:before])
    resumed = copy.deepcopy(net)
    other = make(resumed.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, steps[before:])
    train(resumed, other, steps[before:])
    assert_same(list(resumed.parameters()), list(net.parameters()))
    assert_same(other.state_dict(), optimizer.state_dict())


def test_F38_resumption_after_skipped_steps(make_few):
    params = [parameter(6, 8), parameter(4, 4)]
    optimizer = make_few(params)
    for seed in range(5):
        with_grads(params, seed)
        if seed in (0, 2, 3):
            params[0].grad[1, 1] = torch.nan
        optimizer.step()
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    other = make_few(copies)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_go_on_alike((optimizer, params), (other, copies), range(5, 10))


def test_F39_state_made_early_is_that_of_the_first_step(make):
    net, late = model(), model()
    early, lazy = make(net.parameters()), make(late.parameters())
    early.init_state()
    keys = {param: set(state) for param, state in early.state.items()}
    assert len(keys) == 6
    train(net, early, batches(3))
    train(late, lazy, batches(3))
    assert {param: set(state) for param, state in early.state.items()} == keys
    assert_same(early.state_dict(), lazy.state_dict())


def test_init_state_leaves_frozen_parameters_out(make_few):
    params = [parameter(3, 4), parameter(4, 3)]
    params[1].requires_grad_(False)
    optimizer = make_few(params)
    optimizer.init_state()
    assert set(optimizer.state[params[0]]) and not optimizer.state[params[1]]


def test_F33_state_tensors_own_their_memory(make):
    net = model()
    optimizer = make(net.parameters())
    train(net, optimizer, batches(4))
    source = optimizer.state_dict()
    loaded = make(model().parameters())
    loaded.load_state_dict(source)
    grads = [param.grad for param in net.parameters()]
    everything = [*tensors(source["state"]), *tensors(loaded.state_dict()["state"])]
    everything += [*net.parameters(), *grads]
    spans = sorted(
        (x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        for x in everything
        if x.numel()
    )
    for (start, size), (following, _) in zip(spans, spans[1:], strict=False):
        assert start + size <= following


def test_F35_state_tensors_stay_the_same_objects(make):
    net = model()
    optimizer = make(net.parameters())
    train(net, optimizer, batches(1))
    first = [(id(x), x.data_ptr()) for x in tensors(list(optimizer.state.values()))]
    train(net, optimizer, batches(4))
    assert [(id(x), x.data_ptr()) for x in tensors(list(optimizer.state.values()))] == first


def test_F28_state_has_the_layout_of_the_parameter(make_few):
    needs_kernels()
    plain = parameter(6, 8)
    turned = nn.Parameter(parameter(6, 8).detach().mT.contiguous().mT)
    optimizers = make_few([plain]), make_few([turned])
    for seed in range(4):
        with_grads([plain], seed)
        # The gradient's layout is the other one.
        turned.grad = plain.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, turned)
    for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "graft_sq"):
        if name in optimizers[1].state[turned]:
            assert optimizers[1].state[turned][name].stride() == turned.stride()


def test_replaced_memory_and_state_are_noticed(make):
    """p.data = ..., and state that somebody replaces or drops, between steps."""
    params, others = ([parameter(7, 9), parameter(3, 2, 3, 3)] for _ in range(2))
    optimizer, other = make(params), make(others)
    replaced = []
    for seed in range(6):
        with_grads(params, seed)
        with_grads(others, seed)
        if seed == 2:
            for param in params:
                param.data = param.detach().clone()
        if seed == 3:
            for param in params:
                replaced.append((optimizer.state[param], copy.deepcopy(optimizer.state[param])))
                optimizer.state[param] = replaced[-1][1]
        if seed == 4:
            for old, new in replaced:
                assert old["step"].max() + 1 == new["step"].max()
            optimizer.state.clear()
            other = make(others)
        optimizer.step()
        other.step()
    assert_same(params, others)


def test_F46_memory_estimate_is_exact(make):
    net = model()
    optimizer = make(net.parameters())
    estimate = optimizer.memory_estimate()
    train(net, optimizer, batches(2))
    assert estimate == sum(
        x.numel() * x.element_size() for x in tensors(optimizer.state_dict()["state"])
    )


def test_values_of_the_file_win(make_few):
    net = model()
    optimizer = make_few(net.parameters(), lr=0.125, nonfinite="propagate")
    train(net, optimizer, batches(1))
    other = make_few(model().parameters(), lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.125
    assert other.param_groups[0]["nonfinite"] == "propagate"


# What cannot be loaded leaves everything as it was.


def broken(name: str, saved: dict) -> str:
    """Breaks a state dict of two matrices and says how the error reads."""
    first = saved["state"][0]
    if name == "groups":
        saved["param_groups"].append(saved["param_groups"][0])
        return r"groups of \[2, 2\] parameters, this optimizer of \[2\]"
    if name == "shape":
        key = "momentum_buffer" if "momentum_buffer" in first else "exp_avg"
        first[key] = torch.zeros(2, 2)
        return rf"{key} of .*\[0\] has shape \(2, 2\), expected \(4, 6\)"
    if name == "missing":
        del first["step"]
        return r"the state of .*\[0\] has no step"
    if name == "kind":
        first["step"] = "late"
        return "must be a tensor, not str"
    if name == "algorithm":
        saved["param_groups"][0]["algorithm"] = "adamw"
        return "its algorithm is 'matrix', the saved one 'adamw'"
    saved["param_groups"][0]["weight_decay"] = -1.0
    return r"param_groups\[0\]: weight_decay must be in \[0, inf\), not -1"


@pytest.mark.parametrize("name", ["groups", "shape", "missing", "kind", "algorithm", "value"])
def test_F42_state_that_does_not_fit_is_refused(make_few, name):
    params = [parameter(4, 6), parameter(6, 4)]
    optimizer = make_few(params)
    with_grads(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    message = broken(name, saved)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


def test_blocks_are_fixed_by_the_first_step():
    param = parameter(6, 8)
    optimizer = sk.optim.Shampoo([param], block_size=4)
    with_grads([param])
    optimizer.step()
    optimizer.param_groups[0]["block_size"] = 3
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="blocks of a parameter are fixed by its first step"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# State of other optimizers, with the keys and shapes that they save.


def test_state_of_torch_muon_loads():
    mine, theirs = [parameter(6, 8), parameter(8, 5)], [parameter(6, 8), parameter(8, 5)]
    public = torch.optim.Muon(theirs, lr=0.02, momentum=0.9)
    for seed in range(3):
        with_grads(theirs, seed)
        public.step()
    optimizer = sk.optim.Muon(mine)
    optimizer.load_state_dict(public.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["eps"]) == (0.02, 0.9, 1e-7)
    for param, other in zip(mine, theirs, strict=True):
        param.data.copy_(other.data)
        buffer = optimizer.state[param]["momentum_buffer"]
        assert torch.equal(buffer, public.state[other]["momentum_buffer"])
    with_grads(mine, 3)
    with_grads(theirs, 3)
    optimizer.step()
    public.step()
    # bfloat16 products on both sides.
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=2e-3)


def test_state_of_torch_muon_under_bfloat16_becomes_float32():
    param = parameter(6, 8, dtype=torch.bfloat16)
    public = torch.optim.Muon([param])
    with_grads([param])
    public.step()
    optimizer = sk.optim.Muon([param])
    optimizer.load_state_dict(public.state_dict())
    assert optimizer.state[param]["momentum_buffer"].dtype == torch.float32


def soap_state(shape: tuple[int, int], *, extra: tuple[str, ...] = ()) -> dict:
    """The state dict of nikhilvyas/SOAP or a DeVA class: a matrix and a bias in one group."""
    generator = torch.Generator().manual_seed(0)
    m, n = shape

    def semidefinite(size):
        x = torch.randn(size, 3 * size, generator=generator)
        return x @ x.mT

    factors = [semidefinite(m), semidefinite(n)]
    common = {"precondition_frequency": 10, "shampoo_beta": 0.95}
    matrix = {
        "step": 7,
        "exp_avg": torch.randn(m, n, generator=generator),
        "exp_avg_sq": torch.rand(m, n, generator=generator),
        "GG": factors,
        "Q": [torch.linalg.eigh(factor)[1].flip(1) for factor in factors],
        **common,
        **{name: torch.ones(m, n) for name in extra},
    }
    bias = {
        "step": 7,
        "exp_avg": torch.randn(n, generator=generator),
        "exp_avg_sq": torch.rand(n, generator=generator),
        "GG": [[]],
        "Q": [[]],
        **common,
    }
    group = {
        "lr": 0.003,
        "betas": (0.9, 0.95),
        "shampoo_beta": -1,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "precondition_frequency": 10,
        "max_precond_dim": 10000,
        "merge_dims": False,
        "precondition_1d": False,
        "normalize_grads": False,
        "correct_bias": True,
        "params": [0, 1],
    }
    return {"state": {0: bias, 1: matrix}, "param_groups": [group]}


@pytest.mark.parametrize(("cls", "extra"), [(sk.optim.SOAP, ()), (sk.optim.DeVA, ("gamma",))])
def test_state_of_public_soap_and_deva_loads(cls, extra):
    """What a file says of its one group reaches both kinds of parameter."""
    saved = soap_state((4, 6), extra=extra)
    if extra:
        # Public DeVA takes no vectors.
        saved["state"].pop(0)
    bias, matrix = parameter(6), parameter(4, 6)
    optimizer = cls([bias, matrix])
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    current = optimizer._current(0, group)
    assert current.matrix["betas"] == current.adamw["betas"] == (0.9, 0.95)
    assert group["shampoo_beta"] is None
    state, public = optimizer.state[matrix], saved["state"][1]
    assert state["step"].item() == 7.0
    assert torch.equal(state["exp_avg_sq"], public["exp_avg_sq"])
    for i, side in enumerate(("left", "right")):
        assert torch.equal(state[side], public["GG"][i])
        assert torch.equal(state[f"{side}_basis"], public["Q"][i])
    with_grads([bias, matrix])
    optimizer.step()
    assert state["step"].item() == 8.0


def test_public_soap_without_a_side_loads():
    saved = soap_state((4, 6))
    saved["state"][1]["GG"][1], saved["state"][1]["Q"][1] = [], []
    saved["param_groups"][0]["max_precond_dim"] = 5
    bias, matrix = parameter(6), parameter(4, 6)
    optimizer = sk.optim.SOAP([bias, matrix])
    optimizer.load_state_dict(saved)
    assert optimizer.state[matrix]["right"].numel() == 0
    with_grads([bias, matrix])
    optimizer.step()


def test_state_of_public_linf_deva_loads():
    param = parameter(4, 6)
    saved = {
        "state": {
            0: {
                "momentum_buffer": torch.ones(4, 6),
                "second_momentum_buffer": torch.full((4, 6), 0.5),
                "gamma": torch.ones(4, 6),
            }
        },
        "param_groups": [
            {"lr": 0.02, "weight_decay": 0, "betas": (0.9, 0.999), "nestrov": True, "params": [0]}
        ],
    }
    optimizer = sk.optim.DeVA([param], variant="linf", reference=True, eps=1e-5)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["nesterov"] is True
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.ones(4, 6))
    with_grads([param])
    optimizer.step()


def test_public_state_that_cannot_fit_is_refused():
    optimizer = sk.optim.SOAP([parameter(6), parameter(4, 6)])
    merged = soap_state((4, 6))
    merged["param_groups"][0]["merge_dims"] = True
    with pytest.raises(ValueError, match="merge_dims=True"):
        optimizer.load_state_dict(merged)
    kernel = sk.optim.SOAP([parameter(6), parameter(4, 2, 3, 1)])
    with pytest.raises(ValueError, match="saved with 2 factors"):
        kernel.load_state_dict(soap_state((4, 6)))


def test_distributed_checkpoint_functions(make_few):
    """torch.distributed.checkpoint's state dicts by name, on one process."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net = model()
    optimizer = make_few(net.parameters())
    train(net, optimizer, batches(2))
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    other_net = copy.deepcopy(net)
    other = make_few(other_net.parameters())
    set_optimizer_state_dict(other_net, other, saved)
    train(net, optimizer, batches(3))
    train(other_net, other, batches(3))
    assert_same(list(other_net.parameters()), list(net.parameters()))


def test_a_batch_of_no_matrices_loads_with_a_side_that_has_no_factor() -> None:
    x = torch.nn.Parameter(torch.zeros(0, 9, 6))
    group = [{"params": [x], "batched": True}]
    optimizer = sk.optim.SOAP(group, max_precond_dim=8)
    optimizer.init_state()
    optimizer.load_state_dict(optimizer.state_dict())
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[x].items()}
    assert shapes["left"] == (0,) and shapes["right"] == (0, 6, 6)

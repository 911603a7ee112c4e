"""Which parameters of a model an optimizer takes as matrices."""

from __future__ import annotations

import warnings

import pytest
import spectral_kernels as sk
import torch
from support.layouts import Wrapped
from support.optimizers import parameter, with_grads
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


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


class Unwrapped(Wrapped):
    """One that can be computed with."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(x):
            return x.inner if isinstance(x, cls) else x

        return func(*map(plain, args), **(kwargs or {}))


def test_F34_F47_wrapped_and_flattened_parameters_are_refused(make_few):
    with pytest.raises(TypeError, match=r"\(w\) is a Unwrapped, which has no storage of its own"):
        make_few([("w", Unwrapped(torch.ones(3, 3)))])
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

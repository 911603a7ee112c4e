"""Matrices that are several, one below the other: `split` of Muon's groups and of param_groups."""

from __future__ import annotations

import copy

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import parameter, stepped, with_grads
from support.states import assert_refused_when_written_later, assert_same
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

SETTING = {"lr": 0.05, "adjust_lr_fn": "original", "weight_decay": 0.1}


def apart(param: nn.Parameter, sizes: tuple[int, ...], dim: int = -2) -> list[nn.Parameter]:
    """The parts of a parameter as parameters of their own, with their gradients."""
    grads = param.grad.split(sizes, dim)
    parts = [nn.Parameter(part.clone()) for part in param.detach().split(sizes, dim)]
    for part, grad in zip(parts, grads, strict=True):
        part.grad = grad.clone()
    return parts


def assert_split_is_parts(param, split, sizes, dim=-2, **group):
    whole = sk.optim.Muon(
        [{"params": [param], "algorithm": "matrix", "split": split, **group}], **SETTING
    )
    pieces = sk.optim.Muon(
        [{"params": apart_now(param, sizes, dim), "algorithm": "matrix", **group}], **SETTING
    )
    parts = pieces.param_groups[0]["params"]
    for seed in range(3):
        with_grads([param], seed)
        for part, grad in zip(parts, param.grad.split(sizes, dim), strict=True):
            part.grad = grad.clone()
        whole.step()
        pieces.step()
    assert torch.equal(param.detach(), torch.cat(parts, dim).detach())
    momenta = [pieces.state[part]["momentum_buffer"] for part in parts]
    assert torch.equal(whole.state[param]["momentum_buffer"], torch.cat(momenta, dim))
    assert whole.state[param]["step"].eq(3).all()


def apart_now(param, sizes, dim):
    with_grads([param])
    return apart(param, sizes, dim)


@pytest.mark.parametrize(
    ("shape", "split", "sizes"),
    [
        ((12, 8), 3, (4, 4, 4)),
        ((12, 8), (6, 3, 3), (6, 3, 3)),
        ((9, 20), (2, 2, 5), (2, 2, 5)),
        ((6, 5), 1, (6,)),
        ((6, 2, 3, 2), (2, 4), (2, 4)),
    ],
    ids=str,
)
def test_a_split_matrix_is_its_parts(shape, split, sizes, backend):
    dim = 0 if len(shape) == 4 else -2
    assert_split_is_parts(parameter(*shape), split, sizes, dim)


def test_a_split_batch_is_its_parts(backend):
    assert_split_is_parts(parameter(2, 12, 8), 3, (4, 4, 4), batched=True)


def test_a_split_of_a_transposed_projection_is_its_parts(backend):
    """As transformers' Conv1D keeps it: (in, out)."""
    assert_split_is_parts(parameter(8, 12), 3, (4, 4, 4), -1, matrix_dims=((1,), (0,)))


def test_a_part_that_is_not_finite_is_skipped_alone():
    param = parameter(12, 8)
    optimizer = sk.optim.Muon([param], lr=0.1, split=(4, 4, 4))
    with_grads([param])
    param.grad[5, 3] = torch.nan
    before = param.detach().clone()
    with pytest.warns(UserWarning, match="skipped 1"):
        optimizer.step()
    assert torch.equal(param[4:8], before[4:8])
    assert not (param == before)[:4].any() and not (param == before)[8:].any()
    assert optimizer.state[param]["step"].tolist() == [1.0, 0.0, 1.0]
    assert optimizer.skipped == 1


@pytest.mark.parametrize(
    ("split", "error", "said"),
    [
        (5, ValueError, "split=5 does not divide 12 rows"),
        ((4, 4), ValueError, "makes 8 rows of 12"),
        (0, ValueError, "split"),
        ((), ValueError, "at least one part"),
        ((12, 0), ValueError, r"split\[1\]"),
        ("qkv", TypeError, "'qkv'"),
        (True, TypeError, "True"),
        (2.5, TypeError, "2.5"),
    ],
    ids=str,
)
def test_a_split_that_does_not_fit_is_refused(split, error, said):
    with pytest.raises(error, match=said):
        sk.optim.Muon([parameter(12, 8)], split=split)


def test_a_split_that_is_written_later_is_checked_and_used():
    param = parameter(12, 8)
    assert_refused_when_written_later(param, "split", 7, "split=7")


@pytest.mark.parametrize("optimizer", [sk.optim.Shampoo, sk.optim.SOAP, sk.optim.DeVA])
def test_optimizers_without_splits_refuse_them(optimizer):
    with pytest.raises(ValueError, match="no split"):
        optimizer([{"params": [parameter(12, 8)], "split": 3}])


@pytest.mark.parametrize(("saved", "loads"), [(None, 3), (3, None), (3, (6, 6)), (3, 3)], ids=str)
def test_state_loads_into_any_split(saved, loads):
    param = parameter(12, 8)
    first = sk.optim.Muon([param], lr=0.1, split=saved)
    stepped(first, [param], 2)
    state = copy.deepcopy(first.state_dict())
    other = nn.Parameter(param.detach().clone())
    second = sk.optim.Muon([other], lr=0.1, split=loads)
    second.load_state_dict(state)
    assert second.param_groups[0]["split"] == loads
    assert torch.equal(
        second.state[other]["momentum_buffer"], first.state[param]["momentum_buffer"]
    )
    assert second.state[other]["step"].eq(2).all()
    stepped(second, [other], 1)
    if saved == loads:
        stepped(first, [param], 1)
        assert torch.equal(param, other)
        assert_same(first.state_dict()["state"], second.state_dict()["state"])


def test_state_of_torch_loads_into_a_split():
    param, other = parameter(12, 8), parameter(12, 8)
    theirs = torch.optim.Muon([param], lr=0.1)
    stepped(theirs, [param], 1)
    ours = sk.optim.Muon([other], split=3)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[other]["step"].shape == (3,)
    stepped(ours, [other], 1)


# param_groups


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as transformers'."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))


class Attention(nn.Module):
    """A module with some projections and what it tells of its heads."""

    def __init__(self, layers: dict[str, nn.Module], **told: object) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        for name, value in told.items():
            setattr(self, name, value)


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.up = nn.Linear(16, 40)


class Config:
    num_attention_heads = 4
    num_key_value_heads = 2
    head_dim = 4


def linear(out: int) -> nn.Linear:
    return nn.Linear(16, out, bias=False)


def splits(attention: nn.Module, by: str | None) -> dict[str, object]:
    """What a model with blocks of it makes of every attention parameter."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(attention)]), "head": nn.Linear(40, 3)})
    groups = sk.optim.param_groups(model, split=by, verbose=False)
    found = {}
    for group in groups:
        sk.optim.Muon([{**group}])
        for name, param in group["params"]:
            place = "blocks.0.attention."
            if name.startswith(place) and param.ndim == 2:
                found[name.removeprefix(place).removesuffix(".weight")] = group.get("split")
    return found


GROUPED = {"q_proj": linear(16), "k_proj": linear(8), "v_proj": linear(8), "o_proj": linear(16)}
CASES = {
    "torch": (
        lambda: nn.MultiheadAttention(16, 4),
        {"in_proj_weight": 3, "out_proj": None},
        {"in_proj_weight": 12, "out_proj": None},
    ),
    "torch, other widths": (
        lambda: nn.MultiheadAttention(16, 4, kdim=12, vdim=8),
        None,
        {"q_proj_weight": 4, "k_proj_weight": 4, "v_proj_weight": 4, "out_proj": None},
    ),
    "timm": (
        lambda: Attention({"qkv": linear(48), "proj": linear(16)}, num_heads=4, head_dim=4),
        {"qkv": 3, "proj": None},
        {"qkv": 12, "proj": None},
    ),
    "nanoGPT": (
        lambda: Attention({"c_attn": linear(48), "c_proj": linear(16)}, n_head=2, n_embd=16),
        {"c_attn": 3, "c_proj": None},
        {"c_attn": 6, "c_proj": None},
    ),
    "GPT-2": (
        lambda: Attention({"c_attn": Conv1D(48, 16)}, num_heads=2, head_dim=8),
        {"c_attn": 3},
        {"c_attn": 6},
    ),
    "Phi-3": (
        lambda: Attention({"qkv_proj": linear(32), "o_proj": linear(16)}, config=Config()),
        {"qkv_proj": (16, 8, 8), "o_proj": None},
        {"qkv_proj": 8, "o_proj": None},
    ),
    "Llama": (
        lambda: Attention(GROUPED, config=Config()),
        None,
        {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": None},
    ),
    "GPT-NeoX, interleaved": (
        lambda: Attention({"query_key_value": linear(48), "dense": linear(16)}, num_heads=2),
        None,
        {"query_key_value": 6, "dense": None},
    ),
    "heads not told": (
        lambda: Attention({"to_qkv": linear(48), "to_out": linear(16)}),
        {"to_qkv": 3, "to_out": None},
        None,
    ),
    "told wrongly": (
        lambda: Attention({"qkv": linear(48)}, num_heads=4, head_dim=8),
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by", ["qkv", "heads"])
def test_param_groups_split_what_modules_tell(name, by):
    make, qkv, heads = CASES[name]
    expected = qkv if by == "qkv" else heads
    if expected is None:
        with pytest.raises(ValueError, match="finds no projection"):
            splits(make(), by)
    else:
        assert splits(make(), by) == expected


def test_param_groups_split_nothing_unasked():
    assert splits(nn.MultiheadAttention(16, 4), None) == {"in_proj_weight": None, "out_proj": None}
    with pytest.raises(ValueError, match="'head'"):
        sk.optim.param_groups(nn.MultiheadAttention(16, 4), split="head")


def test_param_groups_say_parts(capsys):
    block = Block(Attention({"c_attn": Conv1D(48, 16)}, num_heads=2, head_dim=8))
    sk.optim.param_groups(nn.ModuleList([block, nn.Linear(40, 3)]), split="heads")
    assert "hidden matrix, 6 parts" in capsys.readouterr().out


def test_groups_of_a_split_load_what_was_saved_without():
    """Groups differ in number then; names tell."""
    net = nn.ModuleList([Block(nn.MultiheadAttention(16, 4)), nn.Linear(40, 3)])
    params = list(net.parameters())
    plain = sk.optim.Muon(sk.optim.param_groups(net, verbose=False), lr=0.1)
    stepped(plain, params, 1)
    split = sk.optim.Muon(sk.optim.param_groups(net, split="heads", verbose=False), lr=0.1)
    split.load_state_dict(plain.state_dict())
    weight = net[0].attention.in_proj_weight
    assert split.state[weight]["step"].shape == (12,)
    assert torch.equal(
        split.state[weight]["momentum_buffer"], plain.state[weight]["momentum_buffer"]
    )
    stepped(split, params, 1)

"""Groups without names, and state that was saved under other groups."""

from __future__ import annotations

import ast
import copy
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import with_grads
from support.states import assert_same, snapshot
from test_routing import TABLE, WIDTH, WORDS, linear, linears, tree, words
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


# Groups without names.


def bare(net: nn.Module) -> list[dict[str, Any]]:
    """Groups as trainers make them: with decay and without, and no names."""
    return [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def deep() -> nn.Module:
    layers = linears("h", *map(str, range(6)))
    ups = {f"up.{i}": linear(4 * WIDTH) for i in range(4)}
    return tree({"table": words(), **layers, **ups, "top": linear(WORDS)})


def test_groups_without_names_are_warned_of_once(make_few):
    with pytest.warns(UserWarning) as caught:
        optimizer = make_few(bare(deep()))
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(400, 8))]})
    (message,) = [str(each.message) for each in caught if "may be embeddings" in str(each.message)]
    first, last = (f"param_groups[0]['params'][{i}] of shape (97, 16)" for i in (0, 11))
    assert f"gives {first}, {last} the matrix rule" in message
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "groups",
    [
        lambda net: sk.optim.param_groups(net, verbose=False),
        lambda net: net.named_parameters(),
        lambda net: [{**each, "algorithm": "adamw"} for each in bare(net)],
        lambda net: [{"params": bare(net)[0]["params"], "algorithm": "matrix"}],
        lambda net: [{"params": [*net.h.parameters(), *net.up.parameters()]}],
        # Projections of grouped queries, and low ranks, repeat.
        lambda net: [nn.Parameter(torch.zeros(8, 64)) for _ in range(4)],
    ],
)
def test_groups_that_tell_are_not_warned_of(groups, recwarn):
    sk.optim.Muon(groups(deep()))
    assert not [each for each in recwarn if "may be embeddings" in str(each.message)]


# State that was saved under another routing.


def test_state_of_other_groups_loads_by_name(make_few):
    net = TABLE["llama"][0]()
    named = dict(net.named_parameters())
    optimizer = make_few(sk.optim.param_groups(net, verbose=False))
    with_grads(named.values())
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    groups = sk.optim.param_groups(net, verbose=False)
    turned = [{**group, "params": group["params"][::-1]} for group in reversed(groups)]
    # As an earlier version named them within a wrapper.
    for group in saved["param_groups"]:
        group["param_names"] = [f"module.{name}" for name in group["param_names"]]
    other = make_few(turned)
    other.load_state_dict(saved)
    for param in named.values():
        assert_same(optimizer.state[param], other.state[param])
    assert [name for group in other.param_groups for name in group["param_names"]] == [
        name for group in turned for name, _ in group["params"]
    ]
    assert [group["algorithm"] for group in other.param_groups] == ["adamw", "matrix"]


def test_state_of_another_algorithm_is_refused_by_name(make_few):
    """An earlier version gave these experts to AdamW."""
    net = TABLE["mixtral"][0]()
    before = {"*.experts.*": "adamw"}
    old = make_few(sk.optim.param_groups(net, overrides=before, verbose=False))
    with_grads(net.parameters())
    old.step()
    new = make_few(sk.optim.param_groups(net, verbose=False))
    kept = snapshot(new)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(ValueError, match=f"{name} and 1 more under 'adamw'") as caught:
        new.load_state_dict(old.state_dict())
    assert_same(snapshot(new), kept)
    # The sentence says how to go on.
    overrides = ast.literal_eval(str(caught.value).partition("overrides=")[2].partition(")")[0])
    again = make_few(sk.optim.param_groups(net, overrides=overrides, verbose=False))
    again.load_state_dict(old.state_dict())
    assert_same(snapshot(again), snapshot(old))


def test_names_at_other_places_beside_unknown_ones_are_refused():
    a, b = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    saved = sk.optim.Muon([("a", a), ("b", b)]).state_dict()
    with pytest.raises(ValueError, match="has a as parameter 0 of group 0, this optimizer as"):
        sk.optim.Muon([("c", a), ("a", b)]).load_state_dict(saved)
    # Renamed ones go by their order, as in torch.
    other = sk.optim.Muon([("c", a), ("d", b)])
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["c", "d"]

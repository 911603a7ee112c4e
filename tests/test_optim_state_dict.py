"""State dicts and copies of the optimizers obey torch.optim's conventions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.optimizers import batches, model, train, with_grads
from support.states import assert_same

pytestmark = pytest.mark.usefixtures("one_thread")


def test_state_dict_hooks(make_few):
    net = model()
    optimizer = make_few(net.parameters())
    train(net, optimizer, batches(2))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    saved = optimizer.state_dict()
    assert seen == ["pre"] and saved["note"] == 1

    other = make_few(model().parameters())

    def first(_, state):
        seen.append("first")
        for group in state["param_groups"]:
            group["lr"] = 0.125
        return state

    def last(loaded):
        seen.append("loaded")
        # State is complete when hooks see it.
        assert_same(loaded.state_dict()["state"], saved["state"])

    other.register_load_state_dict_pre_hook(lambda *_: seen.append("second"))
    other.register_load_state_dict_pre_hook(first, prepend=True)
    other.register_load_state_dict_post_hook(last)
    other.load_state_dict(copy.deepcopy(saved))
    assert seen == ["pre", "first", "second", "loaded"]
    assert {group["lr"] for group in other.param_groups} == {0.125}


def test_state_is_not_empty_after_a_step(make):
    net = model()
    optimizer = make(net.parameters())
    train(net, optimizer, batches(1))
    assert all(optimizer.state[param] for param in net.parameters())


def test_state_dict_is_deterministic(make):
    saved = []
    for _ in range(2):
        net = model()
        optimizer = make(net.parameters())
        train(net, optimizer, batches(4))
        saved.append(optimizer.state_dict())
    assert_same(saved[0], saved[1])


def test_F37_weights_only_file_loads_bit_for_bit(make, tmp_path):
    net = model()
    optimizer = make(net.parameters())
    train(net, optimizer, batches(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = make(model().parameters())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu"))
    assert_same(other.state_dict(), optimizer.state_dict())


def test_state_dict_without_names_loads_into_named_and_back(make_few):
    net = model()
    plain, named = make_few(net.parameters()), make_few(list(model().named_parameters()))
    # Names route `out` and others as dimensions do.
    train(net, plain, batches(2))
    named.load_state_dict(plain.state_dict())
    assert all("param_names" in group for group in named.param_groups)
    assert_same(named.state_dict()["state"], plain.state_dict()["state"])
    again = make_few(model().parameters())
    again.load_state_dict(named.state_dict())
    assert again.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]


def test_step_saved_as_a_number_loads(make_few):
    net = model()
    optimizer = make_few(net.parameters())
    train(net, optimizer, batches(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    other = make_few(model().parameters())
    other.load_state_dict(saved)
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_older_state_dict_gets_missing_values_from_the_optimizer(make_few):
    net = model()
    optimizer = make_few(net.parameters())
    train(net, optimizer, batches(2))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state_version"]
    for group in saved["param_groups"]:
        del group["maximize"]
    other = make_few(model().parameters(), maximize=True)
    other.load_state_dict(saved)
    assert all(group["maximize"] for group in other.param_groups)


def test_state_of_a_later_version_is_refused(make_few):
    optimizer = make_few(model().parameters())
    saved = {**optimizer.state_dict(), "state_version": 99}
    with pytest.raises(ValueError, match="state_version is 99"):
        optimizer.load_state_dict(saved)


def test_F44_deepcopy_pickle_and_repr(make):
    net = model()
    optimizer = make(net.parameters())
    train(net, optimizer, batches(2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert_same(twin.state_dict(), optimizer.state_dict())
        public = {name for name in vars(optimizer) if not name.startswith("_")}
        assert {name for name in vars(twin) if not name.startswith("_")} == public
        params = [p for group in twin.param_groups for p in group["params"]]
        with_grads(params)
        twin.step()
        twin.load_state_dict(optimizer.state_dict())
    assert repr(optimizer).startswith(type(optimizer).__name__)
    assert "algorithm: auto" in repr(optimizer)


def test_F44_copied_model_and_optimizer_go_on_alike(make_few):
    net = model()
    optimizer = make_few(net.parameters())
    train(net, optimizer, batches(2))
    file = io.BytesIO()
    torch.save((net, optimizer), file)
    file.seek(0)
    twins = [copy.deepcopy((net, optimizer)), torch.load(file, weights_only=False)]
    train(net, optimizer, batches(3))
    for twin_net, twin in twins:
        train(twin_net, twin, batches(3))
        assert_same(list(twin_net.parameters()), list(net.parameters()))

"""Checkpoints: every way of saving resumes bit for bit; files of every version load for ever."""

from __future__ import annotations

import copy
import functools
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spectral_kernels as sk
import torch
import torch.distributed.checkpoint as dcp
from support.optimizers import CONFIGS, FEW, Model, batches, model, train
from support.states import assert_same, golden
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

# The whole run. Refreshes are due at the steps 1, 4 and 7.
STEPS = 8
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Trained = tuple[Model, torch.optim.Optimizer]


pytestmark = pytest.mark.usefixtures("one_thread")


def fresh(name: str, dtype: torch.dtype) -> Trained:
    """Another initialization, which loading must leave nothing of."""
    net = model(dtype, seed=1)
    return net, CONFIGS[name](net.parameters())


def saved(net: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"net": net.state_dict(), "optimizer": optimizer.state_dict()}


def loaded(name: str, dtype: torch.dtype, found: dict[str, Any]) -> Trained:
    net, optimizer = fresh(name, dtype)
    net.load_state_dict(found["net"])
    optimizer.load_state_dict(found["optimizer"])
    return net, optimizer


def by_torch_save(name, dtype, net, optimizer, folder, *, weights_only: bool) -> Trained:
    file = io.BytesIO()
    torch.save(saved(net, optimizer), file)
    file.seek(0)
    return loaded(name, dtype, torch.load(file, weights_only=weights_only))


def by_deepcopy_of_the_state(name, dtype, net, optimizer, folder) -> Trained:
    return loaded(name, dtype, copy.deepcopy(saved(net, optimizer)))


def by_deepcopy_of_the_optimizer(name, dtype, net, optimizer, folder) -> Trained:
    """Together, since the optimizer holds the parameters."""
    return copy.deepcopy((net, optimizer))


def by_torch_save_of_the_optimizer(name, dtype, net, optimizer, folder) -> Trained:
    file = io.BytesIO()
    torch.save((net, optimizer), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_dcp(name, dtype, net, optimizer, folder) -> Trained:
    """torch.distributed.checkpoint writes into the tensors of an optimizer that has its state."""

    def state(net: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {
            "net": get_model_state_dict(net),
            "optimizer": get_optimizer_state_dict(net, optimizer),
        }

    dcp.save(state(net, optimizer), checkpoint_id=folder, no_dist=True)
    other_net, other = fresh(name, dtype)
    found = state(other_net, other)
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(other_net, found["net"])
    set_optimizer_state_dict(other_net, other, found["optimizer"])
    return other_net, other


WAYS: dict[str, Callable[..., Trained]] = {
    "torch.save": functools.partial(by_torch_save, weights_only=False),
    "weights_only": functools.partial(by_torch_save, weights_only=True),
    "deepcopy": by_deepcopy_of_the_state,
    "deepcopy of both": by_deepcopy_of_the_optimizer,
    "torch.save of both": by_torch_save_of_the_optimizer,
    "dcp": by_dcp,
}


@functools.cache
def data(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return list(batches(STEPS, dtype))


@functools.cache
def uninterrupted(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    net = model(dtype)
    optimizer = CONFIGS[name](net.parameters())
    train(net, optimizer, data(dtype))
    return list(net.parameters()), optimizer.state_dict()


def assert_resumes(way: str, name: str, dtype: torch.dtype, before: int, folder: Path) -> None:
    net = model(dtype)
    optimizer = CONFIGS[name](net.parameters())
    train(net, optimizer, data(dtype)[:before])
    kept = copy.deepcopy(saved(net, optimizer))
    net_again, again = WAYS[way](name, dtype, net, optimizer, folder)
    assert_same(saved(net, optimizer), kept)
    assert_same(again.state_dict()["state"], optimizer.state_dict()["state"])
    train(net_again, again, data(dtype)[before:])
    params, state = uninterrupted(name, dtype)
    assert_same(list(net_again.parameters()), params)
    assert_same(again.state_dict()["state"], state["state"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("way", WAYS)
def test_resumed_run_equals_uninterrupted_one(way, name, dtype, tmp_path):
    """Right behind a refresh, with the factors that it used."""
    assert_resumes(way, name, dtype, STEPS // 2, tmp_path)


@pytest.mark.parametrize("before", [1, 5, 6])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("way", ["weights_only", "dcp"])
def test_resumption_within_an_interval(way, name, before, tmp_path):
    assert_resumes(way, name, torch.float32, before, tmp_path)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FEW])
def test_every_setting_resumes_from_dcp(name, tmp_path):
    assert_resumes("dcp", name, torch.float32, 5, tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_that_dcp_has_made_changes_nothing_later(name):
    """It takes a step with gradients of zeros at a learning rate of 0."""
    net = model()
    optimizer = CONFIGS[name](net.parameters())
    optimizer.watch()
    get_optimizer_state_dict(net, optimizer)
    assert len(optimizer.state) == 6
    with pytest.raises(RuntimeError, match="no step has been measured"):
        optimizer.diagnostics()
    made = model()
    early = CONFIGS[name](made.parameters())
    early.init_state()
    assert_same(optimizer.state_dict(), early.state_dict())
    train(net, optimizer, data(torch.float32))
    params, state = uninterrupted(name, torch.float32)
    assert_same(list(net.parameters()), params)
    assert_same(optimizer.state_dict()["state"], state["state"])


@pytest.mark.parametrize("way", ["rate", "gradient", "state"])
@pytest.mark.parametrize("name", FEW)
def test_only_a_step_of_zeros_on_no_state_is_not_counted(name, way):
    net = model()
    optimizer = CONFIGS[name](net.parameters(), lr=1e-3 if way == "rate" else 0.0)
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    if way == "gradient":
        net.hidden.weight.grad[0, 0] = 1.0
    if way == "state":
        optimizer.init_state()
    optimizer.step()
    assert float(optimizer.state[net.out.bias]["step"]) == 1.0


@pytest.mark.parametrize("name", [*FEW, "shampoo_blocks"])
def test_flattened_by_dcp(name):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    net = model()
    optimizer = CONFIGS[name](net.named_parameters())
    train(net, optimizer, data(torch.float32)[:5])
    flat = get_optimizer_state_dict(net, optimizer, options=options)
    other_net, other = model(seed=1), None
    other = CONFIGS[name](other_net.named_parameters())
    set_optimizer_state_dict(other_net, other, flat, options=options)
    assert_same(other.state_dict(), optimizer.state_dict())


def test_lists_of_blocks_in_a_dcp_folder_load_into_dicts(tmp_path):
    """As versions up to 2 wrote them."""
    net = model()
    optimizer = CONFIGS["shampoo_blocks"](net.parameters())
    train(net, optimizer, data(torch.float32)[:5])
    found = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    for state in found["state"].values():
        for key, value in state.items():
            state[key] = list(value.values()) if isinstance(value, dict) else value
    dcp.save({"optimizer": found}, checkpoint_id=tmp_path, no_dist=True)
    other_net, other = fresh("shampoo_blocks", torch.float32)
    again = {"optimizer": get_optimizer_state_dict(other_net, other)}
    dcp.load(again, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other_net, other, again["optimizer"])
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


# Files of every version.


checkpoints = golden("checkpoints")
FILES = sorted(checkpoints.FOLDER.glob("*.pt.gz"))
BACKENDS = [None, "reference"]


@functools.cache
def records(path: Path) -> dict[str, Any]:
    with gzip.open(path) as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


def test_every_optimizer_has_a_file_and_none_is_large():
    assert {path.name.partition("-")[0] for path in FILES} == set(checkpoints.SETTINGS)
    assert all(path.stat().st_size <= 100 * 1024 for path in FILES)


def rebuilt(path: Path, key: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    setting, groups, _ = key.split(", ")
    params = [nn.Parameter(x.clone()) for x in records(path)[key]["params"]]
    make = checkpoints.SETTINGS[path.name.partition("-")[0]][setting]
    return params, checkpoints.build(make, params, groups)


ALL = [(path, key) for path in FILES for key in records(path)]


@pytest.mark.parametrize(("path", "key"), ALL, ids=[f"{p.name[:-6]}: {k}" for p, k in ALL])
def test_an_old_file_loads_exactly_and_goes_on(path, key):
    record = records(path)[key]
    params, optimizer = rebuilt(path, key)
    optimizer.load_state_dict(copy.deepcopy(record["state_dict"]))
    for param, kept in zip(params, record["state"], strict=True):
        # A later version may keep more, and nothing in another form but the blocks of a parameter,
        # which were lists.
        assert_same({name: optimizer.state[param][name] for name in kept}, in_dicts(kept))
    for backend in BACKENDS:
        distances = continued(path, key, backend, load=True)
        assert max(distances) <= 1.0, (backend, distances)


def in_dicts(value: Any) -> Any:
    """Every list as a dict of its numbered members."""
    if isinstance(value, list):
        return {str(i): in_dicts(x) for i, x in enumerate(value)}
    return {k: in_dicts(x) for k, x in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name[:-6])
def test_a_file_that_is_not_loaded_would_be_noticed(path):
    assert max(continued(path, "default, one list, float32", None, load=False)) > 4.0


def continued(path: Path, key: str, backend: str | None, *, load: bool) -> list[float]:
    """How far each parameter ends from where the file says, as a part of what is allowed.

    Bits differ between processors. Allowed are 2% of the way, or 20% of that of a matrix whose
    update is made of bfloat16 products, and the roundings of a 16-bit parameter at three steps.
    """
    record = records(path)[key]
    params, optimizer = rebuilt(path, key)
    if load:
        optimizer.load_state_dict(copy.deepcopy(record["state_dict"]))
    with sk.use_backend(backend or "auto"):
        checkpoints.go_on(optimizer, params, record["grads"])
    part = 0.2 if path.name.startswith(("muon", "deva")) else 0.02
    found = []
    for param, start, end in zip(params, record["params"], record["after"], strict=True):
        way = float((end.double() - start.double()).norm())
        rounding = checkpoints.AFTER * torch.finfo(param.dtype).eps * float(start.double().norm())
        found.append(
            float((param.detach().double() - end.double()).norm()) / (part * way + rounding)
        )
    return found

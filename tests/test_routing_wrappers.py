"""Models within wrappers have the groups that they have without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import with_grads
from support.states import assert_same, snapshot
from test_routing import TABLE, is_adamw, linear, marked, own, tree
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

pytestmark = pytest.mark.usefixtures("one_thread")


# Wrappers.


class Outer(nn.Module):
    """A module around a model, as a loop of one's own or Lightning has it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class PeftModel(nn.Module):
    """The two layers that PEFT puts around a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.base_model = BaseTuner()
        self.base_model.model = net


class BaseTuner(nn.Module):
    """Holds the model."""


def recomputed(net: nn.Module) -> nn.Module:
    for name, child in list(net.named_children()):
        setattr(net, name, checkpoint_wrapper(child))
    return checkpoint_wrapper(net)


@pytest.fixture
def one_process(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": torch.compile,
    "data-parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "distributed, compiled": lambda net: torch.compile(nn.parallel.DistributedDataParallel(net)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "recomputed": recomputed,
    "peft": PeftModel,
    "peft, distributed": lambda net: nn.parallel.DistributedDataParallel(PeftModel(net)),
}


def described(net: nn.Module) -> list[Any]:
    groups = sk.optim.param_groups(net, verbose=False)
    return [
        {key: [name for name, _ in value] if key == "params" else value for key, value in g.items()}
        for g in groups
    ]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["llama", "bert, untied", "mixtral", "actor and critic", "t5"])
def test_wrapped_models_have_the_same_groups(name, wrapper):
    make = TABLE[name][0]
    assert described(WRAPPERS[wrapper](make())) == described(make())


@pytest.mark.parametrize("name", TABLE)
def test_a_module_around_a_model_changes_no_role(name):
    make, expected = TABLE[name]
    net = make()
    found = {each.replace("net.", "", 1) for each in marked(Outer(net))}
    assert found == expected
    # Beside something else, such as a loss with weights, names and words still tell.
    wider = Outer(net)
    wider.loss = own("Loss", scale=(1,))
    known = (
        "proj_out",
        "projection",
        "policy",
        "value",
        "4",
        "last",
        "fc",
        "final",
        "top",
        "token_t",
    )
    lost = expected - {each.replace("net.", "", 1) for each in marked(wider)}
    assert all(each.endswith(known) for each in lost), lost


@pytest.mark.usefixtures("one_process")
def test_a_run_goes_on_within_and_without_wrappers(make_few):
    def start() -> nn.Module:
        torch.manual_seed(0)
        return TABLE["bert, untied"][0]()

    def go(net: nn.Module, optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            with_grads(net.parameters(), seed)
            optimizer.step()

    plain, wrapped = start(), nn.parallel.DistributedDataParallel(start())
    mine, theirs = (make_few(sk.optim.param_groups(net, verbose=False)) for net in (plain, wrapped))
    go(plain, mine, range(2))
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    wrapped.module.load_state_dict(plain.state_dict())
    go(plain, mine, range(2, 4))
    go(wrapped, theirs, range(2, 4))
    assert_same(snapshot(mine), snapshot(theirs))


def test_an_override_may_name_a_wrapped_parameter_either_way():
    net = nn.DataParallel(TABLE["llama"][0]())
    for pattern in ("module.*.q_proj.*", "model.*.q_proj.*"):
        groups = sk.optim.param_groups(net, overrides={pattern: "adamw"}, verbose=False)
        assert "model.layers.0.self_attn.q_proj.weight" in dict(groups[-1]["params"])


def test_names_stay_apart():
    """A wrapper's own parameters may be called as those of what it wraps."""
    net = PeftModel(tree({"extra": linear(), "top": linear(3)}))
    net.extra = linear()
    names = {
        name for group in sk.optim.param_groups(net, verbose=False) for name, _ in group["params"]
    }
    assert names == {name for name, _ in net.named_parameters()}


# Single questions.


def test_kernels_and_depthwise_convolutions():
    net = tree({"a": nn.Conv1d(4, 6, 3), "b": nn.ConvTranspose1d(4, 6, 3), "c": nn.Linear(6, 3)})
    (kernels, rest) = sk.optim.param_groups(net, matrix={"lr": 0.5}, verbose=False)
    assert [name for name, _ in kernels["params"]] == ["a.weight", "b.weight"]
    assert kernels["matrix_dims"] == ((0,), (1, 2)) and kernels["lr"] == 0.5
    weight = net.a.weight
    twin = nn.Parameter(weight.detach().flatten(1).clone())
    mine, theirs = sk.optim.Muon([kernels, rest]), sk.optim.Muon([{"params": [twin], "lr": 0.5}])
    with_grads([weight])
    twin.grad = weight.grad.flatten(1)
    mine.step()
    theirs.step()
    assert torch.equal(weight.flatten(1), twin)
    assert sk.optim.param_groups(net, overrides={"a.weight": "matrix"}, verbose=False)
    for dims, conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        assert marked(tree({"x": conv(8, 16, 3, groups=8), "y": linear(3)})) == {"x", "y"}, dims


def test_old_style_weight_norm_has_gains():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(linear())
    net = tree({"blocks.0.fc": layer, "top": linear(3)})
    assert marked(net) == {"blocks.0.fc.weight_g", "top"}
    assert is_adamw(sk.optim.Muon(net.named_parameters()), layer.weight_g)


def test_lazy_modules_are_asked_for_a_run():
    with pytest.raises(TypeError, match=r"0\.weight has no shape yet"):
        sk.optim.param_groups(nn.Sequential(nn.LazyLinear(3)))

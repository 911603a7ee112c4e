"""Steps that do not wait for a card, and what a CUDA graph may record of them."""

from __future__ import annotations

import random

import pytest
import spectral_kernels as sk
import torch
from pretended_card import card
from spectral_kernels import _backend, _cuda
from spectral_kernels.optim import _adamw
from spectral_kernels.optim._schedule import Counts, due
from support.optimizers import CONFIGS, FEW
from torch import nn

WAITS = "aten._local_scalar_dense"


class Pretended(torch.Tensor):
    """A tensor that says that it is on a card."""

    device = torch.device("cuda")


@pytest.mark.parametrize("at_first", [False, True])
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("skipping", [0.0, 0.3, 0.9])
def test_the_host_knows_when_roots_are_due(skipping, stagger, at_first):
    """As if it read every count at every step, whatever was skipped."""
    dice = random.Random(0)
    plain = [torch.zeros(()), torch.zeros(3), torch.zeros(()), torch.zeros(0)]
    pretended = [x.as_subclass(Pretended) for x in plain]
    offsets, known, reads = [0, 1, 5, 2], Counts(), []
    read = known.read
    known.read = lambda counts: (reads.extend(counts), read(counts))
    in_vain = 0
    for step in range(120):
        frequency = 1 if 60 <= step < 70 else 7
        options = {"stagger": stagger, "at_first": at_first}
        expected = due(plain, offsets, frequency, Counts(), **options)
        reads.clear()
        assert due(pretended, offsets, frequency, known, **options) == expected, step
        in_vain += bool(reads) and not any(expected)
        for count in plain:
            if dice.random() >= skipping:
                count += 1
        if frequency > 1:
            read([x for x, flag in zip(pretended, expected, strict=True) if flag and x.numel()])
    if skipping == 0.0:
        # The first look, and that after the steps without.
        assert in_vain <= 2


def matrices(count=2):
    params = [nn.Parameter(torch.zeros(6, 5 + i, device="cuda")) for i in range(count)]
    params.append(nn.Parameter(torch.zeros(5, device="cuda")))
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(_cuda, "elsewhere", lambda *_: None)
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **options: None)
    with card(monkeypatch) as calls:
        yield calls


def made(name, params, **options):
    if name != "muon":
        options = {"precondition_frequency": 10, "stagger": False, **options}
    return CONFIGS[name].func(params, **options)


def known(optimizer, taken):
    """As if the host had read every count."""
    optimizer.init_state()
    for state in optimizer.state.values():
        optimizer._counts.learn(state["step"], taken)
        for failed in state.get("root_failures", {}).values():
            optimizer._known_failures[id(failed)] = failed, False


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_a_step_between_refreshes_waits_for_nothing(name, capturable, nonfinite, pretended):
    params = matrices()
    if nonfinite == "propagate" and not capturable:
        params.pop()  # torch counts AdamW's steps on the host then
    optimizer = made(name, params, capturable=capturable, nonfinite=nonfinite)
    known(optimizer, 1)
    for _ in range(8):
        optimizer.step()
    assert len(pretended) == 8
    if name != "muon":
        assert not any(any(options["refresh"]) for *_, options in pretended)
        with pytest.raises(Exception, match=WAITS):
            optimizer.step()  # the tenth


def test_a_group_that_refreshes_at_every_step_lets_others_be_known(pretended):
    groups = [
        {"params": matrices(1)[:1], "precondition_frequency": frequency} for frequency in (1, 10)
    ]
    optimizer = CONFIGS["soap"].func(groups)
    known(optimizer, 1)
    for _ in range(3):
        optimizer.step()


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_what_a_graph_records_counts_on_the_card(nonfinite, pretended, monkeypatch):
    called = []
    monkeypatch.setattr(_adamw, "torch_adamw", lambda *args, **options: called.append(options))
    params = matrices()
    lr = torch.zeros((), device="cuda")
    optimizer = made("muon", params, lr=lr, capturable=True, nonfinite=nonfinite)
    optimizer.init_state()
    recorded(optimizer, monkeypatch)
    assert optimizer.state[params[-1]]["step"].is_cuda
    assert [args[-1] is lr for _, args, _ in pretended] == [True]
    assert [options["capturable"] for options in called] == [True] * (nonfinite == "propagate")


def recorded(optimizer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_backend, "is_capturing", lambda: True)
        optimizer.step()


def on_cpu(name="muon", **options):
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))]
    for param in params:
        param.grad = torch.ones_like(param)
    return made(name, params, **options)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("muon", {}, "capturable=False"),
        ("muon", {"nonfinite": "raise"}, "nonfinite='raise'"),
        ("muon", {"lr": torch.tensor(0.1)}, r"lr of param_groups\[0\] is a tensor on the CPU"),
        ("soap", {"precondition_frequency": 1}, "is due for new roots or bases"),
        ("shampoo", {}, "is due for new roots or bases"),
    ],
)
def test_what_a_graph_could_not_repeat_is_refused(name, options, match, monkeypatch):
    optimizer = on_cpu(name, **{"capturable": bool(options) or name != "muon", **options})
    optimizer.init_state()
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(RuntimeError, match=match):
        recorded(optimizer, monkeypatch)
    after = optimizer.param_groups[0]["params"]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_state_is_made_before_a_graph(monkeypatch):
    optimizer = on_cpu(capturable=True)
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] has no state yet"):
        recorded(optimizer, monkeypatch)
    optimizer.init_state()
    recorded(optimizer, monkeypatch)


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_counts_and_failures_are_read_before_a_graph(name, pretended, monkeypatch):
    optimizer = made(name, matrices(), capturable=True)
    optimizer.init_state()
    with pytest.raises(RuntimeError, match="take a step outside of the graph before"):
        recorded(optimizer, monkeypatch)


def test_what_a_replay_counted_is_read(pretended, monkeypatch):
    """The host has not seen how often a graph was replayed."""
    optimizer = made("soap", matrices(1), capturable=True)
    known(optimizer, 1)
    recorded(optimizer, monkeypatch)
    with pytest.raises(Exception, match=WAITS):
        optimizer.step()


def test_capturable_is_saved_and_absent_in_earlier_files():
    optimizer = on_cpu(capturable=True)
    optimizer.step()
    saved = optimizer.state_dict()
    for expected in (True, False):
        other = on_cpu()
        other.load_state_dict(saved)
        assert other.param_groups[0]["capturable"] is expected
        other.step()
        saved["param_groups"][0].pop("capturable", None)
    with pytest.raises(TypeError, match="capturable must be True or False"):
        on_cpu(capturable=1.0)


def test_the_roots_of_all_blocks_are_judged_by_one_look(monkeypatch):
    """On a card every look is a wait."""
    param = nn.Parameter(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
    param.grad = param.detach().clone()
    optimizer = sk.optim.Shampoo([param], block_size=4, stagger=False)
    looks, look = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (looks.append(x), look(x))[1])
    optimizer.step()
    assert len(optimizer.state[param]["left"]) == 9
    assert len(looks) == 1


def test_counts_that_are_gone_are_not_kept():
    """A plan that is made anew has views of its own."""
    known = Counts()
    for _ in range(3):
        counts = [x.as_subclass(Pretended) for x in torch.zeros(4)]
        due(counts, [0] * 4, 10, known, stagger=False)
    assert len(known) == 4

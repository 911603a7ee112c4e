"""Benchmarks over ranks, peers, and the example that trains."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import readme_tables
import spectral_kernels as sk  # noqa: E402
import torch
from rich.console import Console  # noqa: E402
from spectral_kernels import cli  # noqa: E402
from spectral_kernels.benchmarks import (  # noqa: E402
    demo,
    distributed,
    distributed_costs,
    distributed_ranks,
    peers,
    plots,
    run,
    steps,
)
from test_benchmarks import rendered, training

pytestmark = pytest.mark.usefixtures("without_peers")


def test_costs_over_ranks_are_those_of_the_committed_page():
    path = Path(distributed_costs.__file__).parent / "results" / "distributed_costs.md"
    assert distributed_costs.page() == path.read_text()


def test_what_a_step_over_two_ranks_is_predicted_to_take():
    shapes = ((8, 6), (5, 4), (5, 4))
    layout = distributed_costs.Layout(1, 2)
    (bucket,) = distributed_costs.planned("muon", shapes, layout)
    # The largest to one rank, the others to the second; of 5 rows the first rank holds 3.
    assert [dict(own) for own in bucket.owned] == [{(8, 6): 1}, {(5, 4): 2}]
    held = 24 + 2 * 12, 24 + 2 * 8
    assert bucket.held.tolist() == list(held)
    assert [each.tolist() for each in bucket.sent] == [[24, 24], [24, 24]]
    assert [each.tolist() for each in bucket.received] == [[24, 24], [24, 24]]
    assert distributed_costs.moved([bucket]).tolist() == [24 * 12, 24 * 12]

    def exchange(most: float, ranks: int) -> float:
        return 1.0 + most

    costs = distributed_costs.Costs(
        step=lambda shape: {(8, 6): 100.0, (5, 4): 70.0}[shape],
        pieces=exchange,
        everyone=exchange,
        copied=0.5,
        begin=7.0,
    )
    found = distributed_costs.predicted([bucket], layout, costs)
    assert (found.computing, found.mean) == (140.0, 120.0)
    assert found.exchanging == (1.0 + 24 * 8) + (1.0 + 24 * 4)
    # Rank 0 copies 48 elements of 8 bytes and 48 of 4, rank 1 40 of 8 and 40 of 4.
    busy = max(100.0 + 0.5 * (48 * 8 + 48 * 4), 140.0 + 0.5 * (40 * 8 + 40 * 4))
    assert found.total == 7.0 + busy + found.exchanging
    narrow = dataclasses.replace(costs, cores=1)
    both = 240.0 + 0.5 * 88 * 12
    assert distributed_costs.predicted([bucket], layout, narrow).total == (
        7.0 + both + found.exchanging
    )
    # What comes from the other rank, 24 elements each, is where it belongs.
    in_place = dataclasses.replace(costs, in_place=True)
    busy_there = max(100.0 + 0.5 * (24 * 8 + 48 * 4), 140.0 + 0.5 * (16 * 8 + 40 * 4))
    assert distributed_costs.predicted([bucket], layout, in_place).total == (
        7.0 + busy_there + found.exchanging
    )
    hidden = dataclasses.replace(costs, hidden=0.5)
    assert distributed_costs.predicted([bucket], layout, hidden).total == (
        7.0 + busy + found.exchanging - 0.5 * min(busy, found.exchanging)
    )
    # Where all hold all, each sends what it owns and gets as much as the fullest has.
    (bucket,) = distributed_costs.planned("muon", shapes, distributed_costs.Layout(2, 1))
    assert [each.tolist() for each in bucket.received] == [[0, 0], [48, 48]]
    assert distributed_costs.replicated(shapes, 2, narrow).total == 7.0 + 2 * 240.0


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("algorithm", list(distributed_costs.ALGORITHMS))
def test_state_is_spread_as_the_work_is(algorithm, ranks):
    """No rank has more than its share of GPT-2's state and that of one matrix."""
    shapes = distributed_costs.GPT2.matrices
    layout = distributed_costs.Layout(1, ranks)
    held = [
        sum(
            count * distributed_costs.state_bytes(algorithm, shape)
            for bucket in distributed_costs.planned(algorithm, shapes, layout)
            for shape, count in bucket.owned[rank].items()
        )
        for rank in range(ranks)
    ]
    each = [distributed_costs.state_bytes(algorithm, shape) for shape in shapes]
    assert sum(held) == sum(each)
    assert max(held) <= sum(each) / ranks + max(each)


def test_replicas_send_on_what_they_were_given():
    layout = distributed_costs.Layout(2, 2)
    (bucket,) = distributed_costs.planned("muon", ((4, 6),) * 4, layout)
    # Half of every matrix comes from the other rank of the owner's replica, and goes to all.
    assert bucket.sent[0].tolist() == [12] * 4 and bucket.received[0].tolist() == [12] * 4
    assert bucket.sent[1].tolist() == [36] * 4 and bucket.received[1].tolist() == [36] * 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--ranks", "0"], "--ranks must be like 1,2,4"),
        (["--ranks", "2,x"], "--ranks must be like 1,2,4"),
        (["--ranks", "16"], "at most 8 processes"),
        (["--ranks", "2", "--op", "gram"], "--ranks takes --op of muon_step_"),
        (["--ranks", "2", "--acceptance"], "--ranks takes --quick, not --acceptance"),
    ],
)
def test_ranks_that_make_no_sense(arguments, words, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def found_alone(ranks, campaign):
    """What one rank might have measured."""
    assert ranks == 1 and campaign.shapes == {"muon": ((24, 16), (16, 24))}
    assert campaign.budget == run.QUICK_BUDGET
    found = distributed_ranks.Found(copied=(1e-9, 1e-9))
    for name, took in (("replicated", 4.0), ("ddp", 6.0)):
        found.steps["muon", name] = [(took, took / 2)] * 3
        found.begin["muon", name] = [(1.0, 0.5)] * 3
    cost = distributed_costs.cost("muon", (24, 16), rates=distributed._here()).flops
    found.loads["muon", "ddp"] = [2 * cost], 0
    found.matrices = {("muon", shape): 2.0 for shape in campaign.shapes["muon"]}
    found.pieces = found.everyone = [(0, (0.5, 0.25)), (0, (0.75, 0.5))]
    return [found]


@pytest.mark.parametrize(
    "processes", [found_alone, pytest.param(distributed_ranks.run, marks=pytest.mark.long)]
)
def test_steps_of_one_process_are_predicted_and_measured(tmp_path, monkeypatch, capsys, processes):
    monkeypatch.setattr(run, "QUICK_BUDGET", 0.01)
    monkeypatch.setattr(distributed, "run_ranks", processes)
    path = tmp_path / "ranks.json"
    shapes = ["--op", "muon_step_", "--shape", "24x16+16x24"]
    assert cli.main(["bench", "--ranks", "1", "--quick", *shapes, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "errors of 2 predictions" in printed and "On paper" in printed
    rows = run.read(path)["rows"]
    assert [row["key"] for row in rows] == ["muon replicated 1", "muon ddp 1"]
    for row in rows:
        assert row["failure"] is None and row["predicted_s"] > 0.0
        assert row["error"] == row["predicted_s"] / row["median_s"] - 1.0
    if processes is found_alone:
        assert [row["predicted_s"] for row in rows] == [5.0, pytest.approx(5.0, abs=1e-4)]
        assert [row["of_replicated"] for row in rows] == [1.0, 1.5]
        assert [row["cpu_s"] for row in rows] == [2.0, 3.0]
        assert rows[0]["cpu_predicted_s"] == 4.5 and rows[0]["cpu_error"] == 1.25
        text = "<!-- table ranks.json -->\n<!-- end table -->\n"
        table = readme_tables.rewritten(text, tmp_path)
        assert "| muon replicated | 1 | 4.00 s |  | 5.00 s | +25% | +125% |" in table
        assert "| muon ddp | 1 | 6.00 s | 1.50 | 5.00 s | -17% |" in table
        assert "Errors of 2 predictions: 21% on average, 25% at worst; NOT within 15%" in table
    assert distributed.summary([{**rows[1], "error": 0.4}])[0].endswith("NOT within 15% and 30%")


@pytest.mark.parametrize("period, rounds", [(1, 40), (10, 6), (100, 5)])
def test_rounds_of_whole_periods_keep_to_their_budget(monkeypatch, period, rounds):
    calls = []
    monkeypatch.setattr(distributed_ranks.dist, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(distributed_ranks, "_one_round", lambda *_: (0.05, 0.05))
    steps_ = {"one": lambda: calls.append("one"), "other": lambda: calls.append("other")}
    # A period of both takes a second where it has ten steps.
    found = distributed_ranks._rounds(steps_, period, 6.0)
    assert calls == ["one", "other"]
    assert {name: len(times) for name, times in found.items()} == {"one": rounds, "other": rounds}


def test_peers_are_found_where_they_are_pointed_at(tmp_path):
    (tmp_path / "soap.py").write_text("class SOAP: pass\n")
    assert peers.find("soap") is None
    before = list(sys.path)
    peers.point([f"soap={tmp_path}"])
    try:
        assert peers.find("soap").SOAP.__name__ == "SOAP"
        assert peers.versions()["soap"] == "a checkout"
    finally:
        sys.modules.pop("soap", None)
        peers._paths.clear()
    assert sys.path == before


def test_a_peer_that_lacks_a_requirement_says_so(tmp_path):
    (tmp_path / "soap.py").write_text("import something_that_is_not_installed\n")
    peers.point([f"soap={tmp_path}"])
    try:
        with pytest.raises(ModuleNotFoundError, match="something_that_is_not_installed"):
            peers.find("soap")
    finally:
        peers._paths.clear()


def test_the_closing_table():
    results = [training(one.name) for one in demo.RUNS]
    results[2]["optimizer_seconds"] = [0.005] * 30
    results[3]["held_back_loss"] = 3.6
    text = rendered(demo.closing_table(results))
    assert "4.00x" in text  # the first step does not count
    assert [line.split("  ")[1] for line in text.splitlines() if "our" in line] == [
        "our Muon",
        "our Shampoo",
        "our SOAP",
        "our DeVA",
    ]
    assert demo.verdict(results) == [
        "swap_in moves the held-back loss by 0.0000, another seed by 0.1000"
    ]


@pytest.fixture(scope="module")
def char_gpt() -> types.ModuleType:
    module = demo.load_example()
    module.WIDTH, module.LAYERS, module.BATCH, module.CONTEXT = 32, 1, 4, 16
    return module


def test_the_example_trains_with_every_optimizer(char_gpt):
    text = char_gpt.Text.load()
    first = {}
    for name in char_gpt.OPTIMIZERS:
        history = char_gpt.train(name, text, 4)
        assert len(history.losses) == len(history.seconds) == len(history.optimizer_seconds) == 4
        assert math.isfinite(history.held_back_loss)
        first[name] = history.losses[0]
    assert len(set(first.values())) == 1  # one seed, one start
    with pytest.raises(ValueError, match="must be one of adamw"):
        char_gpt.make_optimizers("sgd", char_gpt.CharGPT(8))


def test_counters_of_failures_fail_the_example_and_the_benchmark(char_gpt):
    """A step that was left out costs nothing and trains nothing."""
    param = torch.nn.Parameter(torch.ones(3, 4))
    optimizers = [torch.optim.SGD([param], lr=0.1), sk.optim.Shampoo([param])]
    param.grad = torch.ones(3, 4)
    optimizers[1].step()
    assert char_gpt.failures(optimizers) == ""
    param.grad = torch.full((3, 4), torch.nan)
    optimizers[1].step()
    assert char_gpt.failures(optimizers) == "Shampoo: skipped is 1"
    eye = torch.eye(3, dtype=torch.float64)
    for value, fails in ((1.0, False), (torch.nan, True)):
        begin = steps.Start([eye], [[value * eye]], [(eye, eye)], [(eye, eye)], [eye])
        training = steps.Training(begin, torch.float32, lambda p: sk.optim.Muon(p, lr=0.1))
        with pytest.raises(RuntimeError, match="Muon: skipped is 1") if fails else nullcontext():
            training.moved(1)


def test_the_example_learns(char_gpt):
    losses = char_gpt.train("muon", char_gpt.Text.load(), 60).losses
    assert sum(losses[-5:]) / 5 < losses[0] - 0.4


def test_trainings_take_turns_and_are_what_they_are_alone(char_gpt, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "STRETCH", 2)
    assert demo._training(char_gpt, 3, Console(file=io.StringIO()), tmp_path) == []
    record = json.loads((tmp_path / "demo-training.json").read_text())
    runs = dict(zip(demo.RUNS, record["runs"], strict=True))
    assert all(len(run["losses"]) == len(run["seconds"]) == 3 for run in runs.values())
    assert all(b > a for run in runs.values() for a, b in itertools.pairwise(run["seconds"]))
    assert 0.0 <= record["others_load"] <= 1.0
    text = char_gpt.Text.load()
    for one in (demo.RUNS[1], demo.RUNS[-1]):
        alone = char_gpt.train(one.optimizer, text, 3, one.seed)
        assert runs[one]["losses"] == alone.losses

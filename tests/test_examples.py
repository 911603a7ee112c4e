"""The examples run, at a size of seconds, and say what they worked on."""

from __future__ import annotations

import csv
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = (
    "first_steps",
    "shared",
    "shared.workload",
    "digits",
    "moe",
    "matrix_problem",
    "trace_quadratic",
    "char_gpt",
    "characters",
    "shared.orthogonality",
    "step_cost",
    "papers",
)


@pytest.fixture(autouse=True)
def importable() -> Iterator[None]:
    """As `python examples/x.py` finds its neighbours."""
    torch.set_num_threads(1)
    path = list(sys.path)
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path[:] = path
    for name in NAMES:
        sys.modules.pop(name, None)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_first_steps(capsys: pytest.CaptureFixture[str]) -> None:
    load("first_steps")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-6:]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("task", ["mlp", "conv", "autoencoder"])
def test_digits(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    digits = load("digits")
    digits.run(["--task", task, "--steps", "4", "--output", str(tmp_path), "--diagnostics", "2"])
    name = digits.TASKS[task].name
    record = json.loads((tmp_path / f"{name}.json").read_text())
    printed = capsys.readouterr().out
    assert record["sha256"] in printed
    assert set(record["runs"]) == {"AdamW", "Muon", "Shampoo 1/2", "SOAP", "DeVA"}
    assert all(len(run["losses"]) == 4 for run in record["runs"].values())
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    with (tmp_path / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == set(record["runs"]) - {"AdamW"}
    assert {row["step"] for row in rows} == {"2", "4"}
    assert all(float(row["update_rms"]) > 0 for row in rows if row["algorithm"] == "matrix")


def test_training_learns() -> None:
    pytest.importorskip("sklearn")
    workload, digits = load("shared.workload"), load("digits")
    task = digits.Perceptron()
    for name in ("adamw", "muon", "kl-shampoo", "deva"):
        history = workload.train(task, name, steps=40)
        assert history.score < 0.75 * history.losses[0], name


def test_experts_are_batches_of_matrices(tmp_path: Path) -> None:
    moe, workload = load("moe"), load("shared.workload")
    moe.main(moe.MixtureOfExperts(), ["--steps", "3", "--output", str(tmp_path)])
    task = moe.MixtureOfExperts()
    model = task.model()
    chosen = workload.optimizer("muon", task, model)
    matrices = next(g for g in chosen.param_groups if g["algorithm"] == "matrix")
    assert matrices["batched"]
    assert set(matrices["param_names"]) == {"mix.weight", "experts.up", "experts.down"}
    task.loss(model, torch.Generator().manual_seed(0)).backward()
    chosen.step()
    assert chosen.state[model.experts.up]["step"].shape == (moe.EXPERTS,)


def test_characters(tmp_path: Path) -> None:
    characters = load("characters")
    short = ["--optimizers", "muon,kl-shampoo", "--steps", "2", "--output", str(tmp_path)]
    characters.main(characters.Characters(), short)
    runs = json.loads((tmp_path / "char-gpt.json").read_text())["runs"]
    assert set(runs) == {"Muon", "KL-Shampoo"}
    assert (tmp_path / "char-gpt.png").exists()


def test_matrix_problem_has_its_optimum() -> None:
    problem, workload = load("matrix_problem"), load("shared.workload")
    task = problem.MatrixProblem()
    model = task.model()
    with torch.no_grad():
        model.weight.copy_(task.optimum)
    loss = task.loss(model, torch.Generator())
    loss.backward()
    assert loss == 0 and not model.weight.grad.any()
    with torch.no_grad():
        assert task.evaluate(model) == 0
    history = workload.train(task, "kl-shampoo", steps=60, lr=0.1)
    assert history.score < 0.95


def test_trace_quadratic(tmp_path: Path) -> None:
    quadratic = load("trace_quadratic")
    problem = quadratic.Problem("heterogeneous", 2)
    expected = torch.tensor([1, 2, 3, 99, 100, 101, 4998, 4999, 5000], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(problem.h), expected.expand(2, -1))
    assert not torch.equal(problem.h[0], problem.h[1])
    torch.testing.assert_close(problem.root @ problem.root, problem.h)
    x = problem.start
    torch.testing.assert_close(
        problem.excess(x), 0.5 * (x.mT @ problem.h @ x).diagonal(0, 1, 2).sum(-1)
    )
    # All rows at once are the whole problem: 2 f = |root X|^2.
    torch.testing.assert_close((problem.root @ x).square().sum((1, 2)), 2 * problem.excess(x))
    # One seed among others is as it is alone: seeds are a batch of matrices.
    few = ["--steps", "30", "--seeds", "3", "--hessian", "homogeneous", "--output", str(tmp_path)]
    found = quadratic.main(few)
    assert all(bool(excess.isfinite().all()) for excess in found["homogeneous"].values())
    assert (tmp_path / "trace-quadratic.png").exists()


def test_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    papers, orthogonality = load("papers"), load("shared.orthogonality")
    some = {name: orthogonality.VARIANTS[name] for name in ("gradient", "Muon", "Shampoo 1/2")}
    monkeypatch.setattr(orthogonality, "VARIANTS", some)
    arguments = ["--tasks", "digits-mlp", "--optimizers", "muon,deva", "--trials", "2"]
    arguments += ["--seeds", "2", "--scale", "0.02", "--output", str(tmp_path)]
    papers.main([*arguments, "--runs", str(tmp_path / "runs")])
    tables = (tmp_path / "tables.md").read_text()
    for title in ("## digits-mlp", "semi-orthogonality", "DeVA's step", "## Trace quadratic"):
        assert title in tables
    entry = json.loads((tmp_path / "papers.json").read_text())["tasks"]["digits-mlp"]["Muon"]
    assert len(entry["tuning"]) == 2 and len(entry["runs"]) == 2
    best = min(entry["tuning"], key=entry["tuning"].get)
    assert float(best) == pytest.approx(entry["lr"])
    for figure in ("digits-mlp", "digits-mlp-orthogonality", "trace-quadratic"):
        assert (tmp_path / f"{figure}.png").exists()
    # What has been run is not run again.
    monkeypatch.setattr(papers, "train", None)
    monkeypatch.setattr(orthogonality, "train", None)
    papers.main([*arguments, "--runs", str(tmp_path / "runs")])
    assert (tmp_path / "tables.md").read_text() == tables


@pytest.mark.parametrize("optimum", [0.05, 0.9, 1.4, 20.0])
def test_search_brackets_the_best_rate(optimum: float) -> None:
    pytest.importorskip("sklearn")
    papers = load("papers")
    found = papers.search(1.0, 9, lambda lr: abs(math.log(lr / optimum)))
    best = min(found, key=found.__getitem__)
    assert len(found) == 9 and list(found) == sorted(found)
    assert best / 2 < optimum < 2 * best and not papers.at_edge(found)


def test_search_leaves_divergence_behind() -> None:
    pytest.importorskip("sklearn")
    papers = load("papers")
    found = papers.search(1.0, 5, lambda lr: math.nan if lr > 0.3 else -lr)
    assert min(found, key=found.__getitem__) == 0.25


def test_isotropy_error() -> None:
    orthogonality = load("shared.orthogonality")
    eye = torch.eye(4, dtype=torch.float64)
    assert orthogonality.isotropy_error(3.0 * eye) == pytest.approx(0.0)
    one = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert orthogonality.isotropy_error(one) == pytest.approx(3**0.5)


def test_seconds_are_medians_over_seeds() -> None:
    workload = load("shared.workload")
    histories = [workload.History(step_seconds=[1.0, x]) for x in (2.0, 3.0, 99.0)]
    assert workload.seconds(histories) == [1.0, 4.0]

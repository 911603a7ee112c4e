"""The examples run, at a size of seconds, and say what they worked on."""

from __future__ import annotations

import csv
import importlib
import json
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
    "workload",
    "digits",
    "moe",
    "matrix_problem",
    "trace_quadratic",
    "char_gpt",
    "characters",
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
    workload, digits = load("workload"), load("digits")
    task = digits.Perceptron()
    for name in ("adamw", "muon", "kl-shampoo", "deva"):
        history = workload.train(task, name, steps=40)
        assert history.score < 0.75 * history.losses[0], name


def test_experts_are_batches_of_matrices(tmp_path: Path) -> None:
    moe, workload = load("moe"), load("workload")
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
    problem, workload = load("matrix_problem"), load("workload")
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
    problem = quadratic.Problem("heterogeneous")
    eigenvalues = torch.linalg.eigvalsh(problem.h)
    expected = torch.tensor([1, 2, 3, 99, 100, 101, 4998, 4999, 5000], dtype=torch.float64)
    torch.testing.assert_close(eigenvalues, expected)
    assert float(problem.excess(problem.optimum[None])) == 0
    x = torch.randn(1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = 0.5 * (x[0] * (problem.h @ x[0])).sum() + (problem.b * x[0]).sum()
    low = 0.5 * (problem.optimum * problem.b).sum()
    torch.testing.assert_close(problem.excess(x)[0], value - low)
    # One seed among others is as it is alone: seeds are a batch of matrices.
    few = ["--steps", "30", "--seeds", "3", "--hessian", "homogeneous", "--output", str(tmp_path)]
    found = quadratic.main(few)
    assert all(bool(excess.isfinite().all()) for excess in found["homogeneous"].values())
    assert (tmp_path / "trace-quadratic.png").exists()


def test_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    papers = load("papers")
    some = {name: papers.VARIANTS[name] for name in ("Muon", "Shampoo 1/2")}
    monkeypatch.setattr(papers, "VARIANTS", some)
    arguments = ["--tasks", "digits-mlp", "--optimizers", "muon,deva", "--trials", "2"]
    papers.main([*arguments, "--seeds", "2", "--scale", "0.02", "--output", str(tmp_path)])
    tables = (tmp_path / "tables.md").read_text()
    for title in ("## digits-mlp", "semi-orthogonality", "## Trace quadratic"):
        assert title in tables
    record = json.loads((tmp_path / "papers.json").read_text())
    entry = record["tasks"]["digits-mlp"]["optimizers"]["Muon"]
    assert len(entry["tuning"]) == 2 and len(entry["runs"]) == 2
    best = min(entry["tuning"], key=entry["tuning"].get)
    assert float(best) == pytest.approx(entry["lr"])
    for figure in ("digits-mlp", "digits-mlp-orthogonality", "trace-quadratic"):
        assert (tmp_path / f"{figure}.png").exists()


def test_learning_rates_are_a_factor_of_two_apart() -> None:
    pytest.importorskip("sklearn")
    assert load("papers").rates(1.0, 5) == [0.25, 0.5, 1.0, 2.0, 4.0]


def test_isotropy_error() -> None:
    pytest.importorskip("sklearn")
    papers = load("papers")
    assert papers.isotropy_error(3.0 * torch.eye(4, dtype=torch.float64)) == pytest.approx(0.0)
    one = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert papers.isotropy_error(one) == pytest.approx(3**0.5)

"""The two papers' claims at laptop scale: tuned fairly, several seeds, tables and figures.

    python examples/papers.py
    python examples/papers.py --tasks digits-mlp --trials 2 --seeds 1 --scale 0.05

For every task and optimizer the learning rate is searched with the same number of trials on a seed
of its own; the best is run with the other seeds. Then the time average of U U^T is measured for
Muon, Shampoo and KL-Shampoo, and how betas, ridge and exponent move it; and DeVA's figure 2 is
drawn again.

With SPECTRAL_KERNELS_PEERS as in step_cost.py DeVA's public code is timed too.

One thread; seconds are the process' CPU time, so that other work on the machine counts little.
Finished runs are kept under --runs and not run again: delete that folder to start anew.

Source of the claims: arXiv 2602.06880 (DeVA), arXiv 2602.09314 (Clarifying Shampoo).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import step_cost
import torch
import trace_quadratic
from characters import Characters
from digits import Autoencoder, Convolutional, Perceptron
from matrix_problem import MatrixProblem
from moe import MixtureOfExperts
from shared import orthogonality
from shared.workload import (
    CHOICES,
    History,
    Task,
    plot_losses,
    progress,
    running_mean,
    seconds,
    train,
)
from spectral_kernels import _records
from spectral_kernels.benchmarks import plots, run

TUNING_SEED = 1000
OPTIMIZERS = ("adamw", "muon", "shampoo", "shampoo-half", "kl-shampoo", "soap", "deva")
TASKS: Mapping[str, type[Task]] = {
    task.name: task
    for task in (
        Perceptron,
        Characters,
        Autoencoder,
        MixtureOfExperts,
        Convolutional,
        MatrixProblem,
    )
}
# Updates are averaged on these, over the second half of so many steps.
AVERAGED: Mapping[str, int] = {Perceptron.name: 300, Characters.name: 120}


class Runs:
    """Runs on one thread that a file remembers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _once(self, path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not path.exists():
            found = compute()
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(found))
            part.rename(path)
        return json.loads(path.read_text())

    def history(self, task: Task, name: str, *, steps: int, seed: int, lr: float) -> History:
        """A training run."""

        def compute() -> dict[str, Any]:
            label = f"{task.name}, {CHOICES[name].label}, lr {lr:.2g}, seed {seed}"
            with progress(label, steps) as moved:
                history = train(
                    task,
                    name,
                    steps=steps,
                    seed=seed,
                    lr=lr,
                    on_step=moved,
                    clock=time.process_time,
                )
            return asdict(history)

        file = f"{name}, {steps} steps, lr {lr:.6g}, seed {seed}.json"
        return History(**self._once(self.folder / task.name / file, compute))

    def orthogonality(self, task: Task, label: str, *, steps: int, lr: float) -> dict[str, Any]:
        """Of one variant's updates."""
        compute = functools.partial(orthogonality.measure, task, label, lr=lr, steps=steps)
        file = f"{label.replace('/', ' by ')}, {steps} steps, lr {lr:.6g}.json"
        return self._once(self.folder / f"{task.name}-orthogonality" / file, compute)

    def step_cost(self, cycles: int) -> dict[str, Any]:
        """Of DeVA and Muon, the public ones too where they are."""
        public = "with" if step_cost.public_folder() else "without"
        file = f"step-cost, {cycles} cycles, {public} public code.json"
        return self._once(self.folder / file, functools.partial(step_cost.measure, cycles))


def search(centre: float, trials: int, score: Callable[[float], float]) -> dict[float, float]:
    """Scores of so many learning rates: by twos until both sides are worse, then in between.

    Every optimizer gets the same number of trials, wherever its search starts.
    """
    found: dict[float, float] = {}
    for _ in range(trials):
        best = min(found, key=found.__getitem__) if found else 0.0
        offsets = (best + step for step in (0.0, 1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.125))
        offset = next(offset for offset in offsets if offset not in found)
        if found and found[best] == math.inf:
            offset = min(found) - 1.0
        value = score(centre * 2.0**offset)
        found[offset] = value if math.isfinite(value) else math.inf
    return {centre * 2.0**offset: value for offset, value in sorted(found.items())}


def at_edge(scores: Mapping[float, float]) -> bool:
    """Whether the best learning rate is the lowest or highest that was tried."""
    best = min(scores, key=scores.__getitem__)
    return best in (min(scores), max(scores))


def compare(task: Task, runs: Runs, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Every optimizer at its own best learning rate; their plot."""
    tuning: dict[str, dict[float, float]] = {}
    for name in options.optimizers:

        def score(lr: float, name: str = name) -> float:
            return runs.history(task, name, steps=steps, seed=TUNING_SEED, lr=lr).score

        tuning[name] = search(CHOICES[name].lr, options.trials, score)
    best = {name: min(scores, key=scores.__getitem__) for name, scores in tuning.items()}
    # Seed by seed, so that a busy hour of the machine meets all optimizers.
    histories: dict[str, list[History]] = {name: [] for name in options.optimizers}
    for seed in range(options.seeds):
        for name, lr in best.items():
            histories[name].append(runs.history(task, name, steps=steps, seed=seed, lr=lr))
    curves = {CHOICES[name].label: found for name, found in histories.items()}
    title = f"{task.name}: own best of {options.trials} learning rates, {options.seeds} seeds"
    path = options.output / f"{task.name}.png"
    plot_losses(curves, path, title, task, "CPU seconds on one thread, median of the seeds")
    return {
        CHOICES[name].label: {
            "lr": best[name],
            "at_edge": at_edge(tuning[name]),
            "tuning": {f"{lr:.4g}": value for lr, value in tuning[name].items()},
            "runs": found,
        }
        for name, found in histories.items()
    }


# Tables.


def spread(values: Sequence[float]) -> str:
    """Mean, lowest and highest."""
    return f"{statistics.fmean(values):.4g} ({min(values):.4g}–{max(values):.4g})"


def milliseconds(histories: Sequence[History]) -> float:
    """Of the optimizer alone: every step's median over the seeds; the first, setting up, is out."""
    steps = zip(*(history.optimizer_seconds for history in histories), strict=True)
    return 1e3 * plots.steady([statistics.median(step) for step in steps])


def mean_losses(runs: Sequence[History]) -> list[float]:
    """Smoothed, mean of the seeds."""
    smooth = (running_mean(one.losses) for one in runs)
    return [statistics.fmean(losses) for losses in zip(*smooth, strict=True)]


def comparison_table(task: Task, steps: int, result: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Scores and times of one task."""
    curves = {label: mean_losses(entry["runs"]) for label, entry in result.items()}
    # Both papers compare with Muon.
    yardstick = "Muon" if "Muon" in curves else next(iter(curves))
    goal = curves[yardstick][-1]
    lines = [
        f"## {task.name}",
        "",
        f"{steps} steps; data sha256 {task.sha256[:16]}; mean (lowest–highest) of the seeds. The "
        f"last two columns: until the training loss, mean of seeds, is {yardstick}'s last, "
        f"{goal:.4g}.",
        "",
        f"| optimizer | lr | {task.score} | final training loss | optimizer, ms a step | steps | "
        "CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, entry in result.items():
        runs, times = entry["runs"], seconds(entry["runs"])
        first = next((i for i, loss in enumerate(curves[label]) if loss <= goal), None)
        reached = "– | –" if first is None else f"{first + 1} | {times[first]:.2f}"
        lines.append(
            f"| {label} | {entry['lr']:.2g}{'*' * entry['at_edge']} | "
            f"{spread([one.score for one in runs])} | "
            f"{spread([running_mean(one.losses)[-1] for one in runs])} | "
            f"{milliseconds(runs):.2f} | {reached} |"
        )
    return [*lines, ""]


def cost_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Milliseconds a step of every optimizer on every task."""
    labels = list(dict.fromkeys(label for result in results.values() for label in result))
    lines = [
        "## Optimizer, CPU milliseconds a step",
        "",
        f"| task | {' | '.join(labels)} |",
        "|---" * (1 + len(labels)) + "|",
    ]
    for name, result in results.items():
        figures = [f"{milliseconds(result[label]['runs']):.2f}" for label in labels]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return [*lines, ""]


def averages(
    task: Task, runs: Runs, result: Mapping[str, Any], steps: int, output: Path
) -> list[str]:
    """Time-averaged semi-orthogonality at the tuned learning rates: table, plot."""
    found = {}
    for label, (name, _) in orthogonality.VARIANTS.items():
        tuned = result.get(CHOICES[name].label)
        lr = tuned["lr"] if tuned else CHOICES[name].lr
        found[label] = runs.orthogonality(task, label, steps=steps, lr=lr)
    title = f"{task.name}: time average of the updates' U U^T"
    orthogonality.plot(found, output / f"{task.name}-orthogonality.png", title)
    return orthogonality.table(task.name, found, steps)


def quadratic_table(scale: float, output: Path) -> list[str]:
    """DeVA's Figure 2."""
    steps, seeds = max(4, round(400 * scale)), max(2, round(100 * min(1.0, scale)))
    sizes = ["--steps", str(steps), "--seeds", str(seeds), "--output", str(output)]
    ends = trace_quadratic.main(sizes)
    lines = ["## Trace quadratic", "", f"{seeds} seeds, {steps} steps: median f(X) - f(X*).", ""]
    lines += [f"| optimizer | {' | '.join(ends)} |", "|---" * (1 + len(ends)) + "|"]
    for name in trace_quadratic.OPTIMIZERS:
        medians = [f"{float(found[name][-1].median()):.4g}" for found in ends.values()]
        lines.append(f"| {name} | {' | '.join(medians)} |")
    return lines


def summary(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What papers.json keeps of an optimizer's runs."""
    runs = entry["runs"]
    return {
        **entry,
        "runs": [{"score": one.score, "final_loss": running_mean(one.losses)[-1]} for one in runs],
        "optimizer_ms": milliseconds(runs),
        "cpu_seconds": seconds(runs)[-1],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(TASKS), help="by comma")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="by comma")
    parser.add_argument("--trials", type=int, default=5, help="learning rates an optimizer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument("--output", default="docs/papers", type=Path, help="tables and figures")
    parser.add_argument("--runs", default="results/papers", type=Path, help="finished runs")
    options = parser.parse_args(argv)
    options.tasks, options.optimizers = (
        value.split(",") for value in (options.tasks, options.optimizers)
    )
    for given, known in ((options.tasks, TASKS), (options.optimizers, CHOICES)):
        unknown = set(given) - set(known)
        if unknown:
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Everything, or the tasks and optimizers that were asked for."""
    options = arguments(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    facts, runs = run.machine(), Runs(options.runs)
    results: dict[str, dict[str, Any]] = {}
    lines: list[str] = []
    for name in options.tasks:
        task = TASKS[name]()
        steps = max(4, round(task.steps * options.scale))
        results[name] = compare(task, runs, options, steps)
        lines += comparison_table(task, steps, results[name])
        if name in AVERAGED:
            steps = max(4, round(AVERAGED[name] * options.scale))
            lines += averages(task, runs, results[name], steps, options.output)
    lines += cost_table(results)
    cycles = max(1, round(step_cost.CYCLES * options.scale))
    lines += step_cost.table(runs.step_cost(cycles))
    lines += quadratic_table(options.scale, options.output)
    head = [
        "# The papers' claims at laptop scale: numbers",
        "",
        f"Written by `make papers`. {facts['cpu']}, one thread, torch {torch.__version__}. "
        f"{options.trials} learning rates an optimizer, its own best, {options.seeds} seeds; "
        "a star marks a best rate at the edge of those tried. Seconds are CPU time, every step's "
        "median over the seeds.",
        "",
    ]
    (options.output / "tables.md").write_text("\n".join(head + lines) + "\n")
    record = {
        "machine": facts,
        "trials": options.trials,
        "seeds": options.seeds,
        "tasks": {
            name: {label: summary(entry) for label, entry in result.items()}
            for name, result in results.items()
        },
    }
    (options.output / "papers.json").write_text(_records.text(record))
    print(f"written: {options.output / 'tables.md'}, papers.json and the figures beside it")


if __name__ == "__main__":
    main()

"""The two papers' claims at laptop scale: tuned fairly, several seeds, tables and figures.

    python examples/papers.py --output results/papers
    python examples/papers.py --tasks digits-mlp --trials 1 --seeds 1 --scale 0.05

For every task and optimizer the learning rate is searched with the same number of trials, a factor
of two apart, on a seed of its own; the best is run with the other seeds. Then the time average of
U U^T over the last steps is measured for Muon, Shampoo and KL-Shampoo, and how betas, ridge and
exponent move it; and DeVA's figure 2 is drawn again. tables.md holds all numbers.

Source of the claims: arXiv 2602.06880 (DeVA), arXiv 2602.09314 (Clarifying Shampoo).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import trace_quadratic
from characters import Characters
from digits import Autoencoder, Convolutional, Perceptron
from matrix_problem import MatrixProblem
from moe import MixtureOfExperts
from spectral_kernels.benchmarks import plots, run
from torch import Tensor
from workload import CHOICES, History, Task, plot_losses, progress, running_mean, train

TUNING_SEED = 1000
OPTIMIZERS = ("adamw", "muon", "shampoo", "shampoo-half", "kl-shampoo", "soap", "deva")

# What the average of U U^T is measured for: optimizer and options.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Muon": ("muon", {}),
    "Shampoo 1/4": ("shampoo", {"precondition_frequency": 1}),
    "Shampoo 1/2": ("shampoo-half", {"precondition_frequency": 1}),
    "KL-Shampoo": ("kl-shampoo", {"precondition_frequency": 1}),
    "Shampoo 1/2, beta1 0": (
        "shampoo-half",
        {"precondition_frequency": 1, "betas": (0.0, 0.95)},
    ),
    "Shampoo 1/2, beta2 0.8": (
        "shampoo-half",
        {"precondition_frequency": 1, "betas": (0.9, 0.8)},
    ),
    "Shampoo 1/2, beta2 0.99": (
        "shampoo-half",
        {"precondition_frequency": 1, "betas": (0.9, 0.99)},
    ),
    "Shampoo 1/2, ridge 1e-3": (
        "shampoo-half",
        {"precondition_frequency": 1, "relative_ridge": 1e-3},
    ),
    "Shampoo 1/2, roots every 10 steps": ("shampoo-half", {}),
}


TASKS: Mapping[str, type[Task]] = {
    task.name: task
    for task in (
        Characters,
        Perceptron,
        Convolutional,
        Autoencoder,
        MixtureOfExperts,
        MatrixProblem,
    )
}


def rates(centre: float, trials: int) -> list[float]:
    """Learning rates a factor of two apart, around the given one."""
    return [centre * 2.0 ** (trial - trials // 2) for trial in range(trials)]


def tune(task: Task, name: str, *, steps: int, trials: int) -> tuple[float, dict[str, float]]:
    """The learning rate with the best score, and the scores of all."""
    scores = {}
    for lr in rates(CHOICES[name].lr, trials):
        with progress(f"{task.name}, {CHOICES[name].label}, lr {lr:.2g}", steps) as moved:
            history = train(task, name, steps=steps, seed=TUNING_SEED, lr=lr, on_step=moved)
        scores[lr] = history.score if math.isfinite(history.score) else math.inf
    return min(scores, key=scores.__getitem__), {f"{lr:g}": x for lr, x in scores.items()}


def compare(task: Task, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Every optimizer at its own best learning rate; their plot."""
    found: dict[str, Any] = {}
    curves: dict[str, list[History]] = {}
    for name in options.optimizers:
        lr, scores = tune(task, name, steps=steps, trials=options.trials)
        histories = []
        for seed in range(options.seeds):
            with progress(f"{task.name}, {CHOICES[name].label}, seed {seed}", steps) as moved:
                histories.append(train(task, name, steps=steps, seed=seed, lr=lr, on_step=moved))
        curves[CHOICES[name].label] = histories
        found[CHOICES[name].label] = {
            "lr": lr,
            "tuning": scores,
            "runs": [asdict(history) for history in histories],
        }
    title = f"{task.name}: own best of {options.trials} learning rates, {options.seeds} seeds"
    plot_losses(curves, options.output / f"{task.name}.png", title)
    return {"sha256": task.sha256, "steps": steps, "optimizers": found}


# Time-averaged semi-orthogonality.


def isotropy_error(product: Tensor) -> float:
    """||P s / tr P - I||_F / sqrt(s) of an s x s matrix P = E[U U^T]."""
    size = product.shape[-1]
    scaled = product * (size / product.trace())
    eye = torch.eye(size, dtype=product.dtype)
    return float(torch.linalg.matrix_norm(scaled - eye)) / size**0.5


class Average:
    """Sums U U^T over the shorter side of every hidden matrix, from a given step on."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.single: dict[str, list[float]] = {}
        self.sums: dict[str, Tensor] = {}
        self.errors: list[float] = []

    def add(self, step: int, chosen: Any) -> None:
        """One watched step."""
        if step <= self.start:
            return
        for name, blocks in chosen.updates().items():
            for block in blocks:
                for matrix in block.reshape(-1, *block.shape[-2:]).double():
                    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
                    product = x @ x.mT
                    if product.trace() == 0:
                        continue
                    product /= product.trace()
                    self.single.setdefault(name, []).append(isotropy_error(product))
                    self.sums[name] = self.sums.get(name, 0) + product
        means = [isotropy_error(total) for total in self.sums.values()]
        self.errors.append(statistics.fmean(means) if means else math.nan)

    def figures(self) -> dict[str, Any]:
        """The error of single updates, of their average, and how the latter came down."""
        singles = [value for values in self.single.values() for value in values]
        return {
            "single": statistics.fmean(singles) if singles else math.nan,
            "average": self.errors[-1] if self.errors else math.nan,
            "by_window": self.errors,
        }


def orthogonality(task: Task, lrs: Mapping[str, float], steps: int) -> dict[str, Any]:
    """Of every variant, over the second half of a run at its optimizer's tuned learning rate."""
    found = {}
    for label, (name, options) in VARIANTS.items():
        average = Average(steps // 2)
        with progress(f"{task.name}, {label}", steps) as moved:

            def on_step(
                step: int,
                loss: float,
                chosen: torch.optim.Optimizer,
                average: Average = average,
                moved: Any = moved,
            ) -> None:
                average.add(step, chosen)
                moved(step, loss, chosen)

            train(task, name, steps=steps, lr=lrs.get(name), watch=1, on_step=on_step, **options)
        found[label] = average.figures()
    return found


def plot_orthogonality(found: Mapping[str, Any], path: Path, title: str) -> None:
    """The error of the average against the number of steps averaged."""
    figure, axes = plots.plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    for place, (label, figures) in enumerate(found.items()):
        colour = plots.COLOURS[place % len(plots.COLOURS)]
        line = "-" if place < len(plots.COLOURS) else "--"
        window = range(1, len(figures["by_window"]) + 1)
        axes.plot(window, figures["by_window"], color=colour, ls=line, lw=1.4, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("steps averaged over")
    axes.set_ylabel("distance of E[U U^T] from a multiple of I")
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    plots.save(figure, path)


# Tables.


def spread(values: Sequence[float]) -> str:
    """Mean, lowest and highest."""
    return f"{statistics.fmean(values):.4g} ({min(values):.4g}–{max(values):.4g})"


def comparison_table(name: str, task: Task, result: Mapping[str, Any]) -> list[str]:
    """Scores and times of one task."""
    lines = [
        f"## {name}",
        "",
        f"{result['steps']} steps; data sha256 {result['sha256'][:16]}; mean (lowest–highest).",
        "",
        f"| optimizer | lr | {task.score} | final training loss | optimizer, ms a step | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for label, entry in result["optimizers"].items():
        runs = entry["runs"]
        last = [statistics.fmean(one["losses"][-20:]) for one in runs]
        milliseconds = [1e3 * plots.steady(one["optimizer_seconds"]) for one in runs]
        lines.append(
            f"| {label} | {entry['lr']:.2g} | {spread([one['score'] for one in runs])} | "
            f"{spread(last)} | {statistics.fmean(milliseconds):.2f} | "
            f"{statistics.fmean(one['seconds'][-1] for one in runs):.1f} |"
        )
    return [*lines, ""]


def seconds_table(result: Mapping[str, Any]) -> list[str]:
    """How long every optimizer takes to the highest loss that any run ends with."""
    entries = result["optimizers"]

    smoothed = {
        label: [running_mean(one["losses"]) for one in entry["runs"]]
        for label, entry in entries.items()
    }
    goal = max(losses[-1] for runs in smoothed.values() for losses in runs)
    lines = [
        f"To a training loss of {goal:.4g}, the highest that a run ends with:",
        "",
        "| optimizer | steps | seconds |",
        "|---|---|---|",
    ]
    for label, entry in entries.items():
        first = [next(i for i, x in enumerate(losses) if x <= goal) for losses in smoothed[label]]
        seconds = [one["seconds"][i] for one, i in zip(entry["runs"], first, strict=True)]
        lines.append(f"| {label} | {spread([i + 1 for i in first])} | {spread(seconds)} |")
    return [*lines, ""]


def orthogonality_table(name: str, found: Mapping[str, Any]) -> list[str]:
    """Single updates and their average."""
    lines = [
        f"## Time-averaged semi-orthogonality, {name}",
        "",
        "0 is a multiple of an isometry; over the second half of the run.",
        "",
        "| variant | a single update | the average of U U^T |",
        "|---|---|---|",
    ]
    for label, figures in found.items():
        lines.append(f"| {label} | {figures['single']:.3g} | {figures['average']:.3g} |")
    return [*lines, ""]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(TASKS), help="by comma")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="by comma")
    parser.add_argument("--trials", type=int, default=5, help="learning rates an optimizer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument("--output", default="results/papers", type=Path)
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
    facts = run.machine()
    record: dict[str, Any] = {
        "machine": facts,
        "trials": options.trials,
        "seeds": options.seeds,
        "tasks": {},
        "orthogonality": {},
    }
    lines = [
        "# The papers' claims at laptop scale",
        "",
        f"{facts['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        f"{options.trials} learning rates an optimizer, its own best, {options.seeds} seeds.",
        "",
    ]
    for name in options.tasks:
        task = TASKS[name]()
        steps = max(4, round(task.steps * options.scale))
        result = compare(task, options, steps)
        record["tasks"][name] = result
        lines += comparison_table(name, task, result) + seconds_table(result)
        if task.name in (Characters.name, Perceptron.name):
            lrs = {
                optimizer: result["optimizers"][CHOICES[optimizer].label]["lr"]
                for optimizer in options.optimizers
            }
            found = orthogonality(task, lrs, steps)
            record["orthogonality"][name] = found
            lines += orthogonality_table(name, found)
            title = f"{name}: time average of the updates' U U^T"
            plot_orthogonality(found, options.output / f"{name}-orthogonality.png", title)
    steps = max(4, round(400 * options.scale))
    seeds = max(2, round(100 * min(1.0, options.scale)))
    quadratic = ["--steps", str(steps), "--seeds", str(seeds), "--output", str(options.output)]
    ends = trace_quadratic.main(quadratic)
    lines += ["## Trace quadratic", "", f"{seeds} seeds, {steps} steps: median f(X) - f(X*).", ""]
    lines += [f"| optimizer | {' | '.join(ends)} |", "|---" * (1 + len(ends)) + "|"]
    for name in trace_quadratic.OPTIMIZERS:
        medians = [f"{float(runs[name][-1].median()):.4g}" for runs in ends.values()]
        lines.append(f"| {name} | {' | '.join(medians)} |")
    (options.output / "tables.md").write_text("\n".join(lines) + "\n")
    (options.output / "papers.json").write_text(json.dumps(record) + "\n")
    print(f"written: {options.output / 'tables.md'}, papers.json and the figures beside it")


if __name__ == "__main__":
    main()

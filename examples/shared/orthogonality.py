"""Are a run's updates semi-orthogonal on average? E[U U^T], over a window of steps.

Muon's updates are nearly isometries one by one. Shampoo's are not, but where its factors are
averages of the same gradients, E[U U^T] over many steps ought to be a multiple of I. Measured is

    ||P s / tr P - I||_F / sqrt(s),   P = sum of U U^T / tr U U^T over the steps so far,

U U^T of the shorter side s, every update with the same weight; 0 is a multiple of an isometry. The
gradient itself is the control: averaging alone brings any matrices nearer.

Source of the claim: arXiv 2602.09314.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from shared.workload import PLOT_DPI, Task, progress, train
from spectral_kernels.benchmarks import plots
from torch import Tensor

FRESH = {"precondition_frequency": 1}
GRADIENT = "gradient"

# Optimizer and options.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    GRADIENT: ("muon", {}),
    "Muon": ("muon", {}),
    "Shampoo 1/4": ("shampoo", FRESH),
    "Shampoo 1/2": ("shampoo-half", FRESH),
    "KL-Shampoo": ("kl-shampoo", FRESH),
    "1/2, beta1 0": ("shampoo-half", {**FRESH, "betas": (0.0, 0.95)}),
    "1/2, beta1 0, beta2 0.99": ("shampoo-half", {**FRESH, "betas": (0.0, 0.99)}),
    "1/2, beta2 0.8": ("shampoo-half", {**FRESH, "betas": (0.9, 0.8)}),
    "1/2, beta2 0.99": ("shampoo-half", {**FRESH, "betas": (0.9, 0.99)}),
    "1/2, ridge 1e-3": ("shampoo-half", {**FRESH, "relative_ridge": 1e-3}),
    "1/2, roots every 10 steps": ("shampoo-half", {}),
}


def isotropy_error(product: Tensor) -> float:
    """||P s / tr P - I||_F / sqrt(s) of an s x s matrix P = E[U U^T]."""
    size = product.shape[-1]
    scaled = product * (size / product.trace())
    eye = torch.eye(size, dtype=product.dtype)
    return float(torch.linalg.matrix_norm(scaled - eye)) / size**0.5


class Average:
    """Sums U U^T over the shorter side of every hidden matrix, from a given step on."""

    def __init__(self, start: int, *, gradients: bool = False) -> None:
        self.start, self.gradients = start, gradients
        self.single: list[float] = []
        self.sums: dict[str, Tensor] = {}
        self.errors: list[float] = []

    def add(self, step: int, chosen: Any) -> None:
        """One watched step."""
        if step <= self.start:
            return
        for name, matrix in self._matrices(chosen):
            x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
            product = x @ x.mT
            if product.trace() == 0:
                continue
            product /= product.trace()
            self.single.append(isotropy_error(product))
            self.sums[name] = self.sums.get(name, 0) + product
        means = [isotropy_error(total) for total in self.sums.values()]
        self.errors.append(statistics.fmean(means) if means else math.nan)

    def _matrices(self, chosen: Any) -> Iterator[tuple[str, Tensor]]:
        if self.gradients:
            group = next(g for g in chosen.param_groups if g["algorithm"] == "matrix")
            found = {str(i): [param.grad] for i, param in enumerate(group["params"])}
        else:
            found = chosen.updates()
        for name, blocks in found.items():
            for place, block in enumerate(blocks):
                for inner, matrix in enumerate(block.reshape(-1, *block.shape[-2:]).double()):
                    yield f"{name} {place} {inner}", matrix

    def figures(self) -> dict[str, Any]:
        """The error of single updates, of their average, and how the latter came down."""
        return {
            "single": statistics.fmean(self.single) if self.single else math.nan,
            "average": self.errors[-1] if self.errors else math.nan,
            "by_window": self.errors,
        }


def measure(task: Task, label: str, *, lr: float, steps: int) -> dict[str, Any]:
    """One variant, over the second half of a run."""
    name, options = VARIANTS[label]
    average = Average(steps // 2, gradients=label == GRADIENT)
    with progress(f"{task.name}, {label}", steps) as moved:

        def on_step(step: int, loss: float, chosen: Any) -> None:
            # A watched step runs twice.
            if step == average.start and not average.gradients:
                chosen.watch(1)
            average.add(step, chosen)
            moved(step, loss, chosen)

        train(task, name, steps=steps, lr=lr, on_step=on_step, **options)
    return average.figures()


def plot(found: Mapping[str, Any], path: Path, title: str) -> None:
    """The error of the average against the number of steps averaged; what moves it beside."""
    figure, panels = plots.plt.subplots(
        1, 2, figsize=(9.0, 4.8), dpi=PLOT_DPI, sharey=True, layout="constrained"
    )
    kinds = {label: found[label] for label in found if not label.startswith("1/2, ")}
    moved = {label: found[label] for label in found if label not in kinds}
    if "Shampoo 1/2" in found:
        moved = {"Shampoo 1/2": found["Shampoo 1/2"], **moved}
    for axes, lines, heading in zip(
        panels, (kinds, moved), ("methods", "what moves Shampoo 1/2"), strict=True
    ):
        for place, (label, figures) in enumerate(lines.items()):
            window = range(1, len(figures["by_window"]) + 1)
            colour = plots.COLOURS[place % len(plots.COLOURS)]
            axes.plot(window, figures["by_window"], color=colour, lw=1.4, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("steps averaged over")
        axes.set_title(heading, loc="left")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
    panels[0].set_ylabel("distance of E[U U^T] from a multiple of I")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    plots.save(figure, path)


def table(name: str, found: Mapping[str, Any], steps: int) -> list[str]:
    """Single updates and their average."""
    lines = [
        f"## Time-averaged semi-orthogonality, {name}",
        "",
        f"Distance of U U^T from a multiple of I, over steps {steps // 2 + 1} to {steps}.",
        "",
        "| variant | a single update | the average |",
        "|---|---|---|",
    ]
    for label, figures in found.items():
        lines.append(f"| {label} | {figures['single']:.3g} | {figures['average']:.3g} |")
    return [*lines, ""]

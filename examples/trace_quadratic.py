"""The trace quadratic of DeVA's Figure 2: f(X) = tr(X^T H X) / 2, X of 9 x 9.

    python examples/trace_quadratic.py --hessian heterogeneous

H has three blocks of three eigenvalues out of {1, 2, 3}, {99, 100, 101}, {4998, 4999, 5000}: one
set a block ("heterogeneous"), or one of each in every block ("homogeneous"). As in the paper's
code a step sees 3 random rows of the equivalent least-squares problem, by the norm of their
residual rather than its square, for 400 steps at beta = (0, 0.99), without weight decay; Muon's
updates are sqrt(9) times an isometry, and there is no linear term. Each of the 100 seeds has a
Hessian of its own; they are one batch of matrices, which each step updates by one call.

Source: arXiv 2602.06880; github.com/Tsedao/Decoupled-Variance-Adaptation, trace_quadratic.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import spectral_kernels as sk
import torch
from shared.workload import PLOT_DPI, digest, progress
from spectral_kernels import _records
from spectral_kernels.benchmarks import plots
from torch import Tensor, nn

SIZE, BLOCK, ROWS = 9, 3, 3
SCALES = ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (4998.0, 4999.0, 5000.0))
HESSIANS: Mapping[str, Sequence[Sequence[float]]] = {
    "heterogeneous": SCALES,
    "homogeneous": tuple(zip(*SCALES, strict=True)),
}
BETAS = (0.0, 0.99)
LR = 0.1

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def rotated(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Make:
    values = {"betas": BETAS, "weight_decay": 0.0, **options}
    return lambda groups: make(groups, LR, **values)


OPTIMIZERS: Mapping[str, Make] = {
    "SignSGD": rotated(sk.optim.DeVA, variant="linf", variance="none"),
    "Adam": lambda groups: torch.optim.Adam(groups[0]["params"], LR, BETAS),
    "Muon": lambda groups: sk.optim.Muon(groups, SIZE**0.5 * LR, 0.0, 0.0),
    "SOAP": rotated(sk.optim.SOAP),
    "Shampoo 1/4": rotated(sk.optim.Shampoo),
    "DeVA, l-inf": rotated(sk.optim.DeVA, variant="linf"),
    "DeVA": rotated(sk.optim.DeVA),
    "DeVA, public start-up": rotated(sk.optim.DeVA, reference=True),
}


class Problem:
    """A Hessian of its own, start and batches for every seed; f is 0 at the optimum, 0."""

    def __init__(self, hessian: str, seeds: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        options = {"generator": self.generator, "dtype": torch.float64}
        blocks = []
        for eigenvalues in HESSIANS[hessian]:
            q, r = torch.linalg.qr(torch.randn(seeds, BLOCK, BLOCK, **options))
            q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
            blocks.append((q, torch.tensor(eigenvalues, dtype=torch.float64)))
        self.h = self._diagonal([(q * values) @ q.mT for q, values in blocks])
        self.root = self._diagonal([(q * values.sqrt()) @ q.mT for q, values in blocks])
        self.start = torch.randn(seeds, SIZE, SIZE, **options)
        self.sha256 = digest(self.h, self.start)

    @staticmethod
    def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
        whole = torch.zeros(len(blocks[0]), SIZE, SIZE, dtype=torch.float64)
        for place, block in enumerate(blocks):
            inside = slice(place * BLOCK, (place + 1) * BLOCK)
            whole[:, inside, inside] = block
        return whole

    def losses(self, x: Tensor) -> Tensor:
        """Of every seed, on 3 random rows."""
        rows = torch.randint(SIZE, (len(x), ROWS, 1), generator=self.generator)
        residual = self.root.gather(1, rows.expand(-1, -1, SIZE)) @ x
        return 0.5 * SIZE / ROWS * torch.linalg.matrix_norm(residual)

    def excess(self, x: Tensor) -> Tensor:
        """f(X) - f(X*) of every seed."""
        return 0.5 * (x * (self.h @ x)).sum((-2, -1))


def run(name: str, hessian: str, *, steps: int, seeds: int) -> tuple[Tensor, str]:
    """The excess of every step and seed, and the data's checksum."""
    problem = Problem(hessian, seeds)
    x = nn.Parameter(problem.start)
    optimizer = OPTIMIZERS[name]([{"params": [x], "batched": True}])
    group = optimizer.param_groups[0]
    lr = group["lr"]
    excess = torch.empty(steps, seeds, dtype=torch.float64)
    with progress(name, steps) as moved:
        for step in range(steps):
            group["lr"] = lr * min(1.0, 2.0 * (1.0 - step / steps))
            optimizer.zero_grad()
            problem.losses(x).sum().backward()
            optimizer.step()
            excess[step] = problem.excess(x.detach())
            moved(step + 1, float(excess[step].median()), optimizer)
    return excess, problem.sha256


def plot(found: Mapping[str, Mapping[str, Tensor]], path: Path, title: str) -> None:
    """Median over the seeds, the middle half shaded; one panel a Hessian."""
    figure, panels = plots.plt.subplots(
        1,
        len(found),
        figsize=(4.6 * len(found), 4.2),
        dpi=PLOT_DPI,
        squeeze=False,
        layout="constrained",
    )
    for axes, (hessian, runs) in zip(panels[0], found.items(), strict=True):
        for place, (name, excess) in enumerate(runs.items()):
            colour = plots.COLOURS[place % len(plots.COLOURS)]
            levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
            low, middle, high = excess.quantile(levels, dim=1).tolist()
            steps = range(1, len(middle) + 1)
            axes.plot(steps, middle, color=colour, lw=1.4, label=name)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_title(f"{hessian} Hessian", loc="left")
    panels[0][0].set_ylabel("f(X) - f(X*), median and middle half of the seeds")
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    plots.save(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Both Hessians, or one, by every optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hessian", choices=HESSIANS, action="append")
    parser.add_argument("--optimizers", default=";".join(OPTIMIZERS), help="names, by semicolon")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--output", default="results", type=Path)
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Tensor]] = {}
    for hessian in options.hessian or list(HESSIANS):
        found[hessian] = {}
        for name in options.optimizers.split(";"):
            excess, sha256 = run(name, hessian, steps=options.steps, seeds=options.seeds)
            found[hessian][name] = excess
        print(f"{hessian}: data sha256 {sha256}")
        for name, excess in found[hessian].items():
            print(f"  {name:24}{float(excess[-1].median()):12.4g}")
    title = f"trace quadratic, {options.seeds} seeds, lr {LR:g}, beta {BETAS}"
    plot(found, options.output / "trace-quadratic.png", title)
    ends = {
        hessian: {name: excess[-1].tolist() for name, excess in runs.items()}
        for hessian, runs in found.items()
    }
    record = {"steps": options.steps, "seeds": options.seeds, "ends": ends}
    (options.output / "trace-quadratic.json").write_text(_records.text(record))
    print(f"written: {options.output / 'trace-quadratic.png'}")
    return found


if __name__ == "__main__":
    main()

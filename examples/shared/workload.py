"""What the examples share: optimizers by name, a training loop, progress, plots, diagnostics.

A workload is a `Task`: data with a checksum, a model, a loss on a batch and a score at the end.
`main(task)` gives it a command line:

    --optimizers adamw,muon,deva  --steps 300  --seed 0  --lr 0.01
    --output results              plot and losses go there
    --diagnostics 20              every 20th step, to a CSV file beside them
    --tensorboard FOLDER          the same, for TensorBoard
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import spectral_kernels as sk
import torch
from matplotlib.ticker import EngFormatter
from spectral_kernels import _records
from spectral_kernels.benchmarks import plots
from torch import Tensor, nn

WARM_UP = 0.05
SMOOTH = 20
PLOT_DPI = 100
# Losses that span more than this are plotted on a logarithmic axis.
DECADE = 10.0


class Task:
    """A small training problem.

    Attributes:
        name: also of its files.
        steps: of a run, unless the command line says otherwise.
        score: what `evaluate` returns, in words.
        unit: what a batch is counted in.
        per_step: units of a batch.
        overrides: of `spectral_kernels.optim.param_groups`.
        batched: parameters whose leading dimensions are a batch of matrices.
        sha256: of the data.
    """

    name: str
    steps = 300
    score = "held-out loss"
    unit = "steps"
    per_step = 1
    overrides: Mapping[str, str] = {}
    batched = False
    sha256: str

    def model(self) -> nn.Module:
        """With weights from torch's random state."""
        raise NotImplementedError

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """On a random batch."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> float:
        """The score; lower is better."""
        raise NotImplementedError


def digest(*tensors: Tensor) -> str:
    """A checksum of data."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


# Optimizers.


@dataclass(frozen=True)
class Choice:
    """An optimizer by its name in the plots.

    Attributes:
        label: in plots and tables.
        make: of parameter groups and a learning rate.
        lr: where a search for the learning rate starts.
    """

    label: str
    make: Callable[..., torch.optim.Optimizer]
    lr: float


# Of everything that is no matrix.
ADAMW_LR, ADAMW_BETAS = 3e-3, (0.9, 0.95)

CHOICES: Mapping[str, Choice] = {
    "adamw": Choice("AdamW", partial(torch.optim.AdamW, betas=ADAMW_BETAS), 3e-3),
    "muon": Choice("Muon", sk.optim.Muon, 0.02),
    "shampoo": Choice("Shampoo 1/4", sk.optim.Shampoo, 3e-3),
    "shampoo-half": Choice("Shampoo 1/2", partial(sk.optim.Shampoo, exponent=0.5), 3e-3),
    "kl-shampoo": Choice("KL-Shampoo", partial(sk.optim.Shampoo, kl=True), 3e-3),
    "soap": Choice("SOAP", sk.optim.SOAP, 3e-3),
    "deva": Choice("DeVA", sk.optim.DeVA, 0.02),
    "deva-instant": Choice("DeVA, instant", partial(sk.optim.DeVA, variant="instant"), 0.02),
    "deva-linf": Choice("DeVA, l-inf", partial(sk.optim.DeVA, variant="linf"), 3e-3),
}


def optimizer(
    name: str, task: Task, model: nn.Module, lr: float | None = None, **options: Any
) -> torch.optim.Optimizer:
    """One optimizer for a model: matrices by `name`, the rest by AdamW, without decay."""
    choice = CHOICES[name]
    rate = choice.lr if lr is None else lr
    options = {"weight_decay": 0.0, **options}
    if name == "adamw":
        return choice.make(model.parameters(), lr=rate, **options)
    groups = sk.optim.param_groups(
        model,
        matrix={"batched": True} if task.batched else {},
        adamw={"lr": ADAMW_LR, "betas": ADAMW_BETAS, "weight_decay": 0.0},
        overrides=dict(task.overrides),
        verbose=False,
    )
    return choice.make(groups, lr=rate, **options)


# Training.


@dataclass
class History:
    """What a run did, a list entry a step.

    Attributes:
        losses: of the batches.
        step_seconds: of every step.
        optimizer_seconds: of every step, the optimizer alone.
        score: of the trained model.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    score: float = float("nan")


OnStep = Callable[[int, float, torch.optim.Optimizer], None]


def train(
    task: Task,
    name: str,
    *,
    steps: int,
    seed: int = 0,
    lr: float | None = None,
    watch: int = 0,
    on_step: OnStep = lambda step, loss, optimizer: None,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> History:
    """Trains a new model: linear warm-up, then linear decay to a tenth."""
    torch.manual_seed(seed)
    model = task.model()
    chosen = optimizer(name, task, model, lr, **options)
    if watch and hasattr(chosen, "watch"):
        chosen.watch(watch)
    warm_up = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        chosen, lambda step: min((step + 1) / warm_up, 1.0) * (1.0 - 0.9 * step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    history = History()
    for step in range(1, steps + 1):
        start = clock()
        loss = task.loss(model, generator)
        model.zero_grad()
        loss.backward()
        before = clock()
        chosen.step()
        after = clock()
        schedule.step()
        history.losses.append(loss.item())
        history.optimizer_seconds.append(after - before)
        history.step_seconds.append(after - start)
        on_step(step, history.losses[-1], chosen)
    with torch.no_grad():
        history.score = task.evaluate(model)
    return history


# What is seen of it.


@contextlib.contextmanager
def progress(label: str, steps: int) -> Iterator[OnStep]:
    """A bar that `train` moves."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns) as bar:
        row = bar.add_task(label, total=steps, loss="")

        def moved(step: int, loss: float, _: torch.optim.Optimizer) -> None:
            bar.update(row, completed=step, loss=f"loss {loss:.4g}")

        yield moved


class Recorder:
    """Writes diagnostics to a CSV file and, if asked to, to TensorBoard.

    Args:
        path: of the CSV file.
        tensorboard: a folder for TensorBoard, which has to be installed then.
    """

    def __init__(self, path: Path, tensorboard: str | None = None) -> None:
        self._file = path.open("w", newline="")
        self._csv: csv.DictWriter[str] | None = None
        self._board: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard)

    def __call__(self, label: str, report: sk.optim.Diagnostics) -> None:
        """One row a parameter, one scalar a number."""
        for row in report.rows():
            entry = {"run": label, **row}
            if self._csv is None:
                self._csv = csv.DictWriter(self._file, list(entry))
                self._csv.writeheader()
            self._csv.writerow(entry)
        if self._board is not None:
            for tag, value in report.scalars():
                self._board.add_scalar(f"{label}/{tag}", value, report.step)

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def running_mean(values: Sequence[float], window: int = SMOOTH) -> list[float]:
    """Of the last `window` values, or of as many as there are."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def seconds(histories: Sequence[History]) -> list[float]:
    """Since the start at the end of every step, which counts with its median over the seeds."""
    steps = zip(*(history.step_seconds for history in histories), strict=True)
    return list(itertools.accumulate(map(statistics.median, steps)))


def _range(curves: Mapping[str, Sequence[History]]) -> tuple[float, float]:
    """Lowest and highest smoothed loss, without the first fall from where all runs start."""
    smooth = [running_mean(history.losses) for runs in curves.values() for history in runs]
    settled = [losses[len(losses) // 10 :] for losses in smooth]
    return min(map(min, settled)), max(map(max, settled))


def plot_losses(
    curves: Mapping[str, Sequence[History]],
    path: Path,
    title: str,
    task: Task,
    clock: str = "seconds of training",
) -> None:
    """Smoothed training loss against data and seconds: the mean of seeds, their range shaded."""
    figure, (by_data, by_time) = plots.plt.subplots(
        1, 2, figsize=(9.0, 4.2), dpi=PLOT_DPI, sharey=True, layout="constrained"
    )
    for place, (label, histories) in enumerate(curves.items()):
        colour = plots.COLOURS[place % len(plots.COLOURS)]
        style = {"color": colour, "ls": ("-", "--")[place // len(plots.COLOURS) % 2]}
        smooth = torch.tensor([running_mean(history.losses) for history in histories])
        data = range(task.per_step, (smooth.shape[1] + 1) * task.per_step, task.per_step)
        for axes, x in ((by_data, data), (by_time, seconds(histories))):
            axes.plot(x, smooth.mean(0).tolist(), lw=1.4, label=label, **style)
            if len(histories) > 1:
                low, high = smooth.min(0).values.tolist(), smooth.max(0).values.tolist()
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    by_data.set_xlabel(task.unit)
    by_time.set_xlabel(clock)
    by_data.set_ylabel(f"training loss (mean of {SMOOTH} steps)")
    by_data.xaxis.set_major_formatter(EngFormatter(sep=""))
    low, high = _range(curves)
    if high > DECADE * low:
        by_data.set_yscale("log")
    else:
        by_data.set_ylim(low - 0.05 * (high - low), high)
    figure.legend(*by_data.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    plots.save(figure, path)


def parser(task: Task) -> argparse.ArgumentParser:
    """The arguments that every workload takes."""
    made = argparse.ArgumentParser(description=f"the workload {task.name}")
    made.add_argument("--optimizers", default="adamw,muon,shampoo-half,soap,deva")
    made.add_argument("--steps", type=int, default=task.steps)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--lr", type=float, help="of the matrices (default: the optimizer's)")
    made.add_argument("--output", default="results", type=Path)
    made.add_argument("--diagnostics", type=int, default=0, metavar="EVERY")
    made.add_argument("--tensorboard", metavar="FOLDER")
    return made


def main(task: Task, argv: Sequence[str] | None = None) -> None:
    """Trains by every optimizer that was asked for."""
    options = parser(task).parse_args(argv)
    names = options.optimizers.split(",")
    for name in names:
        if name not in CHOICES:
            raise SystemExit(f"unknown optimizer {name!r}: expected one of {', '.join(CHOICES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"{task.name}: data sha256 {task.sha256}")
    every = options.diagnostics or (20 if options.tensorboard else 0)
    stem = options.output / task.name
    recorder = None
    if every:
        recorder = Recorder(stem.with_suffix(".csv"), options.tensorboard)
    found = {}
    for name in names:
        label = CHOICES[name].label
        with progress(label, options.steps) as moved:

            def on_step(
                step: int,
                loss: float,
                chosen: torch.optim.Optimizer,
                label: str = label,
                moved: OnStep = moved,
            ) -> None:
                moved(step, loss, chosen)
                if recorder is not None and step % every == 0 and hasattr(chosen, "diagnostics"):
                    recorder(label, chosen.diagnostics())

            found[label] = train(
                task,
                name,
                steps=options.steps,
                seed=options.seed,
                lr=options.lr,
                watch=every,
                on_step=on_step,
            )
    if recorder is not None:
        recorder.close()
    print(f"{'':16}{task.score:>16}{'optimizer, ms':>16}{'seconds':>10}")
    for label, history in found.items():
        milliseconds = 1e3 * plots.steady(history.optimizer_seconds)
        print(
            f"{label:16}{history.score:16.5g}{milliseconds:16.2f}{sum(history.step_seconds):10.1f}"
        )
    record = {"task": task.name, "sha256": task.sha256, "steps": options.steps}
    runs = {label: asdict(history) for label, history in found.items()}
    stem.with_suffix(".json").write_text(_records.text({**record, "runs": runs}))
    curves = {label: [history] for label, history in found.items()}
    plot_losses(curves, stem.with_suffix(".png"), f"{task.name}, torch {torch.__version__}", task)
    print(f"written: {stem}.json, {stem}.png")

"""The command `spectral-kernels demo`: what is here, how fast it is, and a real training."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import spectral_kernels as sk
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from spectral_kernels import _records, info

from . import peers, plots, report, run
from .case import Case
from .timing import Load

# Seconds that the microbenchmarks may take; on a busy machine the rest of them is left out.
_KERNEL_SECONDS = 100.0
_LAST = 20  # steps over which the final training loss is averaged
# What one training may take. Where a processor has no bfloat16, torch.optim.Muon takes seconds a
# step; all runs take fewer steps then, the same number.
_RUN_SECONDS = 60.0
_TRIAL_STEPS = 2


@dataclass(frozen=True)
class Run:
    """One training of the demo.

    Attributes:
        name: as printed.
        optimizer: of examples/char_gpt.py.
        seed: of weights and text.
        swap: with our kernels under it.
    """

    name: str
    optimizer: str
    seed: int = 0
    swap: bool = False


_TORCH = "torch.optim.Muon"
_SWAPPED = "torch.optim.Muon, swap_in"
_OTHER_SEED = "torch.optim.Muon, other seed"

RUNS = (
    Run("AdamW", "adamw"),
    Run(_TORCH, "torch-muon"),
    Run(_SWAPPED, "torch-muon", swap=True),
    Run(_OTHER_SEED, "torch-muon", seed=1),
    Run("our Muon", "muon"),
    Run("our Shampoo", "shampoo"),
    Run("our SOAP", "soap"),
    Run("our DeVA", "deva"),
)


def main(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the command; its plots and JSON files go to the folder `options.output`."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        example = load_example()
    except FileNotFoundError as error:
        print(f"spectral-kernels demo: {error}", file=sys.stderr)
        return 2
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    console.rule("what runs here")
    console.print(info.text(info.collect()), highlight=False)
    console.rule("kernels against torch, errors against float64")
    status = _kernels(console, output)
    console.rule("a character-level transformer on Python's own documentation")
    failed = _training(example, options.steps, console, output)
    again = info.collect()["cpu"].get("lapack_results_computed_again", "none")
    if again != "none":
        failed.append(f"results of LAPACK computed again: {again}")
    for line in failed:
        console.print(f"FAILED: {line}", highlight=False, style="red")
    return 1 if failed else status


def load_example() -> ModuleType:
    """examples/char_gpt.py of this checkout, or of the folder that the command was started in.

    Raises:
        FileNotFoundError: neither has one.
    """
    for folder in (Path(__file__).parent.parent, Path.cwd()):
        path = folder / "examples" / "char_gpt.py"
        if path.is_file():
            spec = importlib.util.spec_from_file_location("char_gpt", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["char_gpt"] = module
            spec.loader.exec_module(module)
            return module
    raise FileNotFoundError("examples/char_gpt.py is not here: run this in a checkout")


def quick_cases() -> list[Case]:
    """Those in 16 bits last: where a processor has no products of them, torch takes seconds for
    one, and no time would be left for the other families.
    """
    cases = [case for family in run.FAMILIES for case in family.cases() if case.quick]
    return sorted(cases, key=lambda case: case.dtype.itemsize < 4)


def _kernels(console: Console, output: Path) -> int:
    peers.point(["none"])
    facts = run.machine()
    for line in report.machine_lines(facts):
        console.print(line, highlight=False, style="dim")
    cases = quick_cases()
    threads = [torch.get_num_threads()]
    rows = run.measure(cases, threads, console, run.QUICK_BUDGET, limit=_KERNEL_SECONDS)
    report.show(console, rows)
    for line in report.summary(rows):
        console.print(line, highlight=False)
    if len(rows) < len(cases):
        console.print(f"{len(cases) - len(rows)} cases left out for lack of time")
    path = output / "demo-kernels.json"
    run.write(path, "demo-kernels", facts, rows)
    title = f"{facts['cpu']}, {facts['isa']}, {threads[0]} threads, torch {facts['torch']}"
    plots.speedups(rows, path.with_suffix(".png"), title)
    console.print(f"written: {path}, {path.with_suffix('.png')}\n")
    return 1 if any(row["failure"] for row in rows) else 0


def _training(example: ModuleType, steps: int, console: Console, output: Path) -> list[str]:
    """The runs in which a counter of failures has risen.

    They take turns, a stretch of steps each, so that what else the machine does meets them all.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = example.Text.load(device)
    parameters = sum(p.numel() for p in example.CharGPT(text.characters).parameters())
    console.print(
        f"{parameters:,} parameters, {len(text.train):,} characters (sha256 {text.sha256[:16]}), "
        f"{steps} steps on {device}",
        highlight=False,
    )
    trial = example.train("torch-muon", text, min(_TRIAL_STEPS, steps), 0, lambda loss: None)
    allowed = affordable_steps(steps, trial.seconds[-1] / len(trial.seconds))
    if allowed < steps:
        console.print(f"torch.optim.Muon is slow here: {allowed} steps instead of {steps}")
        steps = allowed
    facts = run.machine()
    trainings = [example.Training(one.optimizer, text, steps, one.seed) for one in RUNS]
    with Load() as load, _progress(console) as progress:
        tasks = [progress.add_task(one.name, total=steps, loss="") for one in RUNS]
        for first in range(0, steps, plots.STRETCH):
            for one, training, task in zip(RUNS, trainings, tasks, strict=True):
                with sk.swap_in(_TORCH) if one.swap else contextlib.nullcontext():
                    for _ in range(min(plots.STRETCH, steps - first)):
                        loss = training.step()
                        progress.update(task, advance=1, loss=f"loss {loss:.2f}")
    results = [
        {"name": one.name, "seed": one.seed, **asdict(training.end())}
        for one, training in zip(RUNS, trainings, strict=True)
    ]
    console.print(closing_table(results))
    for line in (*verdict(results), *report.disturbance([load.others])):
        console.print(line, highlight=False)
    path = output / "demo-training.json"
    record = {"format": run.FORMAT, "kind": "demo-training", "machine": facts, "steps": steps}
    record |= {"sha256": text.sha256, "others_load": load.others, "runs": results}
    path.write_text(_records.text(record))
    title = f"{facts['cpu']}, {torch.get_num_threads()} threads, torch {facts['torch']}"
    plots.losses(results, output / "demo-loss.png", title)
    plots.step_times(results, output / "demo-step-time.png", title)
    console.print(f"written: {path}, {output / 'demo-loss.png'}, {output / 'demo-step-time.png'}")
    return [f"{r['name']}: {r['failures']}" for r in results if r["failures"]]


def affordable_steps(steps: int, seconds: float) -> int:
    """Of trainings whose slowest takes so many seconds a step; enough for a mean of the last."""
    return min(steps, max(_LAST, int(_RUN_SECONDS / seconds)))


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def optimizer_milliseconds(result: Mapping[str, Any]) -> float:
    """Of a step."""
    return 1e3 * plots.steady(result["optimizer_seconds"])


def closing_table(results: Sequence[dict[str, Any]]) -> Table:
    """Losses and times of all runs; speed-ups are of Muon's step over torch.optim.Muon's."""
    out = Table(box=box.SIMPLE_HEAD)
    out.add_column("optimizer", no_wrap=True)
    for heading in (
        "final loss",
        "held-back loss",
        "optimizer, ms a step",
        "share of the step",
        "against torch.optim.Muon",
        "whole run, s",
    ):
        out.add_column(heading, justify="right")
    baseline = next(optimizer_milliseconds(r) for r in results if r["name"] == _TORCH)
    for result in results:
        milliseconds = optimizer_milliseconds(result)
        muon = "Muon" in result["name"] and result["name"] not in (_TORCH, _OTHER_SEED)
        out.add_row(
            result["name"],
            f"{_final(result):.3f}",
            f"{result['held_back_loss']:.3f}",
            f"{milliseconds:.1f}",
            f"{sum(result['optimizer_seconds']) / result['seconds'][-1]:.0%}",
            f"{baseline / milliseconds:.2f}x" if muon else "",
            f"{result['seconds'][-1]:.1f}",
        )
    return out


def verdict(results: Sequence[dict[str, Any]]) -> list[str]:
    """Whether swapping changed the loss by less than another seed does."""
    by_name = {result["name"]: result for result in results}
    torch_loss = by_name[_TORCH]["held_back_loss"]
    swapped = abs(by_name[_SWAPPED]["held_back_loss"] - torch_loss)
    seed = abs(by_name[_OTHER_SEED]["held_back_loss"] - torch_loss)
    return [f"swap_in moves the held-back loss by {swapped:.4f}, another seed by {seed:.4f}"]


def _final(result: dict[str, Any]) -> float:
    return statistics.fmean(result["losses"][-_LAST:])

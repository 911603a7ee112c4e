"""Predicted and measured steps over processes: `spectral-kernels bench --ranks 1,2,4`.

Operators, exchanges and copies are measured by themselves, where this runs; from them and the
choices of owners a step is predicted, and compared with steps of real optimizers.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from spectral_kernels.optim._distributed import owners

from . import distributed_costs, report, run
from .distributed_costs import Bucket, Costs, Layout, Prediction, Shape
from .distributed_ranks import CPU, WALL, Campaign, Found, Sample, layouts, run as run_ranks
from .inputs import parameter_shapes
from .timing import Load

# What a prediction is to be good for, on an idle machine.
MEAN_ERROR, WORST_ERROR = 0.15, 0.30
# What two processes are to take of the step that each takes for itself.
GOAL = 0.65
_MOST_RANKS = 8
_WIDTH = 150
# Steps with refreshes are measured by whole periods of ten, so theirs are smaller by default.
_SHAPES = {"muon": "gpt2-block"}
_PARTS = ("computing", "copying", "exchanging", "begin")

Row = dict[str, Any]


def campaign(options: argparse.Namespace) -> tuple[list[int], Campaign]:
    """The numbers of ranks, and what is measured on each.

    Raises:
        ValueError: no such numbers, or operators that are no optimizer's.
    """
    given = options.ranks.split(",")
    if not all(part.isdigit() and 0 < int(part) <= _MOST_RANKS for part in given):
        raise ValueError(
            f"--ranks must be like 1,2,4, of at most {_MOST_RANKS} processes, not {options.ranks!r}"
        )
    known = {f"{name}_step_": name for name in distributed_costs.ALGORITHMS}
    ops = options.op.split(",") if options.op else list(known)
    for op in ops:
        if op not in known:
            raise ValueError(f"--ranks takes --op of {', '.join(known)}, not {op!r}")
    shapes = {
        known[op]: parameter_shapes(options.shape or _SHAPES.get(known[op], "small-list"))
        for op in ops
    }
    budget = run.QUICK_BUDGET if options.quick else run.BUDGET
    return [int(part) for part in given], Campaign(shapes, budget, progress=True)


def main(options: argparse.Namespace, facts: Mapping[str, Any], console: Console) -> int:
    """Measures, predicts, compares and prints; then the costs on paper of cards."""
    worlds, measured = campaign(options)
    path = run.result_path(options.json, "ranks")
    rows: list[Row] = []
    for ranks in worlds:
        console.print(f"{ranks} process{'es' if ranks > 1 else ''} …", style="dim")
        with Load() as load:
            found = run_ranks(ranks, measured)
        rows += compared(measured, found, load.others)
        # So that what has been measured stays where the next ones are interrupted.
        run.write(path, "ranks", dict(facts), rows)
    # In a file, or in a narrow window, its lines are longer than others.
    Console(file=console.file, width=max(console.width, _WIDTH)).print(table(rows))
    for line in summary(rows):
        console.print(line, highlight=False)
    console.print(f"written: {path}")
    console.print("\nCards:", style="bold")
    console.print(distributed_costs.page(), highlight=False, soft_wrap=True)
    return 1 if any(row["failure"] for row in rows) else 0


def compared(measured: Campaign, found: Sequence[Found], others: float | None = None) -> list[Row]:
    """A row for every optimizer and layout of one number of ranks.

    Args:
        measured: what was.
        found: by every rank.
        others: the share of the cores that other processes used.
    """
    ranks = len(found)
    rows = []
    for algorithm, shapes in measured.shapes.items():
        alone = together((each.steps[algorithm, "replicated"] for each in found), WALL)
        for name, layout in {"replicated": None, **layouts(ranks)}.items():
            times = together((each.steps[algorithm, name] for each in found), WALL)
            low, median, high = _quartiles(times)
            cpu = statistics.median(together((x.steps[algorithm, name] for x in found), CPU))
            prediction, failure = _prediction(measured, found, algorithm, name, layout, WALL)
            of_cpu, _ = _prediction(measured, found, algorithm, name, layout, CPU)
            row: Row = {
                "key": f"{algorithm} {name} {ranks}",
                "op": f"{algorithm}_step_",
                "layout": name,
                "ranks": ranks,
                "matrices": [list(shape) for shape in shapes],
                "median_s": median,
                "low_s": low,
                "high_s": high,
                "samples": len(times),
                "of_replicated": median / statistics.median(alone),
                "predicted_s": prediction.total,
                "error": prediction.total / median - 1.0,
                "parts_s": {part: getattr(prediction, part) for part in _PARTS},
                "cpu_s": cpu,
                "cpu_predicted_s": of_cpu.total,
                "cpu_error": of_cpu.total / cpu - 1.0,
                "others_load": others,
                "failure": failure,
            }
            rows.append(row)
    return rows


def together(of_ranks: Iterable[Sequence[Sample]], clock: int) -> list[float]:
    """Of every round the time of the rank that took longest."""
    rounds = zip(*of_ranks, strict=True)
    return [max(sample[clock] for sample in samples) for samples in rounds]


def _quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def _prediction(
    measured: Campaign,
    found: Sequence[Found],
    algorithm: str,
    name: str,
    layout: Layout | None,
    clock: int,
) -> tuple[Prediction, str | None]:
    """The step that the parts foretell, and why the plan is not the optimizer's, if it is not."""
    costs = measured_costs(found, algorithm, name, clock)
    shapes = measured.shapes[algorithm]
    if layout is None:
        return distributed_costs.replicated(shapes, len(found), costs), None
    buckets = distributed_costs.planned(algorithm, shapes, layout, rates=_here())
    return distributed_costs.predicted(buckets, layout, costs), _unlike(
        buckets, layout, algorithm, found[0].loads[algorithm, name]
    )


def _here() -> owners.Rates:
    """The rates by which optimizers on this machine choose owners."""
    return owners.rates_of(torch.device("cpu"))


def _unlike(
    buckets: Sequence[Bucket], layout: Layout, algorithm: str, real: tuple[Sequence[int], int]
) -> str | None:
    """Whether owners or bytes of the model are not those of `plan()`."""
    loads = [
        sum(
            count * distributed_costs.cost(algorithm, shape, rates=_here()).flops
            for each in buckets
            for shape, count in each.owned[rank].items()
        )
        for rank in range(layout.ranks)
    ]
    if loads != list(real[0]):
        return f"owners do {loads} in the model and {list(real[0])} in plan()"
    if layout.shards == 1:
        # Without what fills the shares up to the largest one.
        sent = 4.0 * (layout.ranks - 1) * sum(each.elements.sum() for each in buckets)
    else:
        sent = distributed_costs.moved(buckets).sum()
    return None if sent == real[1] else f"{sent:g} bytes in the model and {real[1]} in plan()"


def measured_costs(found: Sequence[Found], algorithm: str, layout: str, clock: int) -> Costs:
    """The figures of this machine with so many processes on it, by one of the clocks."""
    steps: dict[Shape, list[float]] = {}
    for each in found:
        for (name, shape), seconds in each.matrices.items():
            if name == algorithm:
                steps.setdefault(shape, []).append(seconds)
    medians = {shape: statistics.median(values) for shape, values in steps.items()}
    return Costs(
        step=medians.__getitem__,
        pieces=_over_nothing([each.pieces for each in found], clock),
        everyone=_over_nothing([each.everyone for each in found], clock),
        copied=statistics.median(each.copied[clock] for each in found),
        begin=statistics.median(together((x.begin[algorithm, layout] for x in found), clock)),
        cores=(os.cpu_count() or 1) if clock == WALL else None,
        in_place=True,
    )


def _over_nothing(
    of_ranks: Sequence[Sequence[tuple[int, Sample]]], clock: int
) -> Callable[[float, int], float]:
    """What bytes add to an exchange: straight lines between the sizes that were measured.

    What the smallest takes is in the beginning of a step already.
    """
    sizes = [size for size, _ in of_ranks[0]]
    times = [max(sample[clock] for _, sample in same) for same in zip(*of_ranks, strict=True)]
    points = list(zip(sizes, times, strict=True))

    def seconds(most: float, ranks: int) -> float:
        if len(points) < 2 or points[-1][0] == 0:
            return 0.0
        above = next((i for i, (size, _) in enumerate(points) if size >= most), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(above - 1, 0)], points[max(above, 1)]
        return max(0.0, y0 + (most - x0) * (y1 - y0) / (x1 - x0) - points[0][1])

    return seconds


def table(rows: Sequence[Row]) -> Table:
    """Prediction against measurement."""
    out = Table(title="a step over processes", title_justify="left", box=box.SIMPLE_HEAD)
    out.add_column("optimizer, layout", no_wrap=True)
    headings = ("ranks", "of replicated", "measured", "predicted", "error", "error, CPU", *_PARTS)
    for heading in headings:
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        half = (row["high_s"] - row["low_s"]) / (2 * row["median_s"])
        errors = [
            Text(f"{row[of]:+.0%}", style="red" if abs(row[of]) > WORST_ERROR else "green")
            for of in ("error", "cpu_error")
        ]
        out.add_row(
            row["key"].rsplit(" ", 1)[0],
            str(row["ranks"]),
            "" if row["layout"] == "replicated" else f"{row['of_replicated']:.2f}",
            f"{report.seconds(row['median_s'])} ±{half:3.0%}",
            report.seconds(row["predicted_s"]),
            *errors,
            *(report.seconds(value) for value in row["parts_s"].values()),
        )
    return out


def summary(rows: Sequence[Row]) -> list[str]:
    """How good the predictions are, and whether what is wanted is reached."""
    lines = [f"failed: {row['key']}: {row['failure']}" for row in rows if row["failure"]]
    for of, what in (("error", ""), ("cpu_error", " of CPU time, which others disturb less")):
        errors = [abs(row[of]) for row in rows]
        mean, worst = statistics.fmean(errors), max(errors)
        kept = mean <= MEAN_ERROR and worst <= WORST_ERROR
        lines.append(
            f"errors of {len(errors)} predictions{what}: {mean:.0%} on average, {worst:.0%} at "
            f"worst; {'within' if kept else 'NOT within'} {MEAN_ERROR:.0%} and {WORST_ERROR:.0%}"
        )
    of_two = [row for row in rows if row["ranks"] == 2 and row["layout"] != "replicated"]
    late = [row for row in of_two if row["of_replicated"] > GOAL]
    if of_two:
        lines.append(
            f"{len(of_two) - len(late)} of {len(of_two)} steps of two ranks take at most {GOAL} of "
            "the step that each takes for itself"
        )
        lines += [f"  more: {row['key']}: {row['of_replicated']:.2f}" for row in late]
    loads = [row["others_load"] for row in rows if row["others_load"] is not None]
    if loads:
        lines.append(f"other processes used up to {max(loads):.0%} of the cores meanwhile")
    return lines

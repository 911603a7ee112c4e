"""How the cost grows with n, with the batch and with threads: `spectral-kernels bench --scaling`.

Against torch alone, and without comparing results: the same calls are compared elsewhere.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table

from . import peers, plots, report, run
from .case import OURS, dtype_name

_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_BATCHED = 64  # the size of the matrices of a growing batch

# (operator, dtype, largest n whatever is asked for): a root or basis of 4096 takes a minute.
_CASES = (
    ("gram", torch.float32, 4096),
    ("newton_schulz", torch.float32, 4096),
    ("newton_schulz", torch.bfloat16, 4096),
    ("kron_factors_update_", torch.float32, 4096),
    ("inverse_root", torch.float32, 2048),
    ("refresh_eigenbasis", torch.float32, 1024),
)
_BUDGET = 0.5

BLUE, ORANGE, *_ = plots.COLOURS

Row = Mapping[str, Any]


def main(options: argparse.Namespace, facts: Mapping[str, Any], console: Console) -> int:
    """Measures, prints the fitted exponents and draws."""
    peers.point(["none"])
    threads = run.thread_counts(options.threads or "1,2")
    wanted = options.op.split(",") if options.op else [op for op, _, _ in _CASES]
    cases = [entry for entry in _CASES if entry[0] in wanted]
    by_n = {
        (op, dtype_name(dtype)): _measure(
            op, dtype, [f"{n}x{n}" for n in measured_sizes(options.scaling, most)], threads, console
        )
        for op, dtype, most in cases
    }
    by_batch = {
        (op, dtype_name(dtype)): _measure(
            op, dtype, [f"{b}x{_BATCHED}x{_BATCHED}" for b in _BATCHES], threads, console
        )
        for op, dtype, _ in cases
    }
    console.print(_table("time ~ n^a, square matrices", by_n, axis=-1))
    console.print(_table(f"time ~ batch^a, matrices {_BATCHED}x{_BATCHED}", by_batch, axis=0))
    path = run.result_path(options.json, "growth")
    rows = [row for group in (*by_n.values(), *by_batch.values()) for row in group]
    run.write(path, "growth", dict(facts), rows)
    draw(by_n, by_batch, path.with_suffix(".png"), f"{facts['cpu']}, {facts['isa']}")
    console.print(f"written: {path}, {path.with_suffix('.png')}")
    return 1 if any(row["failure"] for row in rows) else 0


def measured_sizes(*largest: int) -> list[int]:
    """The n that are measured, up to the least of these."""
    return [n for n in _SIZES if n <= min(largest)]


def _measure(
    op: str, dtype: torch.dtype, shapes: list[str], threads: Sequence[int], console: Console
) -> list[dict[str, Any]]:
    family = next(family for family in run.FAMILIES if op in family.ops)
    cases = [family.case(op, shape, dtype) for shape in shapes]
    return run.measure(cases, threads, console, _BUDGET, check=False)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """The slope of log time over log size by least squares, over the upper half of the sizes."""
    pairs = sorted(zip(sizes, times, strict=True))
    pairs = pairs[len(pairs) // 2 - (len(pairs) == 2) :]
    if len(pairs) < 2:
        return None
    x, y = ([math.log(value) for value in values] for values in zip(*pairs, strict=True))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _series(
    rows: Sequence[Row], axis: int, threads: int, name: str
) -> tuple[list[int], list[float]]:
    points = [
        (int(row["shape"].split("x")[axis]), entry["median_s"])
        for row in rows
        if row["threads"] == threads
        for entry in row["contenders"]
        if entry["name"] == name and "median_s" in entry
    ]
    sizes, times = zip(*points, strict=True) if points else ((), ())
    return list(sizes), list(times)


def _peer(rows: Sequence[Row]) -> str | None:
    names = [entry["name"] for row in rows for entry in row["contenders"] if entry["name"] != OURS]
    return names[0] if names else None


def _counts(rows: Sequence[Row]) -> list[int]:
    return sorted({row["threads"] for row in rows})


def _table(title: str, groups: Mapping[tuple[str, str], Sequence[Row]], axis: int) -> Table:
    out = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    out.add_column("operator", no_wrap=True)
    out.add_column("dtype")
    for heading in ("threads", "smallest", "largest", "a", "torch's a", "gain"):
        out.add_column(heading, justify="right")
    for (op, dtype), rows in groups.items():
        one: tuple[list[int], list[float]] | None = None
        for threads in _counts(rows):
            sizes, times = _series(rows, axis, threads, OURS)
            if not sizes:
                continue
            peer = _peer(rows)
            slopes = [exponent(sizes, times)]
            slopes.append(exponent(*_series(rows, axis, threads, peer)) if peer else None)
            gain = ""
            if one is None:
                one = sizes, times
            elif one[0][-1] == sizes[-1]:
                gain = f"{one[1][-1] / times[-1]:.2f}x of {_counts(rows)[0]} thread"
            out.add_row(
                op,
                dtype,
                str(threads),
                f"{sizes[0]}: {report.seconds(times[0])}",
                f"{sizes[-1]}: {report.seconds(times[-1])}",
                *("" if slope is None else f"{slope:.2f}" for slope in slopes),
                gain,
            )
    return out


def draw(
    by_n: Mapping[tuple[str, str], Sequence[Row]],
    by_batch: Mapping[tuple[str, str], Sequence[Row]],
    path: Path,
    title: str,
) -> None:
    """Time against n above, against the batch below; one column an operator."""
    columns = max(len(by_n), 1)
    figure, grid = plt.subplots(
        2, columns, figsize=(2.6 * columns, 5.4), layout="constrained", squeeze=False
    )
    for axes_row, groups, axis, label in (
        (grid[0], by_n, -1, "n (matrix n x n)"),
        (grid[1], by_batch, 0, f"matrices of {_BATCHED} x {_BATCHED}"),
    ):
        for axes, ((op, dtype), rows) in zip(axes_row, groups.items(), strict=True):
            _panel(axes, rows, axis)
            axes.set_title(f"{op}\n{dtype}", fontsize=8)
            axes.set_xlabel(label)
        axes_row[0].set_ylabel("time of one call, ms")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(2, columns)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    plots.save(figure, path)


def _panel(axes: Axes, rows: Sequence[Row], axis: int) -> None:
    peer = _peer(rows)
    for threads, line in zip(_counts(rows), ("-", "--", ":"), strict=False):
        many = f"{threads} thread{'s' if threads > 1 else ''}"
        for name, label, colour in ((OURS, "ours", BLUE), (peer, "torch", ORANGE)):
            if name is not None:
                sizes, times = _series(rows, axis, threads, name)
                axes.plot(
                    sizes,
                    [1e3 * time for time in times],
                    line,
                    marker="o",
                    ms=3,
                    color=colour,
                    label=f"{label}, {many}",
                )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yscale("log")

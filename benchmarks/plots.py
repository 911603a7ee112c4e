"""Result rows as pictures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

plt.rcParams.update(
    {
        "figure.dpi": 130,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)

Row = Mapping[str, Any]


def speedups(rows: Iterable[Row], path: Path, title: str) -> None:
    """One line a case, one dot a contender: how many times faster ours is."""
    shown = [row for row in rows if any("speedup" in e for e in row["contenders"])]
    if not shown:
        return
    kinds = list(
        dict.fromkeys(
            _kind(e["name"]) for row in shown for e in row["contenders"] if "speedup" in e
        )
    )
    styles: dict[str, dict[str, Any]] = {
        kind: {"color": COLOURS[i % len(COLOURS)], "marker": "os^D"[i // len(COLOURS) % 4], "ms": 5}
        for i, kind in enumerate(kinds)
    }
    several = len({row["threads"] for row in shown}) > 1
    figure, axes = plt.subplots(figsize=(8.0, 1.3 + 0.24 * len(shown)), layout="constrained")
    for y, row in enumerate(shown):
        values = [_speedup(e) for e in row["contenders"] if "speedup" in e]
        axes.plot([1.0, max(values, key=lambda v: abs(math.log(v)))], [y, y], "#bbbbbb", lw=1)
        for entry in row["contenders"]:
            if "speedup" in entry:
                axes.plot(_speedup(entry), y, ls="", **styles[_kind(entry["name"])])
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_xscale("log")
    _plain_ticks(axes, [_speedup(e) for row in shown for e in row["contenders"] if "speedup" in e])
    several_sets = len({row["isa"] for row in shown}) > 1
    labels = [
        row["key"]
        + (f", {row['threads']} threads" if several else "")
        + (f", {row['isa']}" if several_sets else "")
        for row in shown
    ]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of the other / our time (right of 1: we are faster)")
    axes.set_title(title, loc="left")
    handles = [Line2D([], [], ls="", label=kind, **styles[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(kinds)))
    save(figure, path)


def _speedup(entry: Row) -> float:
    """Of replayed graphs where there are any: their launches cost nothing."""
    return float(entry.get("graph", entry)["speedup"])


def _kind(contender: str) -> str:
    """What shares a colour: torch's own functions do, loops and projects do not."""
    if contender == "torch loop":
        return "torch, matrix by matrix"
    if contender.startswith("torch") and contender != "torch.optim.Muon":
        return "torch's own functions"
    return contender


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    low, high = min([*values, 0.9]), max([*values, 2.0])
    candidates = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500)
    ticks = [tick for tick in candidates if low / 1.5 <= tick <= high * 1.5]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low / 1.2, high * 1.2)


def losses(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Training loss, a running mean, against steps and against seconds."""
    figure, (by_step, by_time) = plt.subplots(
        1, 2, figsize=(9.0, 4.2), sharey=True, layout="constrained"
    )
    for result, style in zip(results, _styles(results), strict=True):
        smooth = _running_mean(result["losses"])
        by_step.plot(range(1, len(smooth) + 1), smooth, label=result["name"], **style)
        by_time.plot(result["seconds"], smooth, **style)
    by_step.set_xlabel("step")
    by_time.set_xlabel("seconds of training")
    by_step.set_ylabel(f"training loss, nats (mean of {_WINDOW} steps)")
    finals = [_running_mean(result["losses"])[-1] for result in results]
    by_step.set_ylim(min(finals) - 0.1, max(finals) + 1.2)
    figure.legend(loc="outside lower center", ncols=4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    save(figure, path)


def step_times(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """What a step's time goes to: the model, and the optimizer."""
    figure, axes = plt.subplots(figsize=(8.0, 1.2 + 0.34 * len(results)), layout="constrained")
    optimizer = [1e3 * steady(result["optimizer_seconds"]) for result in results]
    whole = [
        1e3 * steady([b - a for a, b in itertools.pairwise([0.0, *result["seconds"]])])
        for result in results
    ]
    model = [total - part for total, part in zip(whole, optimizer, strict=True)]
    rows = range(len(results))
    axes.barh(rows, model, color="#c8c8c8", height=0.62, label="model, forward and backward")
    axes.barh(rows, optimizer, left=model, color=COLOURS[0], height=0.62, label="optimizer")
    for row, total, part in zip(rows, whole, optimizer, strict=True):
        axes.text(total + max(whole) * 0.01, row, f"{part:.1f} ms", va="center", fontsize=8)
    axes.set_yticks(rows, [result["name"] for result in results])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(whole) * 1.12)
    axes.set_xlabel("time of a step, ms (the figure is the optimizer's part)")
    axes.set_title(title, loc="left")
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path)


_WINDOW = 20


def _running_mean(values: Sequence[float]) -> list[float]:
    sums = list(itertools.accumulate(values, initial=0.0))
    return [
        (sums[i] - sums[max(0, i - _WINDOW)]) / min(i, _WINDOW) for i in range(1, len(values) + 1)
    ]


def _styles(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A colour an optimizer; its variants (after a comma in the name) dashed and dotted."""
    kinds: dict[str, int] = {}
    styles = []
    for result in results:
        kind = result["name"].partition(",")[0]
        seen = kinds.setdefault(kind, 0)
        kinds[kind] += 1
        colour = COLOURS[list(kinds).index(kind)]
        line = ("-", (0, (4, 3)), (0, (1, 1.5)))[min(seen, 2)]
        styles.append({"color": colour, "ls": line, "lw": 1.4, "zorder": 3 + seen})
    return styles


# Steps of one training before the next one's turn: whole periods of what optimizers do every few.
STRETCH = 20


def steady(values: Sequence[float]) -> float:
    """What a step takes: the median, over stretches of steps, of their mean.

    The first step, which sets up, does not count. In a stretch all others do, refreshes too; a
    stretch in which something else had the machine is outvoted.
    """
    stretches = [values[i : i + STRETCH] for i in range(0, len(values), STRETCH)]
    stretches[0] = stretches[0][1:] or stretches[0]
    if len(stretches) > 1 and len(stretches[-1]) < STRETCH:
        del stretches[-1]
    return statistics.median(statistics.fmean(stretch) for stretch in stretches)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)

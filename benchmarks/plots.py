"""Result rows as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

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
    names = list(
        dict.fromkeys(e["name"] for row in shown for e in row["contenders"] if "speedup" in e)
    )
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    several = len({row["threads"] for row in shown}) > 1
    figure, axes = plt.subplots(figsize=(8.0, 1.3 + 0.24 * len(shown)), layout="constrained")
    for y, row in enumerate(shown):
        values = [e["speedup"] for e in row["contenders"] if "speedup" in e]
        axes.plot([1.0, max(values, key=lambda v: abs(math.log(v)))], [y, y], "#bbbbbb", lw=1)
        for entry in row["contenders"]:
            if "speedup" in entry:
                axes.plot(entry["speedup"], y, "o", color=colour[entry["name"]], ms=5)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_xscale("log")
    _plain_ticks(axes, [e["speedup"] for row in shown for e in row["contenders"] if "speedup" in e])
    labels = [row["key"] + (f", {row['threads']} threads" if several else "") for row in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of the other / our time (right of 1: we are faster)")
    axes.set_title(title, loc="left")
    handles = [plt.Line2D([], [], marker="o", ls="", color=colour[n], label=n) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(names)))
    save(figure, path)


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    low, high = min([*values, 0.9]), max([*values, 2.0])
    candidates = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500)
    ticks = [tick for tick in candidates if low / 1.5 <= tick <= high * 1.5]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low / 1.2, high * 1.2)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)

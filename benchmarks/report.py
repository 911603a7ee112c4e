"""Result rows as tables on a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .case import OURS
from .timing import seconds

# The noise of medians: ours may be slower by this much before a row counts as lost.
_MARGIN = 0.05

# The share of the cores that others may use before times are called disturbed.
_DISTURBED = 0.1

Row = Mapping[str, Any]


def machine_lines(facts: Mapping[str, Any]) -> list[str]:
    """What the figures below were measured on."""
    peaks = facts["peak_gflops_a_thread"]
    caps = ", ".join(f"{name}={value}" for name, value in facts["caps"].items())
    known = [f"{rate} {peak:.0f}" for rate, peak in peaks.items() if peak is not None]
    load = facts["others_load"]
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}{f' ({caps})' if caps else ''}; "
        f"torch {facts['torch']}, Python {facts['python']}; {facts['date']}",
        f"FMA peak of one thread, GFLOP/s: {', '.join(known) or 'unknown'}",
        "other processes: unknown"
        if load is None
        else f"other processes use {load:.0%} of the cores"
        + (": these times will be disturbed" if load > _DISTURBED else ""),
    ]
    if facts["peers"]:
        found = ", ".join(f"{name} ({version})" for name, version in facts["peers"].items())
        lines.append(f"peers: {found}")
    return lines


def table(op: str, rows: Sequence[Row]) -> Table:
    """All rows of one operator: ours, then the contenders, with errors before times."""
    out = Table(title=op, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    out.add_column("case", no_wrap=True)
    out.add_column("", min_width=20)
    for heading in ("of ceiling", "speed-up", "time", "error", "goal"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        for line in _lines(row):
            out.add_row(*line)
        out.add_section()
    return out


def _lines(row: Row) -> list[list[str | Text]]:
    """The cells of a case: its name beside the contenders."""
    if row["failure"] is None:
        entries = [_cells(row, entry) for entry in row["contenders"]]
        entries += [_error_goal(goal) for goal in row.get("error_goals", ())]
    else:
        entries = [[OURS], [Text(row["failure"], style="red")]]
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    if row.get("worst_entry") is not None and row["failure"] is None:
        entries.append(_worst_entry(row))
    labels = [f"{row['shape']} {row['dtype']}", ", ".join(filter(None, (row["variant"], threads)))]
    pairs = itertools.zip_longest(labels, entries, fillvalue=None)
    return [[label or "", *(entry or ())] for label, entry in pairs]


def _cells(row: Row, entry: Row) -> list[str | Text]:
    name = entry["name"]
    if "failure" in entry:
        return [Text(f"{name}: {entry['failure']}", style="red")]
    half = (entry["high_s"] - entry["low_s"]) / (2 * entry["median_s"])
    spread = " once" if entry["samples"] == 1 else f" ±{half:3.0%}"
    share = entry.get("share_of_peak")
    bound = f" {row['bound']}" if name == OURS and row.get("bound") else ""
    ratio: str | Text = ""
    if "speedup" in entry:
        ratio = Text(f"{entry['speedup']:.2f}x", style=speedup_style(entry))
    goal = entry.get("goal")
    return [
        name,
        "" if share is None else f"{share:.0%}{bound}",
        ratio,
        seconds(entry["median_s"]) + spread + _graph(entry),
        "" if entry["error"] is None else f"{entry['error']:.1e}",
        "" if goal is None else f">= {goal:g}x",
    ]


def _graph(entry: Row) -> str:
    """The time of a replayed recording, on cards."""
    return f", graph {seconds(entry['graph']['median_s'])}" if "graph" in entry else ""


def _worst_entry(row: Row) -> list[str | Text]:
    """The entry of a list that the errors above are of, and what plain torch makes of it."""
    name = f"errors of entry {row['worst_entry']}; plain torch"
    return [name, "", "", "", f"{row['baseline_error']:.1e}"]


def speedup_style(entry: Row) -> str:
    """Red for a contender that is faster or whose goal is missed."""
    lost = entry["speedup"] < max(1.0 - _MARGIN, entry.get("goal", 0.0))
    return "red" if lost else "green"


def _error_goal(goal: Row) -> list[str | Text]:
    style = "green" if goal["ratio"] <= goal["goal"] else "red"
    ratio = Text(f"{goal['ratio']:.2f}", style=style)
    return [f"error over that of {goal['name']}", "", "", "", ratio, f"<= {goal['goal']:g}"]


def summary(rows: Iterable[Row]) -> list[str]:
    """How many comparisons were won, which goals were missed, what failed."""
    rows = list(rows)
    pairs = [(row, e) for row in rows for e in row["contenders"] if "speedup" in e]
    best = [(row, e) for row in rows if (e := _best_of_torch(row)) is not None]
    lost = [(row, e) for row, e in pairs if e["speedup"] < 1.0 - _MARGIN]
    goals = [(row, e) for row, e in pairs if "goal" in e]
    missed = [(row, e) for row, e in goals if e["speedup"] < e["goal"]]
    lines = [f"{len(pairs) - len(lost)} of {len(pairs)} comparisons are not slower"]
    if best:
        won = sum(entry["speedup"] >= 1.0 - _MARGIN for _, entry in best)
        lines.append(f"{won} of {len(best)} cases are not slower than the best of torch's own ways")
    lines += [f"  slower: {row['key']}: {e['speedup']:.2f}x of {e['name']}" for row, e in lost]
    if goals:
        lines.append(f"{len(goals) - len(missed)} of {len(goals)} goals are reached")
        lines += [
            f"  missed: {row['key']}: {e['speedup']:.2f}x of {e['name']}, goal {e['goal']:g}x"
            for row, e in missed
        ]
    lines += [f"  failed: {row['key']}: {row['failure']}" for row in rows if row["failure"]]
    return [*lines, *disturbance([row.get("others_load") for row in rows])]


def disturbance(loads: Iterable[float | None]) -> list[str]:
    """What other processes used of the cores while something was timed, and what that means."""
    known = [load for load in loads if load is not None]
    if not known:
        return []
    mean = sum(known) / len(known)
    line = f"other processes used {mean:.0%} of the cores meanwhile"
    if mean > _DISTURBED:
        line += ": times are disturbed, ratios less, since all that is compared took turns"
    return [line]


def _best_of_torch(row: Row) -> Row | None:
    ways = [e for e in row["contenders"] if e.get("torch") and "speedup" in e]
    return min(ways, key=lambda e: float(e["speedup"]), default=None)


def comparison(old: Iterable[Row], new: Iterable[Row]) -> Table:
    """Our times in an older result file and now."""
    out = Table(title="against the older run", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("case", "threads", "then", "now", "now is"):
        out.add_column(heading, justify="left" if heading == "case" else "right")
    before = {_identity(row): _ours(row) for row in old}
    for row in new:
        then, now = before.get(_identity(row)), _ours(row)
        if then is None or now is None:
            continue
        ratio = then / now
        slower = ratio < 1.0 - _MARGIN
        style = "red" if slower else "green" if ratio > 1.0 + _MARGIN else ""
        out.add_row(
            row["key"],
            str(row["threads"]),
            seconds(then),
            seconds(now),
            Text(f"{ratio:.2f}x as fast", style=style),
        )
    return out


def _identity(row: Row) -> tuple[str, int, str]:
    return row["key"], row["threads"], row["isa"]


def _ours(row: Row) -> float | None:
    times = [entry.get("median_s") for entry in row["contenders"] if entry["name"] == OURS]
    return times[0] if times else None


def show(console: Console, rows: Sequence[Row]) -> None:
    """One table an operator, in the order of the rows."""
    for op in dict.fromkeys(row["op"] for row in rows):
        console.print(table(op, [row for row in rows if row["op"] == op]))
        console.print()

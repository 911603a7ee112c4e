"""One instruction set after another: `spectral-kernels bench --isa avx2,avx512` or `--isa all`.

Every set runs in a process of its own, in which torch is capped the same way.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from spectral_kernels import _extension

from . import plots, report, run
from .case import OURS, Case
from .inputs import rate_of

# What is measured where nothing else is asked for.
_STANDING = (
    *("--op", "gram,newton_schulz"),
    *("--shape", "512x512,768x768,768x3072"),
    *("--dtype", "float32,bfloat16"),
)

# Where there are no 16-bit products, ours multiply in fp32 and torch's are slower than its fp32.
_EMULATED_GOAL = 10.0
_EMULATED_PEERS = {"gram": ("torch.mm", "torch.bmm"), "newton_schulz": ("torch.optim.Muon",)}

Row = Mapping[str, Any]


def sets(isa: str) -> list[str]:
    """The instruction sets that `--isa` names, checked; "all" leaves the baseline out.

    Raises:
        ValueError: a set that is unknown or does not run here, or one named twice.
    """
    if isa == "all" and _extension.MODULE is not None:
        supported = _extension.MODULE.supported_isas()
        return supported[1:] or supported
    names = isa.split(",")
    for name in names:
        run.check_instruction_set(name)
    if len(set(names)) < len(names):
        raise ValueError(f"--isa names a set twice: {isa!r}")
    return names


def with_goals(cases: Iterable[Case]) -> list[Case]:
    """The cases, bf16 products on a set that has none with the speed-up over torch to reach."""
    return [
        dataclasses.replace(
            case, goals=dict.fromkeys(_EMULATED_PEERS[case.op], _EMULATED_GOAL) | dict(case.goals)
        )
        if case.dtype == torch.bfloat16
        and rate_of(case.dtype) == "fp32"
        and case.op in _EMULATED_PEERS
        else case
        for case in cases
    ]


def main(
    isas: Sequence[str], options: argparse.Namespace, argv: Sequence[str], console: Console
) -> int:
    """Runs the command once a set and puts the rows of all into one file.

    Returns:
        The worst exit status of the runs.
    """
    records: dict[str, dict[str, Any]] = {}
    status = 0
    chosen = options.op or options.quick or options.acceptance or options.sweep
    with tempfile.TemporaryDirectory() as folder:
        for isa in isas:
            path = Path(folder) / f"{isa}.json"
            arguments = [*argv, *(() if chosen else _STANDING)]
            part = ["--part", "--isa", isa, "--json", str(path)]
            sys.stdout.flush()
            done = subprocess.run([*run.COMMAND, *arguments, *part])
            status = max(status, done.returncode)
            if not path.exists():
                return status
            records[isa] = run.read(path)
    facts, rows = merged(records)
    console.print(table(rows))
    for line in report.summary(rows):
        console.print(line, highlight=False)
    path = run.result_path(options.json, "ladder")
    run.write(path, "ladder", facts, rows)
    picture = path.with_suffix(".png")
    plots.speedups(rows, picture, f"{facts['cpu']}, torch {facts['torch']}")
    console.print(f"written: {path}" + (f", {picture}" if picture.exists() else ""))
    return status


def merged(
    records: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Machine facts and rows of several result files, by instruction set.

    The facts are those of the last; what differs between sets is under "sets".
    """
    machines = {isa: record["machine"] for isa, record in records.items()}
    facts = dict(list(machines.values())[-1])
    differing = ("caps", "peak_gflops_a_thread", "others_load", "date")
    facts["sets"] = {
        isa: {name: machine[name] for name in differing} for isa, machine in machines.items()
    }
    facts["isa"] = ", ".join(machines)
    facts["caps"] = {}
    return facts, [row for record in records.values() for row in record["rows"]]


def table(rows: Sequence[Row]) -> Table:
    """A line a case, a column a set: our time, and how many times faster than torch that is."""
    out = Table(
        title="instruction sets side by side",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    out.add_column("case", no_wrap=True)
    out.add_column("threads", justify="right")
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    for isa in isas:
        out.add_column(isa, justify="right")
    cells = {(row["key"], row["threads"], row["isa"]): _cell(row) for row in rows}
    for key, threads in dict.fromkeys((row["key"], row["threads"]) for row in rows):
        out.add_row(key, str(threads), *(cells.get((key, threads, isa), "") for isa in isas))
    return out


def _cell(row: Row) -> Text:
    if row["failure"]:
        return Text("failed", style="red")
    ours = next(entry for entry in row["contenders"] if entry["name"] == OURS)
    peers = [entry for entry in row["contenders"] if "speedup" in entry]
    cell = Text(report.seconds(ours["median_s"]))
    for entry in peers[:1]:
        cell.append(f"  {entry['speedup']:.2f}x", style=report.speedup_style(entry))
    return cell

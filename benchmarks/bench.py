"""The command `spectral-kernels bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from . import distributed, isa_comparison, peers, plots, report, run, scaling, sweep


def main(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the command; see `spectral_kernels.cli` for the options and the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        peers.point(options.peers or (["none"] if options.quick else []))
        threads = run.thread_counts(options.threads)
        cases = sweep.cases(options.sweep) if options.sweep else run.select(options)
        older = run.read(options.compare)["rows"] if options.compare else None
        isas = isa_comparison.sets(options.isa) if options.isa else []
        if (options.scaling or options.ranks) and len(isas) > 1:
            raise ValueError("--scaling and --ranks take one instruction set")
        if options.ranks:
            for other in ("acceptance", "sweep", "scaling"):
                if getattr(options, other):
                    raise ValueError(f"--ranks takes --quick, not --{other}")
            distributed.campaign(options)
        if len(isas) == 1:
            run.cap_instruction_set(isas[0], argv)
            cases = isa_comparison.with_goals(cases)
    except (ValueError, OSError) as error:
        print(f"spectral-kernels bench: {error}", file=sys.stderr)
        return 2
    if options.list:
        for case in cases:
            console.print(case.key, highlight=False)
        return 0
    if len(isas) > 1:
        return isa_comparison.main(isas, options, argv, console)
    facts = run.machine()
    for line in report.machine_lines(facts):
        console.print(line, highlight=False, style="dim")
    if options.scaling:
        return scaling.main(options, facts, console)
    if options.ranks:
        return distributed.main(options, facts, console)
    kind = "acceptance" if options.acceptance else "sweep" if options.sweep else "bench"
    rows = run.measure(cases, threads, console, run.QUICK_BUDGET if options.quick else run.BUDGET)
    status = 1 if any(row["failure"] for row in rows) else 0
    report.show(console, rows)
    if options.part:
        run.write(Path(options.json), kind, facts, rows)
        return status
    if older is not None:
        console.print(report.comparison(older, rows))
    for line in report.summary(rows):
        console.print(line, highlight=False)
    path = run.result_path(options.json, kind)
    run.write(path, kind, facts, rows)
    picture = path.with_suffix(".png")
    plots.speedups(rows, picture, f"{facts['cpu']}, {facts['isa']}, torch {facts['torch']}")
    console.print(f"written: {path}" + (f", {picture}" if picture.exists() else ""))
    return status

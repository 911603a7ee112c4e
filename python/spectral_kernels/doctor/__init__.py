"""The command `spectral-kernels doctor`: what can go wrong on a machine, tried there.

It also runs the list of faults that users of matrix optimizers have reported on any optimizer:
`--impl torch,soap`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .. import __version__, _records, info
from . import _accuracy, _faults, _machine, _subjects
from ._outcome import FAILED, Finding

__all__ = ["FORMAT", "collect", "main", "verdict"]

FORMAT = 1


def main(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0 if nothing failed, 1 if something did, 2 for arguments that make no sense.
    """
    try:
        implementations = _chosen(options.impl)
        _subjects.point_at_clones(options.peers)
        named = [(name, _subjects.subjects(name)) for name in implementations]
    except ValueError as error:
        print(f"spectral-kernels doctor: {error}", file=sys.stderr)
        return 2
    if not options.json and importlib.util.find_spec("rich") is None:
        print(
            "spectral-kernels doctor: its table needs rich, --json does not: "
            'pip install "spectral-kernels[cli]"',
            file=sys.stderr,
        )
        return 2
    begun = time.perf_counter()
    findings = []
    for implementation, finding in collect(named, quick=options.quick):
        findings.append((implementation, finding))
        if not options.json and sys.stderr.isatty():
            print(f"\r\033[K{finding.section}: {finding.name}", end="", file=sys.stderr)
    record = _record(findings, time.perf_counter() - begun)
    if options.json:
        print(_records.text(record), end="")
    else:
        _show(record)
    return 1 if record["verdict"] == FAILED else 0


def collect(
    named: Iterable[tuple[str, Sequence[_subjects.Subject]]], *, quick: bool = False
) -> Iterator[tuple[str, Finding]]:
    """Every finding, one after the other, with the implementation that it is about.

    Args:
        named: implementations and their optimizers; "ours" brings the checks of the machine.
        quick: fewer processes, one instruction set.
    """
    for implementation, subjects in named:
        if implementation == "ours":
            yield from (("ours", finding) for finding in _own(quick))
        for subject in subjects:
            for finding in _faults.run_faults(subject):
                yield implementation, finding


def _own(quick: bool) -> Iterator[Finding]:
    sets = _machine.instruction_sets()
    sets = sets[-1:] if quick else sets
    yield from _machine.fresh_processes(1 if quick else 2)
    yield from _machine.lapack(calls=1 if quick else 3)
    yield from _machine.repetition(sets)
    yield from _accuracy.accuracy(sets)


def verdict(findings: Iterable[Finding]) -> str:
    """ "failed" if anything did, else "passed"."""
    return FAILED if any(finding.outcome == FAILED for finding in findings) else "passed"


def _chosen(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _subjects.IMPLEMENTATIONS:
            known = ", ".join(_subjects.IMPLEMENTATIONS)
            raise ValueError(f"--impl must be of {known}, not {name!r}")
    if not names:
        raise ValueError("--impl names nothing")
    return list(dict.fromkeys(names))


def _record(findings: Sequence[tuple[str, Finding]], seconds: float) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "doctor",
        "machine": {
            "cpu": info.cpu_model(),
            "cores": os.cpu_count(),
            "instruction_sets": _machine.instruction_sets(),
            "spectral_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "peers": _subjects.peers.versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        "seconds": round(seconds, 1),
        "checks": [{"implementation": name, **found.plain()} for name, found in findings],
        "verdict": verdict(found for _, found in findings),
    }


_STYLES = {"passed": "green", FAILED: "red", "not applicable": "dim", "by design": "yellow"}


def _show(record: dict[str, Any]) -> None:
    """The record as tables; of what passed, only the number."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 110)
    facts = record["machine"]
    sets = ", ".join(facts["instruction_sets"]) or "no compiled kernels"
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {sets}; torch {facts['torch']}, "
        f"Python {facts['python']}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("check", "of", "", "what was seen"):
        table.add_column(heading)
    for heading, checks in _sections(record["checks"]):
        counts = Counter(check["outcome"] for check in checks)
        summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        table.add_row(Text(heading, style="bold"), "", "", summary)
        for check in checks:
            if check["outcome"] != "passed":
                outcome = Text(check["outcome"], style=_STYLES[check["outcome"]])
                table.add_row(f"  {check['name']}", check["subject"], outcome, check["sentence"])
        table.add_section()
    console.print(table)
    failed = sum(check["outcome"] == FAILED for check in record["checks"])
    console.print(
        f"{record['verdict']}: {failed} of {len(record['checks'])} checks failed, "
        f"{record['seconds']:.0f} s",
        style=_STYLES[record["verdict"]],
        highlight=False,
    )


def _sections(checks: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The checks of every section; optimizers one by one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for check in checks:
        heading = check["section"]
        if heading == "optimizers":
            heading = f"{check['implementation']}: {check['subject']}"
        groups.setdefault(heading, []).append(check)
    yield from groups.items()

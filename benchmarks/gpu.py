"""`make gpu`: tests and timings on a card, in a few minutes, without a network.

    python -m spectral_kernels.benchmarks.gpu [--budget SECONDS] [--json FILE] [--parts NAMES]

A card is one more place for the families' cases: rows, timing and pictures are those of
`spectral-kernels bench`. Every part is a process of its own with a limit of its own, and what it
has measured is in the result file row by row: a crash or a hang costs the case that it happened in,
and the part goes on behind it. Kernels that are off by default come last. `--rehearse` goes through
all of it on tiny matrices on the CPU, with Triton's kernels interpreted: its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import gpu_parts, run
from .gpu_parts import PARTS, Part
from .timing import seconds

# Of every part, and of what says nothing meanwhile: compiling one kernel takes a minute at most.
LIMIT = 100.0
PATIENCE = 75.0
# A part whose cases crash again and again is given up.
ATTEMPTS = 4


@dataclass
class Session:
    """One run: where its results go and how long it may take.

    Attributes:
        path: the result file.
        budget: seconds for everything.
        rehearse: without a card.
        limit: seconds for a part.
        patience: seconds without a word after which a process hangs.
        inject: what shall go wrong in a rehearsal, "OP=KIND".
    """

    path: Path
    budget: float
    rehearse: bool = False
    limit: float = LIMIT
    patience: float = PATIENCE
    inject: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=lambda: {"parts": {}, "left_out": []})
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.budget - (time.monotonic() - self.start)

    def say(self, line: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {line}", flush=True)

    def save(self) -> None:
        """Writes what there is so far."""
        run.write(self.path, "gpu", self.facts, self.rows, budget_s=self.budget, **self.more)

    def part(self, part: Part) -> None:
        """Runs a part, whatever became of the ones before."""
        if self.left <= 0:
            return self.ended(part, "left out: no time")
        reason = (self.facts.get("backends") or {}).get(part.backend)
        if reason:
            return self.ended(part, f"left out: {reason}")
        began = time.monotonic()
        limit = min(part.share * self.left, part.limit or self.limit)
        try:
            if part.command is not None:
                command = part.command(limit)
                self.more[part.name] = finished(command, limit) if command else "not installed"
                outcome = "done"
            elif part.here is not None:
                part.here(self)
                outcome = "done"
            else:
                outcome = self._measured(part, began + limit)
        except Exception as error:
            traceback.print_exc()
            outcome = f"failed: {type(error).__name__}: {str(error)[:300]}"
        self.ended(part, f"{outcome} in {time.monotonic() - began:.0f} s")

    def ended(self, part: Part, outcome: str) -> None:
        """Writes down what has become of a part."""
        self.more["parts"][part.name] = outcome
        self.say(f"{part.name}: {outcome}")
        self.save()

    def _measured(self, part: Part, deadline: float) -> str:
        """Runs a part's process, and again behind a case that has ended it."""
        done = 0
        for lost in range(ATTEMPTS):
            with tempfile.TemporaryDirectory() as folder:
                lines = Path(folder) / "lines"
                lines.touch()
                reader = _Reader(self, lines)
                why = self._attempt(self._command(part, lines, done), reader, deadline)
            if why is None:
                return "done" if not lost else f"failed: {lost} cases ended their process"
            done += reader.begun
            if reader.open is None:
                return f"failed: {why}"
            self.row(reader.open | {"failure": why, "contenders": []})
            if time.monotonic() >= deadline:
                return f"failed: {why}"
        return f"failed: {ATTEMPTS} cases ended their process"

    def _command(self, part: Part, lines: Path, skip: int) -> list[str]:
        command = [sys.executable, "-m", f"{__package__}.gpu"]
        command += ["--part", part.name, "--lines", str(lines), "--skip", str(skip)]
        command += ["--peaks", json.dumps(self.more.get("ceilings") or {})]
        for injected in self.inject:
            command += ["--inject", injected]
        return command + (["--rehearse"] if self.rehearse else [])

    def _attempt(self, command: Sequence[str], reader: _Reader, deadline: float) -> str | None:
        """Why the process did not end by itself and well, or None."""
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if self.rehearse else {})
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            while True:
                code = process.poll()
                reader.read()
                if code is not None:
                    break
                if time.monotonic() >= deadline:
                    return "the part's time was over"
                # What it imports may take a while.
                if reader.begun and reader.silent > self.patience:
                    return f"nothing for {self.patience:g} s: it hangs"
                time.sleep(0.05)
        finally:
            _end(process)
        if code == 0:
            return None
        return f"signal {-code} ended it" if code < 0 else f"it ended with status {code}"

    def row(self, row: dict[str, Any]) -> None:
        """Takes, shows and saves a row."""
        unable = str(row["failure"] or "").startswith("RuntimeError: backend cannot run")
        if unable:
            self.more["left_out"].append({name: row[name] for name in ("key", "isa", "failure")})
        else:
            self.rows.append(row)
        self.say(f"  {row['key']}, {row['isa']}: {shown(row)}")
        self.save()


class _Reader:
    """The lines that a part's process has written, one a case begun and one a case ended."""

    def __init__(self, session: Session, path: Path) -> None:
        self._session, self._path, self._at = session, path, 0
        self._heard = time.monotonic()
        self.begun = 0
        self.open: dict[str, Any] | None = None

    @property
    def silent(self) -> float:
        """Seconds since the last line."""
        return time.monotonic() - self._heard

    def read(self) -> None:
        """Takes whole lines; half of one may be on its way."""
        with self._path.open() as file:
            file.seek(self._at)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._at += len(whole.encode())
        for line in whole.splitlines():
            self._heard = time.monotonic()
            [(kind, value)] = json.loads(line).items()
            if kind == "begin":
                self.begun, self.open = self.begun + 1, value
            elif kind == "row":
                self.open = None
                self._session.row(value)
            elif kind == "facts":
                self._session.facts |= value
            else:
                self._session.more[kind] = value


def _end(process: subprocess.Popen[Any]) -> None:
    """With all processes that it has started, compilers among them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def finished(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Runs tests, at most so many seconds; exit status, counts and the end of what was said."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=gpu_parts.source(),
        start_new_session=True,
    )
    code: int | None = None
    try:
        said, _ = process.communicate(timeout=limit)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    tail = said.decode(errors="replace")[-6000:]
    print(tail, flush=True)
    counts = {
        word: int(count)
        for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", tail[-400:])
    }
    return {"exit": code, "counts": counts, "tail": tail}


def shown(row: dict[str, Any]) -> str:
    """A row as a line: times, of recordings too, shares of the ceiling and errors."""
    if row["failure"]:
        return str(row["failure"])
    parts = []
    for entry in row["contenders"]:
        if "failure" in entry:
            parts.append(f"{entry['name']} {entry['failure']}")
            continue
        text = f"{entry['name']} {seconds(entry['median_s'])}"
        if "graph" in entry:
            text += f" (graph {seconds(entry['graph']['median_s'])})"
        if entry.get("share_of_peak"):
            text += f" {entry['share_of_peak']:.0%}"
        if entry.get("error") is not None:
            text += f" err {entry['error']:.1e}"
        parts.append(text)
    return " | ".join(parts)


def chosen(parts: Sequence[Part], names: str | None) -> Iterator[Part]:
    """Those named, by all their words or the first; all without names.

    Raises:
        ValueError: a name that no part has.
    """
    wanted = names.split(",") if names else []
    known = {word for part in parts for word in (part.name, part.name.split()[0])}
    if unknown := set(wanted) - known:
        words = ", ".join(part.name for part in parts)
        raise ValueError(f"--parts takes {words}, not {', '.join(sorted(unknown))}")
    for part in parts:
        if not wanted or part.name in wanted or part.name.split()[0] in wanted:
            yield part


def main(argv: Sequence[str] | None = None) -> int:
    """Goes through all parts; 0 if nothing failed, 1 if something did, 2 without a card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=450.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--parts", help="only these, by name")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a part")
    parser.add_argument("--patience", type=float, default=PATIENCE)
    parser.add_argument("--inject", action="append", default=[], help=argparse.SUPPRESS)
    # Of a part's own process.
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--peaks", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        return gpu_parts.measured(options)
    try:
        parts = list(chosen(PARTS, options.parts))
    except ValueError as error:
        parser.error(str(error))
    if not options.rehearse and not torch.cuda.is_available():
        print("spectral-kernels gpu: torch sees no card; --rehearse goes through it without one")
        return 2
    card = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    session = Session(
        path=options.json or _path(card),
        budget=options.budget,
        rehearse=options.rehearse,
        limit=options.limit,
        patience=options.patience,
        inject=options.inject,
    )
    session.path.parent.mkdir(parents=True, exist_ok=True)
    session.say(f"results go to {session.path}")
    for part in parts:
        session.part(part)
    return summary(session)


def _path(card: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    name = f"gpu-{re.sub('[^A-Za-z0-9]+', '-', card).lower()}-{stamp}.json"
    return Path(os.environ.get("OUT", "results")) / name


def summary(session: Session) -> int:
    """What failed, once more at the end; 1 if something did."""
    rows = [row for row in session.rows if row["failure"]]
    failed = [f"{row['key']}, {row['isa']}: {row['failure']}" for row in rows]
    outcomes: dict[str, str] = session.more["parts"]
    broken = [f"{name}: {how}" for name, how in outcomes.items() if how.startswith("failed")]
    for name in ("tests", "sanitizer"):
        found = session.more.get(name)
        if isinstance(found, dict) and found["exit"] != 0:
            broken.append(f"{name}: exit status {found['exit']}, {found['counts']}")
    for line in (*failed, *broken):
        session.say(f"failed: {line}")
    session.say(f"written: {session.path}; failed: {len(failed)} cases, {len(broken)} parts")
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
